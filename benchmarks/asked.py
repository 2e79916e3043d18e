"""Types of the options of benchmarks: a value that cannot be measured is refused before anything is, with exit code 2.

parser.add_argument("--only", type=listed(FIGURES), default=[*FIGURES])
parser.add_argument("--rounds", type=positive, default=3)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable


def listed(known: Iterable[object], separator: str = ",") -> Callable[[str], list[str]]:
    """A list of some of these names."""
    names = [str(name) for name in known]

    def names_of(text: str) -> list[str]:
        asked = [name.strip() for name in text.split(separator) if name.strip()]
        unknown = [name for name in asked if name not in names]
        if unknown or not asked:
            problem = f"there is no {unknown[0]!r}" if unknown else "it names nothing"
            raise argparse.ArgumentTypeError(f"{problem}; there are: {f'{separator} '.join(names)}")
        return asked

    return names_of


def positive(text: str) -> int:
    """A whole number above 0."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def seeds(text: str) -> list[int]:
    """Whole numbers from 0 on, as 0,1,2."""
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds, such as 0,1,2")
    return [int(number) for number in numbers]


def minutes(text: str) -> float:
    """A time of 0 or more; `inf` is one."""
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not time >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes")
    return time
