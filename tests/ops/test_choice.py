"""The table of kernels: which one runs, on which platform, for which call."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import pytest

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.ops.attention import kernels
from jaxlm.ops.attention.kernels import Call
from jaxlm.ops.moe import experts

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
    assert kernels.choose("auto", Call(platform, **(LONG | change))) == kernel


@pytest.mark.parametrize(
    ("asked", "platform", "change", "objection"),
    [
        ("splash", "tpu", {"length": 8}, ""),
        ("splash", "cpu", {}, "runs on tpu, not on cpu"),
        ("splash", "gpu", {}, "runs on tpu, not on gpu"),
        ("splash", "tpu", {"merged": True}, "no log-sum-exp"),
        ("splash", "tpu", {"dtype": jnp.float16}, "bfloat16 or float32"),
        ("cudnn", "gpu", {}, ""),
        ("cudnn", "tpu", {}, "runs on gpu, not on tpu"),
        ("cudnn", "gpu", {"softcap": True}, "no sinks and no soft cap"),
        ("cudnn", "gpu", {"head_dim": 100}, "head_dim = 100 is no multiple of 8"),
        ("cudnn", "gpu", {"length": 4097}, "rows of 4097 tokens are odd"),
        ("blockwise", "tpu", {}, ""),
        ("blockwise", "cpu", {"aligned": False}, "not the same tokens"),
        ("xla", "tpu", {}, ""),
        ("xla", "gpu", {"aligned": False}, ""),
    ],
)
def test_what_is_asked_for_is_taken_or_refused(
    asked: str, platform: str, change: dict[str, Any], objection: str
) -> None:
    call = Call(platform, **(LONG | change))
    if objection:
        with pytest.raises(UserError, match=f"model.attention_impl = '{asked}' does not apply here: .*{objection}"):
            kernels.choose(asked, call)
    else:
        assert kernels.choose(asked, call) == asked


def test_experts_have_a_kernel_on_tpus() -> None:
    narrow = [experts.choose("auto", platform, jnp.bfloat16) for platform in ("cpu", "gpu", "tpu")]
    assert narrow == ["blocks", "blocks", "megablox"]
    assert experts.choose("auto", "tpu", jnp.float64) == "blocks"
    assert experts.choose("naive", "tpu", jnp.bfloat16) == "naive"
    assert experts.choose("megablox", "tpu", jnp.bfloat16) == "megablox"
    for platform, dtype, why in (("gpu", jnp.bfloat16, "on tpu, not on gpu"), ("tpu", jnp.float64, "float32")):
        with pytest.raises(UserError, match=f"megablox.*{why}"):
            experts.choose("megablox", platform, dtype)


def test_the_names_of_the_table_are_those_of_the_config() -> None:
    for name in kernels.KERNELS:
        assert config.Model(attention_impl=name).attention_impl == name
