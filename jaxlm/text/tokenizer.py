"""Text to token ids and back: byte-level BPE trained here, plain bytes, or any `tokenizer.json`.

One class around the `tokenizers` library serves all three, because a byte-level BPE without merges is the plain bytes.
A text is data: unless asked otherwise, the spelling of a special token inside it is encoded as ordinary characters,
never as the special id.
"""
# ruff: noqa: RUF001 (DeepSeek spells its special tokens with a full-width bar)

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.errors import UserError
from jaxlm.text import gguf_tokenizer, tokenizer_bin
from jaxlm.text.beside import Beside, read_beside
from jaxlm.text.stream import TextStream as TextStream

if TYPE_CHECKING:
    import tokenizers

_log = logging.getLogger(__name__)

RESERVED = 6
"""Special tokens without a meaning yet, so that a later use does not change the vocabulary."""

SPELLINGS: dict[str, tuple[str, ...]] = {
    # Ours first, then the usual spellings in other people's tokenizers.
    "eot": ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "[EOS]"),
    "pad": ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>"),
    "fim_prefix": ("<|fim_prefix|>", "<fim_prefix>", "<｜fim▁begin｜>"),
    "fim_middle": ("<|fim_middle|>", "<fim_middle>", "<｜fim▁end｜>"),
    "fim_suffix": ("<|fim_suffix|>", "<fim_suffix>", "<｜fim▁hole｜>"),
    "system": ("<|system|>",),
    "user": ("<|user|>", "<｜User｜>"),
    "assistant": ("<|assistant|>", "<｜Assistant｜>"),
    "tool": ("<|tool|>", "<｜tool▁output▁begin｜>"),
    "end_of_turn": ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"),
}
SPECIALS = (*(spellings[0] for spellings in SPELLINGS.values()), *(f"<|reserved_{i}|>" for i in range(RESERVED)))
"""Spellings of the special tokens of a tokenizer made here, in the order of their ids (the highest ones)."""

