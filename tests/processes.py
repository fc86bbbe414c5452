"""Several processes of one script, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(count, script, *arguments, options=("--standalone",), cwd=ROOT):
    """`count` processes with a thread each, on the CPU; stdout and stderr come together."""
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += [f"--nproc_per_node={count}", *options, str(script), *map(str, arguments)]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"FORCE_DEVICE": "cpu"}
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outcome(process):
    """The exit code, and what was said."""
    said, _ = process.communicate(timeout=300)
    return process.returncode, said
