"""Commands that tests start, as users would."""

from __future__ import annotations

import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[1]


def run(*command, cwd: pathlib.Path = ROOT, timeout_s: float = 120, **environment: str) -> str:
    """What it printed. It must succeed; `environment` comes on top of this process's."""
    result = subprocess.run(
        list(map(str, command)),
        env=os.environ | environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout
