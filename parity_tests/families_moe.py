"""Examples of the families with experts."""

from __future__ import annotations

from parity_tests.families import Example

EXAMPLES: tuple[Example, ...] = ()
