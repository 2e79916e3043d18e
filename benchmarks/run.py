"""All CPU benchmarks, one after the other, each with its default options; the results are in benchmarks/results/.

Only `benchmarks.convert` is left out, which needs 41 GB of disk.

python -m benchmarks.run
"""

from __future__ import annotations

import subprocess
import sys

COMMANDS = (
    *("train_step", "moe_step", "mamba_step", "mamba_step --hybrid"),
    *("decode", "mamba_decode", "compile_time", "startup", "expert_exchange"),
)


def main() -> None:
    failed = [
        name for name in COMMANDS if subprocess.run([sys.executable, "-m", *f"benchmarks.{name}".split()]).returncode
    ]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
