"""A training that is watched: progress, pictures and curves of its folder, with Pause and Stop."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QCheckBox, QHBoxLayout, QLabel, QProgressBar, QPushButton, QVBoxLayout, QWidget

from particle_explorer.status import Status, read_status, request_pause, request_stop
from particle_explorer.widgets.background import JobFollower
from particle_explorer.widgets.job_bar import progress_words
from particle_explorer.widgets.painted import CurveView, ImageRows
from particle_explorer.widgets.training_plot import Drawn, drawn, read_metrics, round_limits, with_trend


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


class TrainWatch(QWidget):
    """Follows the folder of a job, then that of the run it makes; shown while it does."""

    watching = Signal(bool)
    """whether there is anything to watch"""
    begun = Signal(object)
    """the job has made its run: folder of the run"""
    over = Signal(object, object)
    """it has ended: folder, and what was `Seen` last"""

    def __init__(self) -> None:
        super().__init__()
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
            box.toggled.connect(lambda _: None if self._plot is None else self.show_plot(self._plot))
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
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.words)
        layout.addLayout(row)
        layout.addWidget(self.panel)
        layout.addWidget(self.curves)
        layout.addLayout(choices)
        self._folder: Path | None = None
        self._follower = JobFollower(self, look, self._on_seen)
        self._set_running(False)

    @property
    def folder(self) -> Path | None:
        """What is followed: a run, or the job that is about to make one."""
        return self._folder

    def start(self) -> None:
        """A worker has been asked for and has no folder yet."""
        self._set_running(True)
        self.words.setText("Starting the worker …")
        self.bar.setRange(0, 0)
        self.panel.clear()
        self.curves.setVisible(False)

    def follow(self, folder: Path | None) -> None:
        """Watch a job or a run; None looks away."""
        self._folder = folder
        self._set_running(folder is not None)
        self._follower.follow(folder)

    def stop_following(self) -> None:
        """Look away for good; a training goes on."""
        self._follower.stop()

    def stop(self) -> None:
        """Ask the run that is followed to end in good order."""
        if self._folder is not None:
            request_stop(self._folder)
            self.stop_button.setEnabled(False)
            self.pause_button.setEnabled(False)
            self.words.setText("Stopping; the model is saved first …")

    def pause(self) -> None:
        """Let the training stand still, or go on."""
        if self._folder is not None:
            request_pause(self._folder, self.pause_button.isChecked())
            self._show_pause()

    def _show_pause(self) -> None:
        paused = self.pause_button.isChecked()
        self.pause_button.setText("Go on" if paused else "Pause")
        self.pause_button.setToolTip(
            "Let the training go on where it stands"
            if paused
            else "Let the training stand still, with all it has in memory; Stop ends it and keeps the model"
        )

    def _set_running(self, running: bool) -> None:
        self.setVisible(running)
        self.stop_button.setEnabled(running)
        self.pause_button.setEnabled(running)
        self.pause_button.setChecked(False)
        self._show_pause()
        self.watching.emit(running)

    def _on_seen(self, seen: Seen) -> None:
        status = seen.status
        if seen.run_path is not None:
            self._folder = seen.run_path
            self._follower.follow(seen.run_path)
            self.begun.emit(seen.run_path)
            return
        if status.is_over:
            folder = self._folder
            self.follow(None)
            self.over.emit(folder, seen)
            return
        if self.stop_button.isEnabled():
            memory = f" · {seen.memory_GiB:.1f} GiB" if seen.memory_GiB else ""
            device = f" · on {status.device}" if status.device else ""
            self.words.setText(progress_words(status) + memory + device)
        self.bar.setRange(0, 1000 if status.fraction > 0 else 0)
        self.bar.setValue(int(1000 * status.fraction))
        self.show_plot(drawn(seen.metrics, status.n_epochs))
        self._show_live(seen.live)

    def show_plot(self, plot: Drawn) -> None:
        """Draw the curve of a training, or its parts."""
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


def read_live(path: Path) -> dict[str, NDArray[Any]]:
    """One live picture of a training; empty when it was replaced under the reader."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        return {}


def run_of(job: Path, status: Status) -> Path | None:
    """The run that the process of this training job is fitting."""
    runs = job.parent.parent / "runs"
    for folder in sorted(runs.iterdir(), reverse=True) if runs.is_dir() else []:
        if status.pid and read_status(folder).pid == status.pid:
            return folder
    return None
