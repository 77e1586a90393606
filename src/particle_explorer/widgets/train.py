"""The Train dock: choose a model, watch it learn, and the runs of the session."""

from __future__ import annotations

import os
import socket
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from qtpy.QtCore import Qt, Signal
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QHBoxLayout,
    QLabel,
    QListWidget,
    QListWidgetItem,
    QProgressBar,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.configs import (
    CLASS_MAP_WARM_UP,
    FILAMENT_PRIOR_DEG,
    Config,
    ModelConfig,
    TrainConfig,
)
from particle_explorer.latents import angle_leak
from particle_explorer.particles import carries_angles
from particle_explorer.plugin import plugin_setting
from particle_explorer.status import Status, read_status, request_pause, request_stop
from particle_explorer.widgets.ask import ask_path
from particle_explorer.widgets.background import Failure, JobFollower, Tasks
from particle_explorer.widgets.form import ConfigForm, Folded, command_line
from particle_explorer.widgets.job_bar import Complaint, JobBar, duration, number, progress_words
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.moving import CoordinatesPanel
from particle_explorer.widgets.painted import Curve, CurveView, ImageRows
from particle_explorer.widgets.second_map import SecondMap
from particle_explorer.widgets.workspace import show_session, state_of, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import Run, Session
    from particle_explorer.widgets.runs import RunsWindow

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
MAX_POINTS = 2000
"""Points of a curve that are painted."""
MANY_EPOCHS = 10
"""From this many on a curve has one point per epoch."""
COUNTERS = {"epoch", "step", "seconds", "images_per_second", "learning_rate"}
"""Columns of a run's log that are no losses."""
LIKELIHOOD_TIP = (
    "How much better the map explains a particle than noise alone does, in natural logarithms. In the first "
    "part of a fit particles are shared out softly among classes; numbers of that part cannot be compared "
    "with later ones and are not drawn."
)


SMOOTH_FROM = 40
"""Curves of so many points are drawn faint, under their running mean."""
LEAK_TIP = (
    "How well the position on the map predicts the angle in the plane: the share of the angles' spread that "
    "the particles near by explain, each left out in turn. 0 % is what one wants: content without pose. Much "
    "of it means that the map orders particles by how they lie, or that views prefer angles."
)


@dataclass(frozen=True)
class Seen:
    """What one look into the folder of a run found."""

    status: Status
    metrics: pd.DataFrame
    live: dict[str, NDArray[Any]]
    log: str = ""
    run_path: Path | None = None
    """The run that the job has made, when the folder is a job's"""
    memory_GiB: float = 0.0
    """Memory of the process that trains, 0 where it is not known"""


@dataclass(frozen=True)
class Drawn:
    """What the plot of a training shows."""

    title: str
    empty: str
    """Said instead while there is no curve"""
    tip: str
    curve: Curve | None = None
    better: str = "higher"
    """Which way is better"""
    terms: tuple[Curve, ...] = ()
    """What the curve is the sum of"""


@dataclass(frozen=True)
class Listed:
    """One run in the list."""

    name: str
    state: str
    text: str
    tip: str
    showable: bool
    resumable: bool = field(default=False)


