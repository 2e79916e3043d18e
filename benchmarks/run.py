"""All CPU benchmarks, one after the other, each with its default options; the results are in benchmarks/results/.

python -m benchmarks.run
"""

from __future__ import annotations

import subprocess
import sys

NAMES = ("train_step", "moe_step", "decode", "startup")


def main() -> None:
    failed = [name for name in NAMES if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
