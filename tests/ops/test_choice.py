"""The table of kernels: which one runs, on which platform, for which call."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

from jaxlm import config
from jaxlm.ops import kernel_choice
from jaxlm.ops.kernel_choice import Attention

LONG: dict[str, Any] = {"dtype": jnp.bfloat16, "length": 4096, "head_dim": 128, "aligned": True}


@pytest.mark.parametrize(
    ("platform", "change", "kernel"),
    [
        ("tpu", {}, "splash"),
        ("tpu", {"dtype": jnp.float32, "length": 257, "head_dim": 40, "softcap": True, "sinks": True}, "splash"),
        ("tpu", {"dtype": jnp.float64}, "blockwise"),
        ("tpu", {"dtype": jnp.float16}, "blockwise"),
        ("tpu", {"merged": True}, "blockwise"),
        ("tpu", {"aligned": False}, "xla"),
        ("tpu", {"length": 255}, "xla"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"dtype": jnp.float16, "head_dim": 64}, "cudnn"),
        ("gpu", {"dtype": jnp.float32}, "blockwise"),
        ("gpu", {"length": 4097}, "blockwise"),
        ("gpu", {"head_dim": 256}, "blockwise"),
        ("gpu", {"head_dim": 100}, "blockwise"),
        ("gpu", {"softcap": True}, "blockwise"),
        ("gpu", {"sinks": True}, "blockwise"),
        ("gpu", {"merged": True}, "blockwise"),
        ("gpu", {"aligned": False}, "xla"),
        ("cpu", {}, "blockwise"),
        ("cpu", {"length": 255}, "xla"),
        ("cpu", {"aligned": False}, "xla"),
    ],
)
def test_the_default_kernel(platform: str, change: dict[str, Any], kernel: str) -> None:
    assert kernel_choice.attention("auto", Attention(platform, **(LONG | change))) == kernel


@pytest.mark.parametrize(
    ("asked", "platform", "change", "kernel"),
    [
        ("splash", "tpu", {"length": 8}, "splash"),
        ("splash", "cpu", {}, "blockwise"),
        ("splash", "gpu", {}, "cudnn"),
        ("cudnn", "tpu", {}, "blockwise"),
        ("cudnn", "gpu", {"softcap": True}, "blockwise"),
        ("cudnn", "gpu", {"aligned": False}, "xla"),
        ("blockwise", "tpu", {}, "blockwise"),
        ("blockwise", "cpu", {"aligned": False}, "xla"),
        ("xla", "tpu", {}, "xla"),
        ("xla", "gpu", {}, "xla"),
    ],
)
def test_what_is_asked_for_is_taken_where_it_applies(
    asked: str, platform: str, change: dict[str, Any], kernel: str
) -> None:
    assert kernel_choice.attention(asked, Attention(platform, **(LONG | change))) == kernel


@pytest.mark.parametrize("asked", ["auto", "megablox"])
def test_experts_have_a_kernel_on_tpus(asked: str) -> None:
    narrow = [kernel_choice.experts(asked, platform, jnp.bfloat16) for platform in ("cpu", "gpu", "tpu")]
    assert narrow == ["blocks", "blocks", "megablox"]
    assert kernel_choice.experts(asked, "tpu", jnp.float64) == "blocks"
    assert kernel_choice.experts("naive", "tpu", jnp.bfloat16) == "naive"


def test_the_names_of_the_table_are_those_of_the_config() -> None:
    for name in kernel_choice.ATTENTION:
        assert config.Model(attention_impl=name).attention_impl == name
