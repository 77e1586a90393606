"""The runs of a session: show one, go on with it, bring others in, place other particles on its map."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from qtpy.QtCore import Qt, Signal
from qtpy.QtWidgets import (
    QHBoxLayout,
    QLabel,
    QListWidgetItem,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.latents import angle_leak
from particle_explorer.state import AppState
from particle_explorer.status import Status
from particle_explorer.widgets.ask import ask_path
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.form import Folded
from particle_explorer.widgets.job_bar import Complaint, JobBar
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.moving import CoordinatesPanel
from particle_explorer.widgets.short_list import ShortList
from particle_explorer.widgets.workspace import show_session

if TYPE_CHECKING:
    from particle_explorer.session import Run, Session

NAMES = {
    "class-map": "Class map",
    "spatial-vae": "spatial-VAE",
    "target-vae": "TARGET-VAE",
    "codae": "CODAE",
    "rotation-ae": "Rotation-invariant AE",
    "vae": "VAE, β-VAE",
    "imported": "Coordinates from a file",
}
STATES = {
    "new": "not started",
    "running": "running",
    "finished": "finished",
    "failed": "failed",
    "stopped": "stopped",
    "interrupted": "interrupted",
}
LEAK_TIP = (
    "How well the position on the map predicts the angle in the plane: the share of the angles' spread that "
    "the particles near by explain, each left out in turn. 0 % is what one wants: content without pose. Much "
    "of it means that the map orders particles by how they lie, or that views prefer angles."
)


@dataclass(frozen=True)
class Listed:
    """One run in the list."""

    name: str
    state: str
    text: str
    tip: str
    showable: bool
    resumable: bool = field(default=False)


class RunList(QWidget):
    """The list, newest first, and what one does with runs."""

    listed = Signal(object)
    """how long each kind of model took here (s), by its name"""
    found_running = Signal(object)
    """a run that trains: its folder"""
    resume_asked = Signal(str)
    table_asked = Signal()

    def __init__(self, state: AppState, complaint: Complaint) -> None:
        super().__init__()
        self.state, self.complaint = state, complaint
        self.tasks = Tasks(self)
        self._runs: list[Listed] = []
        self.heading = QLabel("Runs")
        self.list = ShortList(5)
        self.list.setToolTip("Click a run to show its map")
        self.list.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.list.itemClicked.connect(self._show_clicked)
        self.resume_button = QPushButton("Resume")
        self.resume_button.setToolTip("Go on with the run chosen in the list from its last checkpoint")
        self.resume_button.clicked.connect(self._resume)
        self.load_button = QPushButton("Load a trained run…")
        self.load_button.setToolTip("Choose the folder of a run, of this session or of another one")
        self.load_button.clicked.connect(self._ask_for_run)
        self.table_button = QPushButton("All runs, compare…")
        self.table_button.setToolTip(
            "<p>All runs with their settings and figures: compare two, duplicate the settings of one, or go"
            " on from one with other settings</p>"
        )
        self.table_button.clicked.connect(self.table_asked)
        self.encode_button = QPushButton("Place other particles…")
        self.encode_button.setToolTip(
            "<p>Place the particles of another file on the map of the run that is shown, without training</p>"
        )
        self.encode_button.clicked.connect(self._ask_for_stack)
        self.leak = QLabel()
        self.leak.setWordWrap(True)
        self.leak.setToolTip(f"<p>{LEAK_TIP}</p>")
        self.angle_button = QPushButton("Colour by angle")
        self.angle_button.setToolTip(
            "<p>Colour the map by the angle in the plane: colours that mix mean content without pose</p>"
        )
        self.angle_button.clicked.connect(lambda: self.state.colour_asked.emit("angle_deg"))
        self.encode_bar = JobBar()
        self.encode_bar.finished.connect(self._on_encoded)
        self.encode_bar.failed.connect(complaint.show_failure)
        row = QHBoxLayout()
        row.addWidget(self.resume_button)
        row.addWidget(self.load_button, 1)
        more = QHBoxLayout()
        more.addWidget(self.table_button, 1)
        more.addWidget(self.encode_button, 1)
        below = QHBoxLayout()
        below.addWidget(self.leak, 1)
        below.addWidget(self.angle_button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.heading)
        layout.addWidget(self.list)
        layout.addLayout(below)
        layout.addLayout(row)
        layout.addLayout(more)
        layout.addWidget(self.encode_bar)
        self.coordinates = CoordinatesPanel(self.state)
        self.coordinates.imported.connect(self._on_imported)
        layout.addWidget(Folded("Coordinates from a file…", self.coordinates))
        follow(self, state.run_changed, self._on_run)

    def stop(self) -> None:
        """Look away; jobs go on."""
        self.tasks.stop()
        self.coordinates.stop()

    def read(self) -> None:
        """Look which runs there are."""
        session = self.state.session
        if session is not None:
            self.tasks.run("runs", lambda: list_runs(session), self._on_runs)

    def _on_runs(self, found: tuple[list[Listed], dict[str, float]]) -> None:
        self._runs, estimates = found
        self.listed.emit(estimates)
        shown = None if self.state.run is None else self.state.run.name
        self.list.clear()
        for run in self._runs:
            item = QListWidgetItem(("● " if run.name == shown else "   ") + run.text)
            item.setData(Qt.ItemDataRole.UserRole, run.name)
            item.setToolTip(run.tip)
            self.list.addItem(item)
            if run.name == shown:
                self.list.setCurrentItem(item)
        self.list.setVisible(bool(self._runs))
        self.heading.setText("Runs, newest first" if self._runs else "No runs yet.")
        running = [run for run in self._runs if run.state == "running"]
        if running and self.state.session is not None:
            self.found_running.emit(self.state.session.path / "runs" / running[0].name)
        resumable = any(run.resumable for run in self._runs)
        self.resume_button.setVisible(resumable)
        self.table_button.setEnabled(bool(self._runs))

    def _on_run(self, _: object) -> None:
        if self.state.session is not None:
            self.read()
        self._show_leak()

    def _show_leak(self) -> None:
        """How well content predicts the angle, of the run that is shown."""
        run = self.state.run
        self.leak.clear()
        self.leak.setVisible(run is not None)
        self.angle_button.setVisible(run is not None and "angle_deg" in self.state.features)
        self.encode_button.setEnabled(run is not None and self.encode_bar.folder is None)
        if run is not None and "angle_deg" in self.state.features:
            self.tasks.run("leak", lambda: leak_of(run), self._on_leak, lambda _: None)

    def _on_leak(self, leak: float) -> None:
        self.leak.setText("" if np.isnan(leak) else f"Pose in the content: {leak_words(leak)}")

    def _resume(self) -> None:
        """Ask to go on with the run chosen in the list, else with the newest one that can go on."""
        item = self.list.currentItem()
        chosen = None if item is None else str(item.data(Qt.ItemDataRole.UserRole))
        names = [run.name for run in self._runs if run.resumable]
        if names:
            self.resume_asked.emit(chosen if chosen in names else names[0])

    # --- particles of another file ------------------------------------------------------------------

    def _ask_for_stack(self) -> None:
        start = "" if self.state.session is None else str(self.state.session.path.parent)
        ask_path(self, "Particles to place on this map", self.encode_others, start=start)

    def encode_others(self, path: str | Path) -> None:
        """Place the particles of a file on the map of the run that is shown, in the background."""
        from particle_explorer import jobs

        run = self.state.run
        if run is None or self.encode_bar.folder is not None:
            return
        self.complaint.clear()
        arguments = ["encode", str(run.path), "--stack", str(path)]
        self.tasks.run(
            "encode",
            lambda: jobs.start(arguments, run.session.new_job("encode")),
            lambda folder: self.encode_bar.follow(folder, "Placing the particles"),
            self.complaint.show_failure,
        )

    def _on_imported(self, path: Path) -> None:
        self.read()
        self.show_run(path.name)

    def _on_encoded(self, status: Status) -> None:
        from napari.utils.notifications import show_info

        show_info(f"Positions and poses of the other particles: {status.message}")

    def _show_clicked(self, item: QListWidgetItem) -> None:
        name = str(item.data(Qt.ItemDataRole.UserRole))
        run = next((each for each in self._runs if each.name == name), None)
        if run is not None and run.showable:
            self.show_run(name)
        elif run is not None:
            self.complaint.show_failure(Failure(f"Run {name} has no map yet: it is {STATES[run.state]}."))

    def show_run(self, name: str) -> None:
        """Show the map of a run of the open session."""
        session = self.state.session
        if session is None:
            return
        self.complaint.clear()
        from particle_explorer.state import read

        self.tasks.run(
            "show run", lambda: read(session, session.run(name)), self.state.show, self.complaint.show_failure
        )

    def _ask_for_run(self) -> None:
        start = "" if self.state.session is None else str(self.state.session.path / "runs")
        ask_path(
            self, "Folder of a trained run", lambda path: self.load(Path(path)), kind="folder", start=start
        )

    def load(self, path: Path) -> None:
        """Open the session of a run folder and show that run."""
        session = self.state.session
        if session is not None and path.parent == session.path / "runs":
            self.show_run(path.name)
            return
        show_session(
            self.state, self.tasks, path.parent.parent, run=path.name, failed=self.complaint.show_failure
        )


# --- in threads -----------------------------------------------------------------------------------


def leak_of(run: Run) -> float:
    """How well content predicts the angle; NaN for a run without poses."""
    latents = run.latents()
    if latents is None or latents.angle_deg is None:
        return float("nan")
    return angle_leak(latents.z, latents.angle_deg)


def leak_words(leak: float) -> str:
    """A leak and what to think of it."""
    verdict = "none to speak of" if leak < 0.05 else "some" if leak < 0.2 else "much"
    return f"{100 * leak:.0f} % ({verdict})"


def list_runs(session: Session) -> tuple[list[Listed], dict[str, float]]:
    """The runs, newest first, and how long each kind of model took here (s)."""
    listed: list[Listed] = []
    seconds: dict[str, float] = {}
    for run in session.runs():
        status = run.status
        kind: str = run.config.model.kind
        if status.state == "finished":
            seconds[kind] = status.heartbeat - status.started
        listed.append(_listed(run, status, kind))
    if "class-map" not in seconds:
        seconds["class-map"] = first_estimate(session)
    return listed[::-1], seconds


def first_estimate(session: Session) -> float:
    """Seconds that a class map will take before any was fitted here."""
    from particle_explorer.estimates import first_estimate

    return first_estimate(session.n_particles, session.images.shape[-1])


def _listed(run: Run, status: Status, kind: str) -> Listed:
    words = [run.name, STATES[status.state]]
    if status.n_epochs and not status.is_over:
        words.append(f"epoch {status.epoch} of {status.n_epochs}")
    dims = run.config.model.latent_dim
    where = f"\nof the particles with {run.config.where}" if run.config.where else ""
    tip = f"{NAMES.get(kind, kind)}, {dims} dimension{'s' if dims > 1 else ''}{where}\n{run.path}"
    resumable = status.state in ("stopped", "interrupted", "failed") and run.can_resume
    return Listed(run.name, status.state, " · ".join(words), tip, run.is_encoded, resumable)
