"""How many rows fit: one number bounds the memory of the cache, and no row is promised that is not there."""

from __future__ import annotations

import re

from jaxlm import config
from jaxlm.errors import UserError

UNBOUNDED = 4096
"""Tokens of a row of a model that says no length."""
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bytes_of(size: str | int, name: str) -> int:
    """Bytes of a number, or of one with K, M, G or T behind it (powers of 1,024).

    Raises:
        UserError: `size` is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", str(size).strip().upper())
    if found is None:
        raise UserError(f"{name} = {size!r} is no size", "write bytes, or a number with K, M or G: 512M")
    return int(float(found[1]) * _UNITS[found[2]])


def context_of(cfg: config.Model, asked: int) -> int:
    """Tokens of a row: as asked, else as many as the model was trained with.

    Raises:
        UserError: the model has fewer positions.
    """
    if asked < 0:
        raise UserError(f"context = {asked} must be positive")
    if asked > cfg.max_seq_len > 0 and cfg.positions in ("learned", "sinusoidal"):
        raise UserError(f"context = {asked}, the model has model.max_seq_len = {cfg.max_seq_len} positions")
    return asked or cfg.max_seq_len or UNBOUNDED


def rows_within(rows: int, memory: int | None, row_bytes: int, context: int) -> int:
    """Rows that fit into the memory, at most those asked for; None: all of them.

    Raises:
        UserError: not even one fits, or none is asked for.
    """
    if rows < 1:
        raise UserError(f"rows = {rows} must be positive")
    if memory is None:
        return rows
    if memory < row_bytes:
        raise UserError(
            f"cache_memory = {memory:,} bytes is less than one row of {context:,} tokens takes: {row_bytes:,}",
            "give more memory or a smaller context",
        )
    return min(rows, memory // row_bytes)
