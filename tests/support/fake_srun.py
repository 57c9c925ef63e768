"""A stand-in for Slurm's `srun`: starts the command once for each node, on this machine.

It reads --nodes, sets what Slurm would set in each task, and ends with the first exit code that is not 0, after it has
ended the other tasks (--kill-on-bad-exit).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    options = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    nodes = int(next(option for option in options if option.startswith("--nodes=")).partition("=")[2])
    command = sys.argv[1 + next(at for at, argument in enumerate(sys.argv[1:]) if not argument.startswith("--")) :]
    Path(os.environ["FAKE_SRUN_LOG"]).write_text("\n".join(sys.argv[1:]))
    tasks = [
        subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)})
        for node in range(nodes)
    ]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    code = 0
    while any(task.poll() is None for task in tasks):
        code = code or next((task.returncode for task in tasks if task.returncode), 0)
        if code:
            for task in tasks:
                task.terminate()
        time.sleep(0.05)
    return code or next((task.returncode for task in tasks if task.returncode), 0)


if __name__ == "__main__":
    sys.exit(main())