class TrainDock(QWidget):
    """Start, follow, stop, resume and show runs."""

    trained = Signal()

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        super().__init__()
        self.viewer = unwrapped(napari_viewer)
        self.state = state_of(self.viewer)
        self.tasks = Tasks(self)
        self._run_path: Path | None = None
        self._live_seen = ""
        self._runs: list[Listed] = []
        self.table: RunsWindow | None = None
        self.second = SecondMap(self.viewer, self)
        self._estimates: dict[str, float] = {}
        self._has_angles = False
        self._from = self._from_kind = ""
        """run whose weights the next one starts from, and its kind of model"""

        self.no_session = QLabel("Open and prepare particles first: tab Particles.")
        self.no_session.setWordWrap(True)
        self.complaint = Complaint()
        self.setup = self._build_setup()
        self.watch = self._build_watch()
        self.runs_page = self._build_runs()
        layout = QVBoxLayout(self)
        layout.setContentsMargins(6, 6, 6, 6)
        layout.setSpacing(5)
        for part in (self.no_session, self.complaint, self.setup, self.watch, self.runs_page):
            layout.addWidget(part)
        layout.addStretch(1)

        self._follower = JobFollower(self, look, self._on_seen)
        follow(self, self.state.session_changed, self._on_session)
        follow(self, self.state.run_changed, self._on_run)
        follow(self, self.state.train_asked, self.train_on_selection)
        self._choose_model()
        self._on_session(self.state.session)

    # --- parts ------------------------------------------------------------------------------------

    def _build_setup(self) -> QWidget:
        page = QWidget()
        self.model = QComboBox()
        self.forms: dict[str, ConfigForm[Any]] = {}
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        row = QHBoxLayout()
        row.addWidget(QLabel("Model"))
        row.addWidget(self.model, 1)
        layout.addLayout(row)
        self.going_on = QWidget()
        self.going_on_words = QLabel()
        self.going_on_words.setWordWrap(True)
        self.anew_button = QPushButton("Start anew")
        self.anew_button.setToolTip("Train from the beginning instead, with these settings")
        self.anew_button.clicked.connect(lambda: self.go_on_from(""))
        row = QHBoxLayout(self.going_on)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self.going_on_words, 1)
        row.addWidget(self.anew_button)
        self.going_on.setVisible(False)
        layout.addWidget(self.going_on)
        self.train_button = QPushButton("Train")
        self.train_button.clicked.connect(self.train)
        layout.addWidget(self.train_button)
        self.model_words = QLabel()
        self.model_words.setWordWrap(True)
        layout.addWidget(self.model_words)
        for config in model_classes():
            kind = str(config.model_fields["kind"].get_default())
            self.model.addItem(NAMES.get(kind, kind), kind)
            self.forms[kind] = ConfigForm(config, advanced_title="Advanced: the model")
            layout.addWidget(self.forms[kind])
        self.model.setToolTip("How the particles are laid out on a map")
        self.model.currentIndexChanged.connect(self._choose_model)
        self.shape_row = QWidget()
        self.shape = QComboBox()
        self.shape.addItem("single particles", 0.0)
        self.shape.addItem("segments of filaments", FILAMENT_PRIOR_DEG)
        self.shape.setToolTip(
            "<p>Segments of filaments lie along the way they were picked: their angles are kept within about"
            f" {FILAMENT_PRIOR_DEG:.0f}° of those in the file, either way round</p>"
        )
        self.shape.activated.connect(self._on_shape)
        row = QHBoxLayout(self.shape_row)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(QLabel("Particles are"))
        row.addWidget(self.shape, 1)
        self.shape_row.setVisible(False)
        layout.insertWidget(layout.indexOf(self.model_words) + 1, self.shape_row)
        self.forms["class-map"].valueChanged.connect(self._show_shape)
        self.train_form = ConfigForm(TrainConfig, advanced_title="Advanced: the training")
        layout.addWidget(self.train_form)
        self.device = QComboBox()
        self.device.addItem("automatic", "auto")
        self.device.addItem("CPU", "cpu")
        self.device.setToolTip(
            "What to compute on; automatic takes the GPU with most free memory, else the CPU"
        )
        row = QHBoxLayout()
        row.addWidget(QLabel("Compute on"))
        row.addWidget(self.device, 1)
        layout.addLayout(row)
        return page

    def _build_watch(self) -> QWidget:
        page = QWidget()
        self.words = QLabel()
        self.words.setWordWrap(True)
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setMaximumHeight(10)
        self.stop_button = QPushButton("Stop")
        self.stop_button.setToolTip("End after this step; what has been learned is kept and can be resumed")
        self.stop_button.clicked.connect(self.stop)
        self.curves = CurveView(x_label="epoch", height=120)
        self.panel = ImageRows()
        self.each_term = QCheckBox("each part of the loss")
        self.each_term.setToolTip("Draw the parts that the loss is the sum of")
        self.log_scale = QCheckBox("logarithmic")
        self.log_scale.setToolTip("A logarithmic scale: late, small changes can be seen")
        self._plot: Drawn | None = None
        for box in (self.each_term, self.log_scale):
            box.toggled.connect(lambda _: None if self._plot is None else self._draw(self._plot))
        self.pause_button = QPushButton("Pause")
        self.pause_button.setCheckable(True)
        self.pause_button.clicked.connect(self.pause)
        row = QHBoxLayout()
        row.addWidget(self.bar, 1)
        row.addWidget(self.pause_button)
        row.addWidget(self.stop_button)
        choices = QHBoxLayout()
        choices.addWidget(self.each_term)
        choices.addWidget(self.log_scale)
        choices.addStretch(1)
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.words)
        layout.addLayout(row)
        layout.addWidget(self.panel)
        layout.addWidget(self.curves)
        layout.addLayout(choices)
        return page

    def _build_runs(self) -> QWidget:
        page = QWidget()
        self.runs_words = QLabel("Runs")
        self.runs = QListWidget()
        self.runs.setMaximumHeight(96)
        self.runs.setToolTip("Click a run to show its map")
        self.runs.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.runs.itemClicked.connect(self._show_clicked)
        self.resume_button = QPushButton("Resume")
        self.resume_button.setToolTip("Go on with the run chosen in the list from its last checkpoint")
        self.resume_button.clicked.connect(self.resume)
        self.load_button = QPushButton("Load a trained run…")
        self.load_button.setToolTip("Choose the folder of a run, of this session or of another one")
        self.load_button.clicked.connect(self._ask_for_run)
        self.table_button = QPushButton("All runs, compare…")
        self.table_button.setToolTip(
            "<p>All runs with their settings and figures: compare two, duplicate the settings of one, or go"
            " on from one with other settings</p>"
        )
        self.table_button.clicked.connect(self.show_table)
        self.encode_button = QPushButton("Encode others…")
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
        self.encode_bar.failed.connect(self.complaint.show_failure)
        row = QHBoxLayout()
        row.addWidget(self.resume_button)
        row.addWidget(self.load_button, 1)
        more = QHBoxLayout()
        more.addWidget(self.table_button, 1)
        more.addWidget(self.encode_button, 1)
        below = QHBoxLayout()
        below.addWidget(self.leak, 1)
        below.addWidget(self.angle_button)
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.runs_words)
        layout.addWidget(self.runs)
        layout.addLayout(below)
        layout.addLayout(row)
        layout.addLayout(more)
        layout.addWidget(self.encode_bar)
        self.coordinates = CoordinatesPanel(self.state)
        self.coordinates.imported.connect(self._on_imported)
        layout.addWidget(Folded("Coordinates from a file…", self.coordinates))
        return page

    # --- choosing ---------------------------------------------------------------------------------

    def _choose_model(self, *_: object) -> None:
        kind = self.model.currentData()
        if self._from and kind != self._from_kind:
            self.go_on_from("")  # weights of one model are none of another
        for name, form in self.forms.items():
            form.setVisible(name == kind)
        self.model_words.setText(_summary(self.forms[kind].value()))
        self.shape_row.setVisible(kind == "class-map" and self._has_angles)
        self._say_time()

    def _say_time(self) -> None:
        seconds = self._estimates.get(self.model.currentData(), -1.0)
        about = f" (about {duration(seconds)})" if seconds > 0 else ""
        name = self.model.currentText()
        what = f"the {name[0].lower() + name[1:] if name == 'Class map' else name}"
        self.train_button.setText(f"{'Go on training' if self._from else 'Train'} {what}{about}")
        self.train_button.setToolTip("Starts a process of its own, which goes on when napari is closed")

    # --- a session --------------------------------------------------------------------------------

    def _on_session(self, session: Session | None) -> None:
        self.complaint.clear()
        self._follow(None)
        self.go_on_from("")
        self._estimates.clear()
        for part in (self.setup, self.runs_page):
            part.setVisible(session is not None)
        self.no_session.setVisible(session is None)
        if session is not None:
            self._offer_shape(session)
            self.tasks.run("devices", devices, self._on_devices, lambda _: None)
            self._list_runs()

    def _on_shape(self, *_: object) -> None:
        form = self.forms["class-map"]
        form.setValue(form.value().model_copy(update={"psi_prior_deg": self.shape.currentData()}))

    def _show_shape(self) -> None:
        self.shape.setCurrentIndex(int(self.forms["class-map"].value().psi_prior_deg > 0))

    def _offer_shape(self, session: Session) -> None:
        """Filaments where the file says how they lie."""
        self._has_angles = carries_angles(session.table)
        form = self.forms["class-map"]
        if not self._has_angles:
            form.setValue(form.value().model_copy(update={"psi_prior_deg": 0.0}))
        form.set_applicable("psi_prior_deg", self._has_angles, "The file gives no angles in the plane")
        self._choose_model()

    def _on_devices(self, found: list[tuple[str, str]]) -> None:
        for name, words in found:
            if self.device.findData(name) < 0:
                self.device.addItem(words, name)
        if plugin_setting("device") == "cpu":
            self.device.setCurrentIndex(self.device.findData("cpu"))
        best = found[0][1] if found else f"CPU, {os.cpu_count()} cores"
        self.device.setItemText(0, f"automatic: {best}")
        self.train_form.set_applicable("devices", len(found) > 1, "This computer has one device to train on.")

    def _list_runs(self) -> None:
        session = self.state.session
        if session is not None:
            self.tasks.run("runs", lambda: list_runs(session), self._on_runs)

    def _on_runs(self, found: tuple[list[Listed], dict[str, float]]) -> None:
        self._runs, self._estimates = found
        self._say_time()
        shown = None if self.state.run is None else self.state.run.name
        self.runs.clear()
        for run in self._runs:
            item = QListWidgetItem(("● " if run.name == shown else "   ") + run.text)
            item.setData(Qt.ItemDataRole.UserRole, run.name)
            item.setToolTip(run.tip)
            self.runs.addItem(item)
            if run.name == shown:
                self.runs.setCurrentItem(item)
        self.runs.setVisible(bool(self._runs))
        self.runs_words.setText("Runs, newest first" if self._runs else "No runs yet.")
        running = [run for run in self._runs if run.state == "running"]
        if running and self._run_path is None and self.state.session is not None:
            # training goes on while napari is closed; here it is found again
            self._follow(self.state.session.path / "runs" / running[0].name)
        resumable = any(run.resumable for run in self._runs)
        self.resume_button.setVisible(resumable)
        self.table_button.setEnabled(bool(self._runs))

    def _on_run(self, _: object) -> None:
        if self.state.session is not None:
            self._list_runs()
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

    def use_settings(self, name: str) -> None:
        """Put the settings of a run into the form, to train it again as it was or changed."""
        session = self.state.session
        if session is None:
            return
        config = session.run(name).config
        if config.model.kind not in self.forms:
            self.complaint.show_failure(Failure(f"Run {name} came from a file: it has no settings."))
            return
        self.model.setCurrentIndex(self.model.findData(config.model.kind))
        self.forms[config.model.kind].setValue(config.model)
        self.train_form.setValue(config.train)
        self.complaint.clear()

    def go_on_from(self, name: str) -> None:
        """Let the next training start from the weights of a run, with settings to change; "" starts anew."""
        session = self.state.session
        self._from, self._from_kind = "", ""
        if name and session is not None:
            self.use_settings(name)
            self._from, self._from_kind = name, session.run(name).config.model.kind
            self.going_on_words.setText(f"Starts from the weights of {name}, with the settings below.")
            self.going_on_words.setToolTip(
                "<p>Learning rate, epochs, weights of the loss, particles: change what you like, but what"
                " gives the networks their size must stay as it was</p>"
            )
        self.going_on.setVisible(bool(self._from))
        self._say_time()

    def show_table(self) -> None:
        """Open the table of runs."""
        from particle_explorer.widgets.runs import RunsWindow

        if self.table is None:
            self.table = RunsWindow(self.viewer, self)
        self.table.read()
        self.table.show()
        self.table.raise_()

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
        self._list_runs()
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

    # --- training ---------------------------------------------------------------------------------

    def arguments(self) -> list[str]:
        """The command line of the training that the form describes."""
        assert self.state.session is not None
        model = self.forms[self.model.currentData()].value()
        arguments = ["train", str(self.state.session.path)]
        arguments += command_line("model", model) + command_line("train", self.train_form.value())
        if self._from:
            arguments += ["--parent", self._from, "--warm-start"]
        return [*arguments, "--device", self.device.currentData()]

    def train_on_selection(self) -> None:
        """Start a run on the selection alone, kept as a set, that remembers the run it was made on."""
        session, mask, parent = self.state.session, self.state.selection.mask, self.state.run
        if session is None or not mask.any() or self.watch.isVisible():
            return
        number = 1
        while (name := f"trained on {number}") in session.selections.names():
            number += 1
        arguments = [*self.arguments(), "--selection", name]
        arguments += [] if parent is None or self._from else ["--parent", parent.name]
        how = "to train on" if parent is None else f"to train on, selected on the map of run {parent.name}"

        def saved(_: object) -> None:
            self.state.sets_changed.emit()
            self._start(arguments)

        save = lambda: session.selections.save(name, mask, how)  # noqa: E731
        self.tasks.run("save set", save, saved, self.complaint.show_failure)

    def train(self) -> None:
        """Start a new run."""
        self._start(self.arguments())

    def resume(self) -> None:
        """Go on with the run chosen in the list, else with the newest one that can go on."""
        session = self.state.session
        item = self.runs.currentItem()
        chosen = None if item is None else str(item.data(Qt.ItemDataRole.UserRole))
        names = [run.name for run in self._runs if run.resumable]
        if session is None or not names:
            return
        name = chosen if chosen in names else names[0]
        self._start(["train", str(session.path), "--resume", name])

    def _start(self, arguments: list[str]) -> None:
        from particle_explorer import jobs

        session = self.state.session
        if session is None:
            return
        self.complaint.clear()
        self._set_running(True)
        self.words.setText("Starting the worker …")
        self.bar.setRange(0, 0)
        self.panel.clear()
        self.curves.setVisible(False)
        self.tasks.run(
            "train",
            lambda: jobs.start(arguments, session.new_job("train")),
            self._follow,
            self._on_start_failed,
        )

    def stop(self) -> None:
        """Ask the run that is followed to end in good order."""
        if self._run_path is not None:
            request_stop(self._run_path)
            self.stop_button.setEnabled(False)
            self.pause_button.setEnabled(False)
            self.words.setText("Stopping; the model is saved first …")

    def pause(self) -> None:
        """Let the training stand still, or go on."""
        if self._run_path is not None:
            request_pause(self._run_path, self.pause_button.isChecked())
            self._show_pause()

    def _show_pause(self) -> None:
        paused = self.pause_button.isChecked()
        self.pause_button.setText("Go on" if paused else "Pause")
        self.pause_button.setToolTip(
            "Let the training go on where it stands"
            if paused
            else "Let the training stand still, with all it has in memory; Stop ends it and keeps the model"
        )

    def stop_following(self) -> None:
        """Look away; a training goes on."""
        self._follower.stop()

    def _on_start_failed(self, failure: Failure) -> None:
        self._set_running(False)
        self.complaint.show_failure(failure)

    def _set_running(self, running: bool) -> None:
        self.watch.setVisible(running)
        self.setup.setVisible(not running and self.state.session is not None)
        self.stop_button.setEnabled(running)
        self.pause_button.setEnabled(running)
        self.pause_button.setChecked(False)
        self._show_pause()

    def _follow(self, folder: Path | None) -> None:
        self._run_path = folder
        self._live_seen = ""
        self._set_running(folder is not None)
        self._follower.follow(folder)

    def _on_seen(self, seen: Seen) -> None:
        status = seen.status
        if seen.run_path is not None:
            self.go_on_from("")  # it has begun
            self._run_path = seen.run_path
            self._follower.follow(seen.run_path)
            self._list_runs()
            return
        if status.is_over:
            self._on_over(seen)
            return
        if self.stop_button.isEnabled():
            memory = f" · {seen.memory_GiB:.1f} GiB" if seen.memory_GiB else ""
            device = f" · on {status.device}" if status.device else ""
            self.words.setText(progress_words(status) + memory + device)
        self.bar.setRange(0, 1000 if status.fraction > 0 else 0)
        self.bar.setValue(int(1000 * status.fraction))
        self._draw(drawn(seen.metrics, status.n_epochs))
        self._show_live(seen.live)

    def _draw(self, plot: Drawn) -> None:
        self.curves.title, self.curves.empty = plot.title, plot.empty
        self.curves.x_label = f"epoch ({plot.better} is better)"
        self.curves.setToolTip(f"<p>{plot.tip}</p>" if plot.tip else "")
        self._plot = plot
        self.each_term.setVisible(len(plot.terms) > 1)
        parts = self.each_term.isChecked() and len(plot.terms) > 1
        shown = list(plot.terms) if parts else [] if plot.curve is None else [plot.curve]
        curves = [each for curve in shown for each in with_trend(curve)]
        positive = bool(curves) and all(np.nanmin(curve.y) > 0 for curve in curves)
        self.log_scale.setEnabled(positive)
        y_range = round_limits(np.concatenate([curve.y for curve in curves])) if curves else None
        log_y = positive and self.log_scale.isChecked()
        self.curves.set_curves(curves, y_range=y_range, log_y=log_y)
        self.curves.setVisible(True)

    def _show_live(self, live: dict[str, NDArray[Any]]) -> None:
        if not live:
            return
        rows = []
        if live.get("panel_images") is not None and len(live["panel_images"]):
            rows = [
                ("Some particles", live["panel_images"][:8]),
                ("What the model has learned of them", live["panel_reconstructions"][:8]),
            ]
        nodes = live.get("nodes_images")
        if nodes is not None and len(nodes):
            rows.append(
                ("Along the map", nodes[np.linspace(0, len(nodes) - 1, min(8, len(nodes))).astype(int)])
            )
        self.panel.set_rows(rows)

    def _on_over(self, seen: Seen) -> None:
        status, path = seen.status, self._run_path
        self._follow(None)
        self._list_runs()
        if path is None:
            return
        self.state.job_changed.emit(str(path))
        if status.state == "finished" or (status.state == "stopped" and (path / "latents.parquet").exists()):
            self.show_run(path.name)
            self.trained.emit()
        elif status.state == "stopped":
            there = (path / "resume.pt").is_file()
            words = (
                "Stopped; choose the run below and press Resume to go on."
                if there
                else "Stopped before the first checkpoint: there is nothing to resume, train again."
            )
            self.complaint.show_failure(Failure(words))
        else:
            words = (
                status.error
                or f"Training was {STATES[status.state]}; Resume goes on from its last checkpoint."
            )
            self.complaint.show_failure(Failure(words, seen.log))


