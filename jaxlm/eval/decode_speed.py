"""How fast a run decodes and what it is made of, measured in a process of its own.

python -m jaxlm.eval.decode_speed runs/compare/dense
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

PROMPT, NEW, TRIES = 16, 128, 5


def decode_speed(run: Path) -> dict[str, Any]:
    """Counts of a run's model, and its greedy decoding of one row after a prompt of 16 tokens, in tokens a second.

    The median of five; the prompt is part of the time, compilation is not.

    Raises:
        UserError: `run` holds no model, or one that has too few positions.
    """
    from jaxlm.counts.parameters import account
    from jaxlm.infer.generate import generate, unrolled_for_decoding
    from jaxlm.infer.load import load
    from jaxlm.processes.compile_cache import enable_compilation_cache
    from jaxlm.text.sampling import GREEDY

    model = load(run)
    cfg = model.config
    enable_compilation_cache(cfg.data.cache_dir)
    decoder, params = unrolled_for_decoding(model.decoder, model.params)
    new = min(NEW, cfg.model.max_seq_len - PROMPT)
    prompt = [token % cfg.model.vocab_size for token in range(1, PROMPT + 1)]
    seconds = []
    for _ in range(TRIES + 1):
        start = time.perf_counter()
        generate(decoder, params, [prompt], GREEDY, max_new_tokens=new)
        seconds.append(time.perf_counter() - start)
    counted = dataclasses.asdict(account(cfg))
    return {"decode_tokens_per_second": new / statistics.median(seconds[1:]), **counted}


if __name__ == "__main__":
    print(json.dumps(decode_speed(Path(sys.argv[1]))))
