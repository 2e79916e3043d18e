"""The tokenizer in the metadata of a GGUF file as a `tokenizer.json`, and its chat template.

Byte-level BPE comes with its merges; how a text is cut into words before that is only a name, `tokenizer.ggml.pre`.
The rules are those of the models' own `tokenizer.json` (and of llama.cpp's `unicode_regex_split`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxlm.errors import UserError, did_you_mean
from jaxlm.text import tokenizer_bin
from jaxlm.text.gguf_file import Head, read_head

KEY = "tokenizer.ggml"
_CONTROL, _USER_DEFINED = 3, 4
_GPT2, _SENTENCEPIECE = "gpt2", "llama"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(words: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": words}


_WORDS: dict[str, list[dict[str, Any]]] = {
    name: parts
    for names, parts in (
        (("gpt-2", "olmo"), [_byte_level(True)]),
        (
            ("smollm", "starcoder", "refact", "command-r", "codeshell"),
            [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
        ),
        (("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), [_split(_LLAMA3), _byte_level(False)]),
        (("qwen2", "deepseek-r1-qwen"), [_split(_QWEN2), _byte_level(False)]),
    )
    for name in names
}
"""`tokenizer.ggml.pre` to the parts of the pre-tokenizer."""


def tokenizer_json(head: Head) -> str:
    """The `tokenizer.json` of a GGUF file, as text.

    Raises:
        UserError: the metadata has no tokenizer, one that jaxlm does not know, or one that contradicts itself.
    """
    kind = head.get(f"{KEY}.model", str)
    tokens = _strings(head, "tokens")
    if len(set(tokens)) < len(tokens):
        raise UserError(f"{head.path}: {KEY}.tokens has {len(tokens)} entries, {len(set(tokens))} different ones")
    if kind == _SENTENCEPIECE:
        return _sentencepiece(head, tokens)
    if kind != _GPT2:
        raise UserError(f"{head.path}: a tokenizer of kind {kind!r}", f"jaxlm reads: {_GPT2}, {_SENTENCEPIECE}")
    words = head.get(f"{KEY}.pre", str)
    if words not in _WORDS:
        raise UserError(f"{head.path}: {KEY}.pre = {words!r}: unknown", did_you_mean(words, _WORDS))
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(head, tokens),
        "normalizer": {"type": "NFC"} if words in ("qwen2", "deepseek-r1-qwen") else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _WORDS[words]},
        "post_processor": _begin(head, tokens),
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": words in ("llama-bpe", "llama3", "llama-v3", "smaug-bpe"),
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": _merges(head, set(tokens)),
        },
    }
    return json.dumps(content, ensure_ascii=False)


def as_text(path: str | Path) -> str:
    """The `tokenizer.json` of the GGUF file at `path`, as text."""
    return tokenizer_json(read_head(path))


def side_files(head: Head) -> dict[str, bytes]:
    """What `transformers` knows of a tokenizer beside its `tokenizer.json`: special tokens, template, ends."""
    tokens = _strings(head, "tokens")
    ids = {
        name: head.get(f"{KEY}.{key}_token_id", int)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"{KEY}.{key}_token_id" in head.metadata
    }
    if wrong := next((name for name, token in ids.items() if not 0 <= token < len(tokens)), None):
        raise UserError(f"{head.path}: the {wrong} id {ids[wrong]} is outside the {len(tokens)} tokens")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[token] for name, token in ids.items()},
    }
    ends = {f"{name}_token_id": token for name, token in ids.items() if name != "unk"}
    files = {"tokenizer_config.json": _json(settings), "generation_config.json": _json(ends)}
    template = head.metadata.get("tokenizer.chat_template")
    return files | ({"chat_template.jinja": template.encode()} if isinstance(template, str) else {})


def _strings(head: Head, name: str) -> list[str]:
    found = head.get(f"{KEY}.{name}", list)
    if not found or not all(isinstance(one, str) for one in found):
        raise UserError(f"{head.path}: {KEY}.{name} is no list of texts")
    return found


def _kinds(head: Head, tokens: list[str]) -> list[int]:
    kinds = head.get(f"{KEY}.token_type", list, [1] * len(tokens))
    if len(kinds) != len(tokens):
        raise UserError(f"{head.path}: {len(tokens)} tokens and {len(kinds)} types of tokens")
    return kinds


def _added(head: Head, tokens: list[str]) -> list[dict[str, Any]]:
    """Control tokens, which are special, and tokens that a user added, which are not."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": number, "content": token, **flags, "special": kind == _CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, _kinds(head, tokens), strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _merges(head: Head, known: set[str]) -> list[list[str]]:
    merges = [merge.split(" ") for merge in _strings(head, "merges")]
    for pair in merges:
        if len(pair) != 2 or not known.issuperset((*pair, "".join(pair))):
            raise UserError(f"{head.path}: {KEY}.merges has {' '.join(pair)!r}, which joins no two tokens into a third")
    return merges


def _begin(head: Head, tokens: list[str]) -> dict[str, Any]:
    """The post-processor: begin of text before every text, if the file asks for it."""
    if not head.get(f"{KEY}.add_bos_token", bool, False):
        return _byte_level(True)
    number = head.get(f"{KEY}.bos_token_id", int)
    if not 0 <= number < len(tokens):
        raise UserError(f"{head.path}: the bos id {number} is outside the {len(tokens)} tokens")
    bos = tokens[number]
    begin, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }


def _sentencepiece(head: Head, tokens: list[str]) -> str:
    """A SentencePiece BPE vocabulary with scores, laid out as Llama's."""
    scores = head.get(f"{KEY}.scores", list)
    if len(scores) != len(tokens):
        raise UserError(f"{head.path}: {len(tokens)} tokens and {len(scores)} scores")
    pieces = [tokenizer_bin.Piece(text, float(score)) for text, score in zip(tokens, scores, strict=True)]
    tokenizer_bin.check(head.path, pieces)
    return json.dumps(tokenizer_bin.to_json(pieces), ensure_ascii=False)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
