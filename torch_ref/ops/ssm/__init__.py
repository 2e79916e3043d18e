"""State-space scans. `jaxlm.ops.ssm` has the same names in JAX."""
