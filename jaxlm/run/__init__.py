"""A run directory and what it records: metrics, progress, clock, alerts. Neutral: no JAX, no torch."""
