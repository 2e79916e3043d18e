"""Text and token ids: tokenizers, completion, sampling options. Neutral: no JAX, no torch."""
