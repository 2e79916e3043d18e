"""One golden file for both frameworks: what jaxlm has written, torch_ref computes, and the other way round."""

from __future__ import annotations

from pathlib import Path

from jaxlm import config
from jaxlm.convert.open_model import Model
from jaxlm.parity import check_golden, write_golden
from jaxlm.parity.inputs import random_params

MODEL = config.Model(
    vocab_size=97, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=24, max_seq_len=64, positions="learned"
)


def test_the_other_framework_checks(tmp_path: Path) -> None:
    model = Model(config.Config(model=MODEL, data=config.Data(seq_len=64)), random_params(MODEL), None, "run")
    for number, (writer, reader) in enumerate([("jaxlm", "torch"), ("torch", "jaxlm")]):
        path = tmp_path / f"{number}.json.gz"
        write_golden(model, path, computed_by=writer, dtypes=("float64", "float32"))
        report = check_golden(model, path, computed_by=reader)
        assert report.same, report.verdict
        assert report.levels == [
            "config",
            "weights",
            "forward",
            "loss",
            "gradients",
            "update 1",
            "update 20",
            "generation",
        ]
        assert 0 < max(one.error for one in report.findings if one.dtype == "float64") < 1e-12
