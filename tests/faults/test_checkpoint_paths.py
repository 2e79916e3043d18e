"""A whole checkpoint is never called damaged: whatever the path, and while the run goes on saving."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm import config
from jaxlm.errors import UserError
from jaxlm.train.checkpoint import Checkpointer
from jaxlm.train.optim import make_optimizer
from jaxlm.train.step import init_state


def make_state(step: int):
    params = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3) + step}}
    return init_state(params, make_optimizer(config.Train()))._replace(step=jnp.asarray(step, jnp.int32))


@pytest.mark.parametrize("name", ["x[1]", "[lr=3e-4]run", "a*b?", "-dash é 実", "a\\b"])
def test_any_legal_path(tmp_path, name):
    run = tmp_path / name
    checkpointer = Checkpointer(run)
    checkpointer.save(make_state(1), {"data": 1})
    checkpointer.close()
    assert (run / "checkpoints" / "1").is_dir()
    state, record = Checkpointer(run).restore(make_state(0), pytest.fail)
    assert record["data"] == 1
    np.testing.assert_array_equal(state.params["a"]["kernel"], make_state(1).params["a"]["kernel"])
    reader = Checkpointer(run, read_only=True)
    like = {"a": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
    np.testing.assert_array_equal(np.asarray(reader.stored_params(like)["a"]["kernel"])[0], [1, 2, 3])


def test_a_reader_takes_the_next_one_when_its_own_was_replaced(tmp_path):
    writer = Checkpointer(tmp_path, keep=1)
    writer.save(make_state(1), {})
    writer.wait()
    reader = Checkpointer(tmp_path, read_only=True)
    stored = Checkpointer(tmp_path, read_only=True).stored_params(make_state(0).params)
    assert reader.steps() == [1]
    writer.save(make_state(2), {})
    writer.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal()] == ["2"]
    params = reader.restore_params(make_state(0).params, pytest.fail)
    np.testing.assert_array_equal(params["a"]["kernel"], make_state(2).params["a"]["kernel"])
    with pytest.raises(UserError, match="was replaced while it was read"):
        np.asarray(stored["a"]["kernel"])


def test_what_is_half_deleted_is_not_called_damaged(tmp_path):
    """Orbax deletes file by file, and only what a newer checkpoint follows."""
    writer = Checkpointer(tmp_path, keep=2)
    writer.save(make_state(1), {})
    writer.wait()
    reader, slow = (Checkpointer(tmp_path, read_only=True) for _ in range(2))
    like = make_state(0).params
    stored = slow.stored_params(like)
    writer.save(make_state(2), {})
    writer.close()
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "params")
    params = reader.restore_params(like, pytest.fail)
    np.testing.assert_array_equal(params["a"]["kernel"], make_state(2).params["a"]["kernel"])
    with pytest.raises(UserError, match="1 was replaced while it was read"):
        np.asarray(stored["a"]["kernel"])
    damage = []
    with pytest.raises(UserError, match="no intact checkpoint"):
        Checkpointer(tmp_path, read_only=True).restore_params(like, damage.append, step=1)
    assert len(damage) == 1 and "1 is damaged: " in damage[0], "damage of an older one is damage, and said once"


@settings(max_examples=25, deadline=None)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters="/\x00", exclude_categories=["Cc"]), min_size=1)
    .map(lambda text: text.encode()[:80].decode(errors="ignore"))
    .filter(lambda text: text.strip() not in ("", ".", ".."))
)
def test_a_drawn_name_is_a_folder_like_others(tmp_path_factory, name):
    run = tmp_path_factory.mktemp("drawn") / name
    writer = Checkpointer(run)
    writer.save(make_state(1), {"name": name})
    writer.close()
    reader = Checkpointer(run, read_only=True)
    assert reader.steps() == [1]
    params = reader.restore_params(make_state(0).params, pytest.fail)
    np.testing.assert_array_equal(params["a"]["kernel"], make_state(1).params["a"]["kernel"])
