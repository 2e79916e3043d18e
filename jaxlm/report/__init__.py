"""Pages and plots. Neutral: no JAX, no torch."""
