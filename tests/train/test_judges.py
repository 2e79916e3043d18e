"""What a validation says in words."""

from __future__ import annotations

import pytest

from jaxlm.train.judges import against_unigram


@pytest.mark.parametrize(("loss", "words"), [(1.5, "25% below"), (2.0, "0% below"), (3.0, "50% above")])
def test_a_loss_lies_below_or_above_the_unigram_model(loss: float, words: str) -> None:
    assert against_unigram(loss, 2.0) == f"{words} the unigram model"
