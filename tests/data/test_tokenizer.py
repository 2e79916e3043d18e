"""Every text comes back exactly, and text never becomes a special token unasked."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.errors import UserError
from jaxlm.text.inspection import inspect
from jaxlm.text.tokenizer import SPECIALS, Tokenizer, check_fits

SHARED = Path(os.environ.get("JAXLM_DATA", Path(__file__).parents[3] / "shared" / "data"))
TEXTS = ["def f(x):\n    return x + 1\n", "Ein Löwe, 1234567 Tage.\r\n\t\t", "日本語 🎉\x00\x7f\ufeff"] * 20


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module", params=["bpe", "bytes"])
def tokenizer(request, bpe) -> Tokenizer:
    return bpe if request.param == "bpe" else Tokenizer.bytes_level()


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.lists(st.sampled_from([*SPECIALS, " ", "\n", "é", "\r"])).map("".join))
def test_text_comes_back_exactly_and_is_never_special(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text
    assert not set(ids) & set(tokenizer.specials.values())


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 271)))
def test_stream_agrees_with_decode_on_any_ids(tokenizer, ids):
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)
    skipped = "".join(tokenizer.decode_stream(ids, skip_special=True))
    assert skipped == tokenizer.decode(ids, skip_special=True)


def test_stream_holds_back_incomplete_characters():
    tokenizer = Tokenizer.bytes_level()
    assert list(tokenizer.decode_stream("aé🎉".encode())) == ["a", "é", "🎉"]
    assert list(tokenizer.decode_stream("é".encode()[:1])) == ["\ufffd"]


def test_stream_of_a_tokenizer_that_is_not_byte_level(tmp_path):
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models

    vocab = {"a": 0, "<0xC3>": 1, "<0xA9>": 2}
    inner = Inner(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(inner)
    assert not tokenizer.is_byte_level
    # A run of bytes that goes wrong later is wrong as a whole, so it is shown when it has ended.
    assert list(tokenizer.decode_stream([0, 1, 2, 0])) == ["a", "éa"]
    assert list(tokenizer.decode_stream([0, 1, 2, 1])) == ["a", tokenizer.decode([1, 2, 1])]
    assert "".join(tokenizer.decode_stream([0, 1])) == tokenizer.decode([0, 1])


def test_specials_are_the_highest_ids_and_prompts_may_spell_them(bpe):
    size = bpe.vocab_size
    assert sorted(bpe.specials.values()) == list(range(size - len(SPECIALS), size - 6))
    assert bpe.encode("<|user|>", allow_special=True) == [bpe.special("user")]
    assert bpe.eot == bpe.special("eot") and bpe.pad == bpe.special("pad")
    assert bpe.decode([bpe.eot], skip_special=True) == ""


def test_bytes_are_their_values():
    plain = Tokenizer.bytes_level(specials=False)
    assert plain.vocab_size == 256 and plain.eot is None and plain.pad == 0
    text = "".join(map(chr, range(300)))
    assert bytes(plain.encode(text)) == text.encode()
    assert [plain.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert Tokenizer.bytes_level().vocab_size == 256 + len(SPECIALS)
    with pytest.raises(UserError, match="no token 'fim_prefix'"):
        plain.special("fim_prefix")


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.specials == tokenizer.specials
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert loaded.decode_batch(loaded.encode_batch(TEXTS)) == TEXTS
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_training_is_deterministic_and_compresses(bpe):
    assert Tokenizer.train(TEXTS, 400).fingerprint() == bpe.fingerprint()
    assert Tokenizer.train(TEXTS, 300).fingerprint() != bpe.fingerprint()
    assert bpe.vocab_size <= 400
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_truncation_and_padding_of_a_file_are_switched_off(bpe, tmp_path):
    from tokenizers import Tokenizer as Inner

    inner = Inner.from_str(bpe.to_json())
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    inner.save(str(tmp_path / "t.json"))
    assert Tokenizer.from_file(tmp_path / "t.json").encode(TEXTS[0]) == bpe.encode(TEXTS[0])


def test_unmarked_control_tokens_of_a_file_are_plain_text_too(tmp_path):
    from tokenizers import Tokenizer as Inner

    inner = Inner.from_str(Tokenizer.bytes_level(specials=False).to_json())
    inner.add_tokens(["<|User|>", "    "])
    tokenizer = Tokenizer(inner)
    assert tokenizer.encode("<|User|>") == list(b"<|User|>")
    assert tokenizer.encode("<|User|>", allow_special=True) == [256]
    assert tokenizer.encode("    x") == [257, ord("x")]


def test_mistakes_are_one_line(tmp_path, bpe):
    with pytest.raises(UserError, match="no such tokenizer file"):
        Tokenizer.from_file(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json: not a tokenizer\.json") as caught:
        Tokenizer.from_file(tmp_path / "bad.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="too small"):
        Tokenizer.train([], 271)
    with pytest.raises(UserError, match="the model only"):
        check_fits(bpe, bpe.vocab_size - 1)
    check_fits(bpe, bpe.vocab_size)


def test_inspect_describes_a_run_folder(bpe, tmp_path):
    from rich.console import Console

    bpe.save(tmp_path / "tokenizer.json")
    report = inspect(tmp_path, "def f é")
    assert report.round_trip and b"".join(report.pieces).decode() == "def f é"
    console = Console(record=True, width=100)
    console.print(report)
    assert "round trip" in console.export_text()


def test_gpt2():
    path = SHARED / "tokenizers" / "gpt2" / "tokenizer.json"
    if not path.is_file():
        pytest.skip("GPT-2's tokenizer.json is not in JAXLM_DATA")
    tokenizer = Tokenizer.from_file(path)
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.eot not in tokenizer.encode("<|endoftext|>")
