"""Both frameworks in full precision."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
import torch  # noqa: F401  (here, so that a missing torch or transformers fails every test of this suite)
import transformers  # noqa: F401


# Workers of one pytest run mix both suites, and float64 is a switch of the whole process. So each module of this suite
# turns it on and puts it back. Arrays are made in tests and fixtures of at most module scope, never at import.
@pytest.fixture(scope="module", autouse=True)
def full_precision() -> Iterator[None]:
    """float64 available and float32 products exact in JAX; torch on the CPU already is so."""
    before = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    yield
    jax.clear_caches()  # no other module runs these programs, and they are large
    jax.config.update("jax_enable_x64", before[0])
    jax.config.update("jax_default_matmul_precision", before[1])
