"""The interface benchmark measures what it says, in a process and a window of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from particle_explorer.bench import interface
from particle_explorer.files import UserError

CODE = """
import dataclasses, sys
from pathlib import Path
from particle_explorer.bench import interface
interface.run(Path(sys.argv[1]), plan=dataclasses.replace(interface.QUICK, seconds=1.0))
"""


@pytest.mark.skipif(
    sys.platform.startswith("linux") and not os.environ.get("DISPLAY"), reason="no screen, and no virtual one"
)
def test_everything_is_measured_in_a_real_window(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "QT_QPA_PLATFORM": "xcb" if sys.platform.startswith("linux") else ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out.json").read_text())
    found = {result["what"]: result for result in report["results"]}
    for words in (
        "mouse move to new picture",
        "while a run trains",
        "pan",
        "colour",
        "mask",
        "all views",
        "memory",
        "vae, 32 px",
        "moves/s",
        "while embedding",
        "while clustering",
        "while exporting",
    ):
        fitting = [result for what, result in found.items() if words in what]
        assert fitting, words
        assert all(result["n"] > 0 and math.isfinite(result["median"]) for result in fitting), words
    assert report["machine"]["processor"] and report["window"]["opengl"]
    assert done.stdout.count("\n| ") == len(found) + 1  # and a heading


def test_without_a_screen_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(UserError, match="xvfb-run"):
        interface.run()


def test_the_table_gives_median_and_tail() -> None:
    row = interface.Result.of("thing", [1.0, 2.0, 3.0, 40.0])
    assert (row.median, row.worst, row.n) == (2.5, 40.0, 4)
    assert "| thing | ms | 2.5 |" in interface.table([row])
    assert math.isnan(interface.Result.of("nothing", []).median)
