"""Star files joined, coordinates taken, another extraction found: by real workers, from the window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import starfile

pytest.importorskip("napari")

from pytestqt.qtbot import QtBot
from qtpy.QtCore import Qt
from qtpy.QtTest import QTest

from particle_explorer.io.mrc import write_stack
from particle_explorer.io.reading import read
from particle_explorer.session import Session
from particle_explorer.state import AppState
from particle_explorer.state import read as look
from particle_explorer.widgets.moving import CoordinatesPanel, JobPanel, JoinPanel, TransferPanel

SLOW = 60_000
LEFT = Qt.MouseButton.LeftButton


def extraction(folder: Path, name: str, n: int, box: int, size: float) -> Path:
    """`n` particles of noise at known coordinates."""
    rng = np.random.default_rng(n)
    write_stack(folder / f"{name}.mrcs", rng.normal(size=(n, box, box)), size)
    rows = "".join(f"{i + 1:06d}@{name}.mrcs m{i % 2}.mrc {50 * i}.0 {70 + 30 * i}.0 1\n" for i in range(n))
    (folder / f"{name}.star").write_text(
        "data_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnImagePixelSize #2\n_rlnImageSize #3\n_rlnVoltage #4\n"
        f"_rlnSphericalAberration #5\n1 {size} {box} 300.0 2.7\n\ndata_particles\n\nloop_\n_rlnImageName #1\n"
        f"_rlnMicrographName #2\n_rlnCoordinateX #3\n_rlnCoordinateY #4\n_rlnOpticsGroup #5\n{rows}"
    )
    return folder / f"{name}.star"


def shown(panel: JobPanel, qtbot: QtBot) -> JobPanel:
    qtbot.addWidget(panel, before_close_func=lambda widget: widget.stop())
    panel.resize(392, 300)
    panel.show()
    return panel


def done(panel: JobPanel, qtbot: QtBot) -> None:
    QTest.mouseClick(panel.button, LEFT)
    qtbot.waitUntil(lambda: panel.words.text() != "" or panel.complaint.isVisible(), timeout=SLOW)
    assert not panel.complaint.isVisible(), panel.complaint.sentence.text()


def test_star_files_are_joined(tmp_path: Path, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch) -> None:
    passing = tmp_path / "passing"
    passing.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(passing))
    panel = JoinPanel(AppState())
    shown(panel, qtbot)
    files = [extraction(tmp_path, name, n, 16, 2.0) for name, n in (("a", 3), ("b", 4))]
    panel.choose(files[:1])
    assert not panel.button.isEnabled() and "two star files" in panel.button.toolTip()
    panel.choose(files)
    joined: list[Path] = []
    panel.joined.connect(joined.append)
    done(panel, qtbot)
    assert joined == [tmp_path / "a_joined.star"] and len(read(joined[0])) == 7
    assert list(passing.iterdir()) == []  # a job that ended well leaves nothing behind
    QTest.mouseClick(panel.button, LEFT)  # again: what is there is not replaced
    qtbot.waitUntil(panel.complaint.isVisible, timeout=SLOW)
    assert "exists already" in panel.complaint.sentence.text() and panel.button.isEnabled()
    assert [folder.name[:23] for folder in passing.iterdir()] == ["particle-explorer-merge"]  # its log


def test_coordinates_become_a_run_or_a_sentence(tiny_session: Session, tmp_path: Path, qtbot: QtBot) -> None:
    state = AppState()
    panel = CoordinatesPanel(state)
    shown(panel, qtbot)
    assert not panel.button.isEnabled()
    state.show(look(tiny_session))
    (tmp_path / "z.pkl").write_bytes(b"")
    panel.file.line.setText(str(tmp_path / "z.pkl"))
    QTest.mouseClick(panel.button, LEFT)
    qtbot.waitUntil(panel.complaint.isVisible, timeout=SLOW)
    assert "is a pickle" in panel.complaint.sentence.text()
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(tiny_session.n_particles, 3)))
    panel.file.line.setText(str(tmp_path / "z.npy"))
    imported: list[Path] = []
    panel.imported.connect(imported.append)
    done(panel, qtbot)
    assert "3 coordinates" in panel.words.text()
    latents = tiny_session.run(imported[0].name).latents()
    assert latents is not None and latents.z.shape == (tiny_session.n_particles, 3)


def test_a_selection_goes_onto_another_extraction(tmp_path: Path, qtbot: QtBot) -> None:
    binned = extraction(tmp_path, "binned", 6, 16, 4.0)
    whole = extraction(tmp_path, "whole", 9, 32, 2.0)
    session = Session.create(tmp_path / "session", read(binned))
    state = AppState()
    state.show(look(session))
    panel = TransferPanel(state)
    shown(panel, qtbot)
    assert not panel.button.isEnabled()
    panel.source.line.setText(str(whole))
    assert panel.out.path() == tmp_path / "whole_explored.star" and panel.button.isEnabled()
    state.selection.set(np.arange(6) % 2 == 0)
    assert panel.who.currentText() == "the 3 selected particles"
    done(panel, qtbot)
    assert "3 of 3 particles found" in panel.words.text()
    names = starfile.read(tmp_path / "whole_explored.star")["particles"]["rlnImageName"]
    assert [int(name.split("@")[0]) for name in names] == [1, 3, 5]
