"""`jaxlm launch preflight` in a process that has the faults it is asked for: FAULT[,FAULT...] CONFIG [OPTION ...].

Process 1 has the faults, the others have none.
"""

from __future__ import annotations

import os
import sys
import time

faults = sys.argv.pop(1).split(",") if os.environ["JAXLM_PROCESS_ID"] == "1" else [sys.argv.pop(1), ""][1:]
if "device" in faults:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"

from jaxlm import cli  # noqa: E402
from jaxlm.launch import preflight  # noqa: E402

preflight.VISIBLE_WITHIN = 2.0
if os.environ.get("DIES"):
    preflight.PATIENCE = 3
if "dies" in faults:
    preflight.own_versions = lambda cfg: os._exit(9)
if "version" in faults:
    right = preflight.own_versions
    preflight.own_versions = lambda cfg: right(cfg) | {"jax": "0.0.1"}
if "clock" in faults:
    clock = time.time
    preflight.time.time = lambda: clock() + 30
if "folder" in faults:
    sys.argv.append(f"out_dir={os.environ['OTHER_FOLDER']}")
sys.argv[1:1] = ["launch", "preflight"]
sys.exit(cli.main())
