"""Programs that a model writes: from its text to a program, from verdicts to a score with an interval."""