# Words are cut as in Llama 3 (the cl100k rule): contractions, letters, up to three digits, symbols, line ends, spaces.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back.

    Tokenizers made by `train` and `bytes_level` return every text exactly: there is no normaliser and no prefix space.

    Attributes:
        specials: name (`eot`, `pad`, `fim_prefix`, ..., see `SPELLINGS`) to id, for those that the vocabulary has.
    """

    def __init__(self, inner: tokenizers.Tokenizer, beside: Beside | None = None) -> None:
        inner.no_truncation()
        inner.no_padding()
        beside = beside or Beside()
        _add(inner, beside)
        self._inner, self._beside = inner, beside
        self.specials: dict[str, int] = {}
        for name, spellings in SPELLINGS.items():
            for spelling in spellings:
                if (token := inner.token_to_id(spelling)) is not None:
                    self.specials[name] = token
                    break
        self._by_spelling = dict(self.specials)
        for name, spelling in (("eot", beside.eos), ("pad", beside.pad)):
            if spelling and (token := inner.token_to_id(spelling)) is not None:
                self.specials[name] = token

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, specials: bool = True) -> Tokenizer:
        """Train byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) to at most `vocab_size` ids.

        The special tokens count and come last.

        Raises:
            UserError: `vocab_size` has no room for the 256 bytes and the special tokens.
        """
        from tokenizers import models, pre_tokenizers, trainers

        learned = vocab_size - (len(SPECIALS) if specials else 0)
        if learned < 256:
            least = 256 + vocab_size - learned
            raise UserError(
                f"tokenizer.vocab_size = {vocab_size} is too small", f"at least {least}: 256 bytes and the specials"
            )
        inner = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=learned, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        inner.train_from_iterator(texts, trainer)
        return cls._with_specials(inner, specials)

    @classmethod
    def bytes_level(cls, *, specials: bool = True) -> Tokenizer:
        """One id a byte: ids 0 to 255 are the byte values, special tokens follow."""
        from tokenizers import models

        inner = _byte_level(models.BPE(vocab=_byte_alphabet(), merges=[]), words=False)
        return cls._with_specials(inner, specials)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read any `tokenizer.json` with what lies beside it, a `tokenizer.bin` of llama2.c, or that of a GGUF file.

        Raises:
            UserError: the file is missing or no tokenizer.
        """
        from tokenizers import Tokenizer as Inner

        if not Path(path).is_file():
            raise UserError(f"{path}: no such tokenizer file", "tokenizer.path names a tokenizer.json")
        if Path(path).suffix == ".bin":
            return cls(Inner.from_str(tokenizer_bin.as_text(path)))
        if Path(path).suffix == ".gguf":
            return cls(Inner.from_str(gguf_tokenizer.as_text(path)))
        beside = read_beside(Path(path).parent) if Path(path).name == "tokenizer.json" else None
        try:
            return cls(Inner.from_file(str(path)), beside)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{path}: not a tokenizer.json: {str(error).splitlines()[0]}") from error

    @classmethod
    def _with_specials(cls, inner: tokenizers.Tokenizer, specials: bool) -> Tokenizer:
        if specials:
            inner.add_special_tokens(list(SPECIALS))
        return cls(inner)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id: the rows that an embedding needs."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eot(self) -> int | None:
        """Id of end of text, which follows every document; None when the tokenizer has none."""
        return self.specials.get("eot")

    @property
    def ends(self) -> frozenset[int]:
        """Ids that end a generated text: end of text, begin of another one, and those of `generation_config.json`."""
        return frozenset(token for token in (self.eot, self.bos, *self._beside.ends) if token is not None)

    @functools.cached_property
    def bos(self) -> int | None:
        """Id that the post-processor puts before every text, Llama's `<s> $A`; None when it puts none there."""
        encoding = self._inner.encode("a", add_special_tokens=True)
        return encoding.ids[0] if encoding.special_tokens_mask[:1] == [1] else None

    @property
    def pad(self) -> int:
        """Id that fills unused places: padding, else end of text, else 0. It always has weight 0."""
        return self.specials.get("pad", self.specials.get("eot", 0))

    def special(self, name: str) -> int:
        """Id of the special token `name`.

        Raises:
            UserError: this tokenizer has none.
        """
        if name not in self.specials:
            raise UserError(f"the tokenizer has no token {name!r}", f"it has: {', '.join(self.specials) or 'none'}")
        return self.specials[name]

    def id_of(self, *spellings: str) -> int | None:
        """Id of the first of these spellings that is a special token; None when none is."""
        ids = (self._inner.token_to_id(spelling) for spelling in spellings)
        return next((token for token in ids if token in self._added), None)

    def with_fim_marks(self) -> Tokenizer:
        """This tokenizer with the three marks of fill-in-the-middle, and end of text, behind its vocabulary.

        Those that it has keep their ids.
        """
        from tokenizers import Tokenizer as Inner

        inner = Inner.from_str(self._inner.to_str())
        names = ("eot", "fim_prefix", "fim_middle", "fim_suffix")
        inner.add_special_tokens([SPELLINGS[name][0] for name in names if name not in self.specials])
        return Tokenizer(inner)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text; `allow_special` (for prompts) turns the spelling of a special token into its id."""
        return self.encode_batch([text], allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Ids of many texts, in parallel threads outside the interpreter lock."""
        inner = self._inner if allow_special else self._literal
        return [encoding.ids for encoding in inner.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_offsets(self, text: str, *, allow_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and which characters each of them stands for, spaces in front included."""
        encoding = self._untrimmed[allow_special].encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode(list(ids), skip_special_tokens=skip_special)

    def decode_batch(self, batch: Sequence[Sequence[int]], *, skip_special: bool = False) -> list[str]:
        """Texts of many lists of ids."""
        return self._inner.decode_batch([list(ids) for ids in batch], skip_special_tokens=skip_special)

    def decode_stream(self, ids: Iterable[int], *, skip_special: bool = False) -> Iterator[str]:
        """Text as the ids arrive, in complete characters; together the parts are `decode` of all ids."""
        stream = TextStream(self, skip_special=skip_special)
        for token in ids:
            if part := stream.push(token):
                yield part
        if part := stream.flush():
            yield part

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for (the spelling, for a special token); empty for an unknown id."""
        spelling = self._inner.id_to_token(token)
        if spelling is None:
            return b""
        table = _byte_alphabet()
        if not self.is_byte_level or any(c not in table for c in spelling):
            return spelling.encode()
        return bytes(table[c] for c in spelling)

    @functools.cached_property
    def is_byte_level(self) -> bool:
        """Whether ids are plain byte strings (GPT-2's alphabet), so that they can be decoded one by one."""
        return type(self._inner.decoder).__name__ == "ByteLevel"

    @functools.cached_property
    def fallback_ids(self) -> frozenset[int]:
        """Ids of single bytes beside ordinary pieces, `<0x0A>`."""
        found = (self._inner.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token for token in found if token is not None)

    @functools.cached_property
    def cuts_at_lines(self) -> bool:
        """Whether the lines of a text may be encoded one by one; SentencePiece puts a space before each text."""
        return self.encode("a\na") == [*self.encode("a\n"), *self.encode("a")]

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `skip_special` leaves out."""
        return frozenset(i for i, added in self._added.items() if added.special)

    def added_beyond(self, vocab_size: int) -> list[str]:
        """Added tokens whose ids are `vocab_size` or more."""
        return [added.content for number, added in sorted(self._added.items()) if number >= vocab_size]

    @functools.cached_property
    def _added(self) -> dict[int, Any]:
        return self._inner.get_added_tokens_decoder()

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """A copy for documents, which reads the spelling of special tokens as plain characters."""
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Inner

        copy = Inner.from_str(self._inner.to_str())
        # Some public files leave role and FIM markers unmarked (DeepSeek's do). Runs of spaces stay as they are.
        unmarked = [t.content for t in self._added.values() if not t.special and t.content[:1] in ("<", "[")]
        copy.add_special_tokens([AddedToken(content, special=True) for content in unmarked])
        copy.encode_special_tokens = True
        return copy

    @functools.cached_property
    def _untrimmed(self) -> dict[bool, tokenizers.Tokenizer]:
        """Copies whose offsets count the spaces of a token too."""
        from tokenizers import Tokenizer as Inner
        from tokenizers import processors

        literal, whole = (Inner.from_str(one.to_str()) for one in (self._literal, self._inner))
        literal.encode_special_tokens = True
        for copy in (literal, whole) if self.is_byte_level else ():
            copy.post_processor = processors.ByteLevel(trim_offsets=False)  # pyright: ignore[reportAttributeAccessIssue]
        return {False: literal, True: whole}

    @functools.cached_property
    def special_spellings(self) -> frozenset[str]:
        """Spellings of the ids that `skip_special` leaves out."""
        return frozenset(added.content for added in self._added.values() if added.special)

    def to_json(self) -> str:
        """The `tokenizer.json` as text."""
        return self._inner.to_str(pretty=True)

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `from_file` and `transformers` read; the file appears whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(self.to_json(), encoding="utf-8")
            temporary.replace(path)
            if path.name == "tokenizer.json" and self.specials != self._by_spelling:
                words = {"eot": "eos_token", "pad": "pad_token"}
                named = {
                    words[name]: self._inner.id_to_token(self.specials[name]) for name in words if name in self.specials
                }
                settings = {
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "clean_up_tokenization_spaces": False,
                    **named,
                }
                path.with_name("tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        finally:
            temporary.unlink(missing_ok=True)

    @functools.cached_property
    def _fingerprint(self) -> str:
        named = json.dumps(self.specials) if self.specials != self._by_spelling else ""
        return hashlib.sha256((self._inner.to_str() + named).encode()).hexdigest()

    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides the ids."""
        return self._fingerprint


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `UserError` when the tokenizer has ids that a model with `vocab_size` rows does not know."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model only model.vocab_size = {vocab_size}",
            "use the tokenizer that the model was trained with, or a larger model.vocab_size",
        )


def check_usable(tokenizer: Tokenizer, vocab_size: int) -> None:
    """As `check_fits`, but added tokens may have no row in the model: a warning, and a text that has one is refused.

    Raises:
        UserError: ordinary tokens have no row either.
    """
    beyond = tokenizer.added_beyond(vocab_size)
    if tokenizer.vocab_size - len(beyond) > vocab_size:
        check_fits(tokenizer, vocab_size)
    if beyond:
        words, rows = ", ".join(beyond[:3]), f"the model has model.vocab_size = {vocab_size} rows"
        _log.warning("warning: %d added tokens (%s) are beyond: %s", len(beyond), words, rows)
        tokenizer.specials = {name: token for name, token in tokenizer.specials.items() if token < vocab_size}


def _add(inner: tokenizers.Tokenizer, beside: Beside) -> None:
    """Add the tokens that only the files beside a tokenizer.json name, in the order of their ids."""
    from tokenizers import AddedToken

    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    for content, flags in beside.added:
        if content not in known:
            added = AddedToken(content, **{**flags, "special": bool(flags.get("special"))})
            (inner.add_special_tokens if flags.get("special") else inner.add_tokens)([added])


def _byte_level(model: Any, *, words: bool = True) -> tokenizers.Tokenizer:
    from tokenizers import Regex, decoders, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    inner = Inner(model)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes]) if words else to_bytes  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return inner


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Printable character to the byte it stands for in byte-level BPE (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    table = {byte: chr(256 + i) for i, byte in enumerate(others)} | {byte: chr(byte) for byte in printable}
    return {table[byte]: byte for byte in range(256)}
