"""The start of a contender in a process of its own, from nothing to the first logits.

serving.py calls start(), which runs this file as a program. It imports nothing that the contender
does not import: OpenVINO and ONNX Runtime start without torch.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serving_contenders import CONTENDERS, Setting

LOGITS = "logits.npy"


@dataclass(frozen=True)
class Start:
    seconds: float  # from the start of the process to the first logits
    resident: int  # bytes of the process after that
    logits: Any


def start(name: str, setting: Setting, package: Path) -> Start:
    """Inductor compiles with empty caches. package: the folder that holds epsa_fused."""
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, __file__, name, json.dumps(asdict(setting), default=str)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "OMP_NUM_THREADS": str(setting.threads),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        began = time.monotonic()  # the same clock in all processes
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: its process ended with {done.returncode}\n{done.stderr[-2000:]}")
    import numpy as np

    report = json.loads(done.stdout.splitlines()[-1])
    logits = np.load(setting.folder / LOGITS)
    return Start(report["at"] - began, report["resident"], logits)


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(name: str, given: str) -> None:
    values = json.loads(given)
    setting = Setting(**values | {"folder": Path(values["folder"])})
    run = CONTENDERS[name].load(setting)
    logits = run()
    at = time.monotonic()
    resident = resident_bytes()
    import numpy as np

    array = logits if isinstance(logits, np.ndarray) else logits.float().numpy()
    np.save(setting.folder / LOGITS, array)
    print(json.dumps({"at": at, "resident": resident}))


if __name__ == "__main__":
    main(*sys.argv[1:])
