"""The training machinery. `loop`, `metrics` and `schedule` serve both backends and import neither jax nor torch."""
