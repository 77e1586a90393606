"""The Train dock: choose a model, watch it learn, and the runs of the session."""

from __future__ import annotations

import os
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import Signal
from qtpy.QtWidgets import (
    QComboBox,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.configs import (
    FILAMENT_PRIOR_DEG,
    Config,
    ModelConfig,
    TrainConfig,
)
from particle_explorer.particles import carries_angles
from particle_explorer.plugin import plugin_setting
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.form import ConfigForm, command_line
from particle_explorer.widgets.job_bar import Complaint, duration
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.run_list import NAMES, STATES, RunList
from particle_explorer.widgets.second_map import SecondMap
from particle_explorer.widgets.train_watch import Seen, TrainWatch
from particle_explorer.widgets.workspace import state_of, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import Session
    from particle_explorer.widgets.runs import RunsWindow


class TrainDock(QWidget):
    """Start, follow, stop, resume and show runs."""

    trained = Signal()

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        super().__init__()
        self.viewer = unwrapped(napari_viewer)
        self.state = state_of(self.viewer)
        self.tasks = Tasks(self)
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
        self.watch = TrainWatch()
        self.runs = RunList(self.state, self.complaint)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(6, 6, 6, 6)
        layout.setSpacing(5)
        for part in (self.no_session, self.complaint, self.setup, self.watch, self.runs):
            layout.addWidget(part)
        layout.addStretch(1)

        self.watch.watching.connect(self._show_setup)
        self.watch.begun.connect(self._on_begun)
        self.watch.over.connect(self._on_over)
        self.runs.listed.connect(self._on_listed)
        self.runs.found_running.connect(self._on_found_running)
        self.runs.resume_asked.connect(self._resume)
        self.runs.table_asked.connect(self.show_table)
        follow(self, self.state.session_changed, self._on_session)
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
            "What to compute on; automatic takes the GPU with most free memory, an Apple GPU, or the CPU"
        )
        row = QHBoxLayout()
        row.addWidget(QLabel("Compute on"))
        row.addWidget(self.device, 1)
        layout.addLayout(row)
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
        self.watch.follow(None)
        self.go_on_from("")
        self._estimates.clear()
        self.runs.setVisible(session is not None)
        self.no_session.setVisible(session is None)
        if session is not None:
            self._offer_shape(session)
            self.tasks.run("devices", devices, self._on_devices, lambda _: None)
            self.runs.read()

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

    def shutdown(self) -> None:
        """End all background work of this dock; jobs go on."""
        self.second.stop()
        self.tasks.stop()
        self.runs.stop()
        self.watch.stop_following()

    def show_run(self, name: str) -> None:
        """Show the map of a run of the open session."""
        self.runs.show_run(name)

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

    def _start(self, arguments: list[str]) -> None:
        from particle_explorer import jobs

        session = self.state.session
        if session is None:
            return
        self.complaint.clear()
        self.watch.start()
        self.tasks.run(
            "train",
            lambda: jobs.start(arguments, session.new_job("train")),
            self.watch.follow,
            self._on_start_failed,
        )

    def _on_start_failed(self, failure: Failure) -> None:
        self.watch.follow(None)
        self.complaint.show_failure(failure)

    def _resume(self, name: str) -> None:
        session = self.state.session
        if session is not None:
            self._start(["train", str(session.path), "--resume", name])

    def _show_setup(self, watching: bool) -> None:
        self.setup.setVisible(not watching and self.state.session is not None)

    def _on_listed(self, estimates: dict[str, float]) -> None:
        self._estimates = estimates
        self._say_time()

    def _on_found_running(self, run: Path) -> None:
        if self.watch.folder is None:
            self.watch.follow(run)  # training goes on while napari is closed; here it is found again

    def _on_begun(self, _: Path) -> None:
        self.go_on_from("")
        self.runs.read()

    def _on_over(self, path: Path, seen: Seen) -> None:
        status = seen.status
        self.runs.read()
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


def devices() -> list[tuple[str, str]]:
    """GPUs of this computer, as (name for `--device`, words); asks the driver, not torch."""
    import platform
    import shutil
    import subprocess

    if (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        return [("mps", "Apple GPU")]
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
