"""Text to batches: sources -> tokenizer -> shards -> packing -> pipeline. Imports neither jax nor torch."""
