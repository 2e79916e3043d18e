"""Paths as users write them: filled in, or refused before the first step; never another folder than the one meant."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config import Config, paths, toml
from jaxlm.errors import UserError

KEYS = [*paths.OUTPUTS, *(key for key in paths.INPUTS if key != "data.curriculum.scores")]


def value(config: Config, key: str) -> str:
    for name in key.split("."):
        config = getattr(config, name)
    return str(config)


@pytest.fixture
def file(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "tiny.toml"
    path.write_text("[model]\nn_layers = 1\n")
    return path


@pytest.mark.parametrize("key", KEYS)
def test_home_and_variables_are_filled_in_and_the_rest_is_refused(file, monkeypatch, key):
    monkeypatch.setenv("PLACE", "/somewhere")
    monkeypatch.delenv("UNSET", raising=False)
    assert value(toml.load(file, [f"{key}=~/x"]), key) == os.path.expanduser("~/x")
    assert value(toml.load(file, [f"{key}=$PLACE/x"]), key) == "/somewhere/x"
    assert value(toml.load(file, [f"{key}=${{PLACE}}/x"]), key) == "/somewhere/x"
    for bad, words in (
        ("$UNSET/x", "UNSET is not set"),
        ("gs://bucket/run", "not a path of this machine"),
        ("s3:/bucket", "not a path of this machine"),
        ("~nobody_of_this_name/x", "no such user"),
        ("", f"{key} is empty"),
        ("  ", f"{key} is empty"),
        ("a\x07b", "characters"),
    ):
        with pytest.raises(UserError, match=words):
            toml.load(file, [f"{key}={bad}"])
        if bad:
            section, _, name = key.rpartition(".")
            text = f"{name} = {toml.tomli_w.dumps({'v': bad})[4:]}"
            (file.parent / "bad.toml").write_text(f"[{section}]\n{text}" if section else text)
            if bad.strip():
                with pytest.raises(UserError, match=words):
                    toml.load(file.parent / "bad.toml")


def test_none_can_be_asked_for_and_a_corpus_is_always_named(file):
    assert toml.load(file, ['train.init_from=""']).train.init_from == ""
    for key in ("source", "cache_dir"):
        with pytest.raises(UserError, match=f"data.{key} is empty"):
            toml.load(file, [f'data.{key}=""'])


def test_a_path_of_a_file_is_looked_for_beside_it_too(file, tmp_path):
    (file.parent / "words.txt").write_text("words")
    file.write_text('out_dir = "runs/x"\n[data]\nsource = "words.txt"\n[tokenizer]\npath = "absent.json"\n')
    config = toml.load(file)
    assert Path(config.data.source) == file.parent / "words.txt"
    assert (config.out_dir, config.tokenizer.path) == ("runs/x", "absent.json")
    (tmp_path / "words.txt").write_text("of the current folder")
    assert toml.load(file).data.source == "words.txt"


@pytest.mark.parametrize("text", ["20241128", "1_1_1", "true", "2024-01-01", "1e5", "[a]", "0x10"])
def test_text_options_take_any_word_as_it_is_written(file, text):
    config = toml.load(file, [f"out_dir={text}", f"log.wandb={text}"])
    assert (config.out_dir, config.log.wandb) == (text, text)


def test_a_moved_run_goes_on_where_it_lies(file, tmp_path):
    run, old = tmp_path / "new", tmp_path / "old"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.toml").write_text('out_dir = "old"\n')

    def resumed(*overrides: str) -> str:
        config = toml.load(run / "config.toml", overrides)
        names = {override.partition("=")[0] for override in overrides}
        return paths.of_moved_run(config, run / "config.toml", names).out_dir

    assert Path(resumed()) == run
    assert resumed("out_dir=third") == "third"
    (old / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="another run"):
        resumed()
    config = toml.load(file)
    assert paths.of_moved_run(config, file, ()) == config


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("~$/.: -[]{}*?abHOME=é\"'\\\n\x00#1"), max_size=12), key=st.sampled_from(KEYS))
def test_any_text_is_a_path_or_refused_in_a_line(tmp_path_factory, text, key):
    path = tmp_path_factory.getbasetemp() / "drawn.toml"
    path.write_text("")
    try:
        found = value(toml.load(path, [f"{key}={text}"]), key)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert not found.startswith("~") or os.path.exists(found), found
    assert "://" not in found
