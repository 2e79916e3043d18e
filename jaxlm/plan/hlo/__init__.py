"""XLA programs as text, read and counted."""
