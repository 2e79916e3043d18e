"""What a validation says in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from jaxlm.train.judges import language_judge


@pytest.mark.parametrize(("loss", "words"), [(1.5, "25% below"), (2.0, "0% below"), (3.0, "50% above")])
def test_a_loss_lies_below_or_above_the_unigram_model(loss: float, words: str) -> None:
    statistics = {"validation": SimpleNamespace(bytes_per_token=2.0)}
    source: Any = SimpleNamespace(corpus=SimpleNamespace(statistics=statistics, unigram_entropy=2.0))
    judge = language_judge(source)
    assert judge.describe is not None
    assert judge.describe({"validation_loss": loss}).endswith(f"{words} the unigram model")
