"""The engine on JAX: `runner` is its hands, `programs` what is compiled, `draw` the next token, `rows` the cache."""
