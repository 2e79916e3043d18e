"""What a run needs, known before it is started: the step compiled for a topology, and what limits it."""
