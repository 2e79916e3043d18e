"""What stands beside a tokenizer.json decides about ids as well, and streaming costs the same at every length."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.convert.files.side_files import carried
from jaxlm.errors import UserError
from jaxlm.text.beside import read_beside
from jaxlm.text.completion import complete, encode_prompts
from jaxlm.text.tokenizer import TextStream, Tokenizer, check_fits, check_usable

CHARS = [*"abcdefghij", "Ġ", "Ċ"]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def folder(path: Path, specials: list[str], **files) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [{"id": len(CHARS) + i, "content": word, **FLAGS} for i, word in enumerate(specials)]
    bpe = {"type": "BPE", "vocab": {c: i for i, c in enumerate(CHARS)}, "merges": []}
    tokenizer = {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": bpe}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def opened(path: Path) -> Tokenizer:
    return Tokenizer.from_file(path / "tokenizer.json")


DECODER = {"13": {"content": "<|im_end|>", **FLAGS}, "12": {"content": "<|endoftext|>", **FLAGS}}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": DECODER}},
        {"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}, "added_tokens": {"<|im_end|>": 13}},
        {"special_tokens_map": {"eos_token": "<|im_end|>"}, "added_tokens": {"<|im_end|>": 13}},
    ],
)
def test_special_tokens_beside_have_the_ids_of_transformers(tmp_path, files):
    path = folder(tmp_path / "t", ["<|endoftext|>"], **files)
    tokenizer = opened(path)
    assert encode_prompts(tokenizer, ["abc<|im_end|>"]) == [[0, 1, 2, 13]]
    assert (tokenizer.eot, tokenizer.vocab_size) == (13, 14)
    assert tokenizer.encode("ab") == [0, 1]
    saved = tmp_path / "run" / "tokenizer.json"
    saved.parent.mkdir()
    tokenizer.save(saved)
    again = Tokenizer.from_file(saved)
    assert (again.eot, again.fingerprint()) == (13, tokenizer.fingerprint())
    assert encode_prompts(again, ["abc<|im_end|>"]) == [[0, 1, 2, 13]]


def test_transformers_agrees(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": DECODER,
    }
    path = folder(tmp_path / "t", ["<|endoftext|>"], tokenizer_config=settings)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    ours = opened(path)
    for text in ("abc<|im_end|>", "<|endoftext|>a", "a b<|im_end|>j"):
        assert encode_prompts(ours, [text])[0] == theirs(text).input_ids
    assert (ours.eot, ours.vocab_size) == (theirs.eos_token_id, len(theirs))


def test_an_end_of_another_name(tmp_path):
    assert opened(folder(tmp_path / "a", ["<EOT>"])).eot is None
    assert opened(folder(tmp_path / "b", ["<EOT>"], tokenizer_config={"eos_token": "<EOT>"})).eot == 12


@pytest.mark.parametrize("name", ["generation_config", "config"])
def test_a_list_of_ends(tmp_path, name):
    path = folder(tmp_path / "t", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], **{name: {"eos_token_id": [14, 12]}})
    tokenizer = opened(path)
    assert tokenizer.ends == {12, 14}
    assert complete(iter([[[1, 2, 14, 3]]]), tokenizer, ["a"])[0].text == "bc"
    assert json.loads(carried(path)["generation_config.json"])["eos_token_id"] == [14, 12]


def test_one_added_token_more_than_rows(tmp_path, caplog):
    tokenizer = opened(folder(tmp_path / "t", ["<|endoftext|>", "<pad>"]))
    check_usable(tokenizer, 13)
    assert "<pad>" in caplog.text and (tokenizer.pad, tokenizer.eot) == (12, 12)
    with pytest.raises(UserError, match="14 ids"):
        check_fits(tokenizer, 13)
    with pytest.raises(UserError, match="14 ids"):
        check_usable(tokenizer, 5)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["tokenizer_config", "added_tokens", "special_tokens_map", "generation_config", "config"]),
    content=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just("<|im_end|>"),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["eos_token", "content", "added_tokens_decoder", "12", "13", "eos_token_id", "x", "special"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ),
)
def test_any_file_beside_is_read_or_refused_in_a_line(tmp_path_factory, name, content):
    path = folder(tmp_path_factory.mktemp("t"), ["<|endoftext|>"], **{name: content})
    try:
        tokenizer = opened(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert tokenizer.encode("abc") == [0, 1, 2]
    assert all(end >= 0 for end in tokenizer.ends)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b"[" * 100_000])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not"):
        read_beside(tmp_path)


def sentencepiece() -> Tokenizer:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models

    pieces = ["▁", "▁a", "b", "▁cd", "e", "\n", *(f"<0x{byte:02X}>" for byte in (0xC3, 0xA9, 0xFF, 0x41))]
    inner = Inner(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(inner)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 9), max_size=80), before=st.lists(st.integers(0, 9), max_size=30))
def test_the_stream_of_any_ids_is_what_decode_adds(ids, before):
    tokenizer = sentencepiece()
    stream = TextStream(tokenizer, after=before)
    text = "".join([*map(stream.push, ids), stream.flush()])
    whole, first = tokenizer.decode(before + ids), tokenizer.decode(before)
    assert text == whole[len(first) :]


def test_streaming_does_not_grow_with_the_text():
    tokenizer = sentencepiece()

    def longest_window(count: int) -> int:
        stream = TextStream(tokenizer)
        longest = 0
        for number in range(count):
            stream.push(number % 6)
            longest = max(longest, len(stream._ids))
        return longest

    assert longest_window(2000) == longest_window(200) < 30
    began = time.process_time()
    longest_window(8000)
    assert time.process_time() - began < 5
