"""Damaged files of every format: a correct read or one sentence; `fuzz.py` runs any number of cases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """`PARTICLE_EXPLORER_FUZZ` sets the number of cases. In a process of its own: a library may crash."""
    n = os.environ.get("PARTICLE_EXPLORER_FUZZ", "300")
    script = Path(__file__).with_name("fuzz.py")
    done = subprocess.run(
        [sys.executable, str(script), "--cases", n, "--keep", str(tmp_path)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert f"{n} cases, 0 bad" in done.stdout