# --- in threads -----------------------------------------------------------------------------------


def look(folder: Path) -> Seen:
    """Read what a run, or the job that is about to make one, says of itself."""
    from particle_explorer.jobs import read_log

    status = read_status(folder)
    log = read_log(folder) if status.state in ("failed", "interrupted") else ""
    if folder.parent.name != "runs":
        return Seen(status, pd.DataFrame(), {}, log, run_of(folder, status))
    pictures = sorted((folder / "live").glob("*.npz"))
    live = read_live(pictures[-1]) if pictures else {}
    metrics = read_metrics(folder / "metrics.csv")
    return Seen(status, metrics, live, log, memory_GiB=memory_GiB(status))


def memory_GiB(status: Status) -> float:
    """Memory of the process of a job on this computer; 0 where it is not known."""
    import psutil

    if status.state != "running" or not status.pid or status.host != socket.gethostname():
        return 0.0
    try:
        return float(psutil.Process(status.pid).memory_info().rss) / 2**30
    except psutil.Error:
        return 0.0


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


def with_trend(curve: Curve) -> list[Curve]:
    """A curve of many noisy points with its running mean, which comes first; else as it is."""
    n = len(curve.y)
    if n < SMOOTH_FROM:
        return [curve]
    width = max(3, n // 20) | 1
    filled = np.where(np.isfinite(curve.y), curve.y, 0.0)
    kernel = np.ones(width)
    count = np.convolve(np.isfinite(curve.y).astype(float), kernel, "same")
    smooth = np.convolve(filled, kernel, "same") / np.maximum(count, 1)
    return [Curve(curve.name, curve.x, smooth), Curve("", curve.x, curve.y, faint=True)]


def read_metrics(path: Path) -> pd.DataFrame:
    """The log of a run, thinned to what can be painted; empty before its first line."""
    try:
        metrics = pd.read_csv(path)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return pd.DataFrame()
    # what an interrupted process wrote beyond the checkpoint that was resumed from is passed over
    least_later = metrics["step"][::-1].cummin()[::-1].shift(-1, fill_value=np.iinfo(np.int64).max)
    metrics = metrics[metrics["step"] < least_later]
    return metrics.iloc[:: max(1, len(metrics) // MAX_POINTS)]


def read_live(path: Path) -> dict[str, NDArray[Any]]:
    """One live picture of a training; empty when it was replaced under the reader."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return {}


def drawn(metrics: pd.DataFrame, n_epochs: int) -> Drawn:
    """The curve of a run, in words that say what it is, over the epochs whose values compare."""
    if metrics.empty or "epoch" not in metrics:
        return Drawn("", "The curve starts after the first epoch", "")
    at, values = _over_epochs(metrics, n_epochs)
    if "negative_log_likelihood" in metrics:
        warm = CLASS_MAP_WARM_UP * n_epochs
        first, y = at >= warm, -values["negative_log_likelihood"]
        if not first.any():
            return Drawn("", f"Warming up; the curve starts after epoch {int(np.ceil(warm))}", LIKELIHOOD_TIP)
        curve = Curve("log-likelihood", at[first], y[first])
        title = f"Log-likelihood per particle over noise: {_in_short(y[-1])}"
        return Drawn(title, "", LIKELIHOOD_TIP, curve)
    terms = {name: y for name, y in values.items() if name != "loss"}
    loss = values["loss"] if "loss" in values else sum(terms.values(), np.zeros(len(at)))
    tip = ""
    if len(terms) > 1:
        parts = ", ".join(f"{name.replace('_', ' ')} {_in_short(y[-1])}" for name, y in terms.items())
        tip = f"The sum of {parts}."
    curves = tuple(Curve(name.replace("_", " "), at, y) for name, y in terms.items())
    title = f"Loss per particle: {_in_short(loss[-1])}"
    return Drawn(title, "", tip, Curve("loss", at, loss), "lower", curves)


def _over_epochs(metrics: pd.DataFrame, n_epochs: int) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Epochs (parts of one count) and the losses there; of a long run the means of whole epochs, because
    every batch has images of its own."""
    begun = metrics[metrics["epoch"] > 0]
    steps = int((begun["step"] / begun["epoch"]).min()) if len(begun) else 0
    at = metrics["step"].to_numpy(float) / steps if steps else metrics["epoch"].to_numpy(float)
    names = [str(name) for name in metrics if name not in COUNTERS and metrics[name].dtype.kind == "f"]
    table = metrics[names]
    if steps and n_epochs >= MANY_EPOCHS:
        table = table.groupby(np.ceil(at)).mean()
        at = table.index.to_numpy(float)
    return at, {name: table[name].to_numpy(float) for name in names}


def _in_short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def round_limits(values: NDArray[Any]) -> tuple[float, float] | None:
    """Limits of an axis in few digits; None where there is nothing to show."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    span = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-9)
    step = 10.0 ** np.floor(np.log10(span))
    return float(np.floor(low / step) * step), float(np.ceil(high / step) * step)


def run_of(job: Path, status: Status) -> Path | None:
    """The run that the process of this training job is fitting."""
    runs = job.parent.parent / "runs"
    for folder in sorted(runs.iterdir(), reverse=True) if runs.is_dir() else []:
        if status.pid and read_status(folder).pid == status.pid:
            return folder
    return None


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


def devices() -> list[tuple[str, str]]:
    """GPUs of this computer, as (name for `--device`, words); asks the driver, not torch."""
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,name,memory.free", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=10)
    found = []
    for line in answer.stdout.splitlines():
        index, name, free = (part.strip() for part in line.split(","))
        found.append((int(free), f"cuda:{index}", f"{name}, {int(free) // 1024} GB free"))
    return [(name, words) for _, name, words in sorted(found, reverse=True)]


def model_classes() -> list[type[Config]]:
    """The settings classes of all models, the default first."""
    union = typing.get_args(ModelConfig)[0]
    return list(typing.get_args(union))


def _summary(config: Config) -> str:
    """What a model is, in its own words."""
    return " ".join((type(config).__doc__ or "").split())


def particles_words(n: int) -> str:
    """A count with its noun."""
    return f"{number(n)} particle{'' if n == 1 else 's'}"
