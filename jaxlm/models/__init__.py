"""Flax modules that own parameters and name their axes. The mathematics is in `jaxlm.ops`."""
