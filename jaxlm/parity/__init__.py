"""The proof that jaxlm and torch_ref compute the same model, as a library and behind `jaxlm parity`.

from jaxlm.parity import assert_parity, check
"""

from __future__ import annotations

from jaxlm.parity.check import assert_parity, check
from jaxlm.parity.golden.write_and_check import assert_golden, check_golden, write_golden
from jaxlm.parity.report import Report

__all__ = ["Report", "assert_golden", "assert_parity", "check", "check_golden", "write_golden"]
