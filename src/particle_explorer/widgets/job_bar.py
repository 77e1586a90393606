"""What a background job says of itself: a progress bar with words, Cancel, and its failure in place."""

from __future__ import annotations

import shutil
from pathlib import Path

from qtpy.QtCore import Signal
from qtpy.QtWidgets import (
    QHBoxLayout,
    QLabel,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.status import Status, read_status, request_stop
from particle_explorer.widgets.background import Failure, JobFollower

LOG_NAME = "log.txt"
LOG_BYTES = 20_000
PLAIN = {
    "noise": "measuring the noise",
    "one template": "finding a first average",
    "aligning": "aligning the particles",
    "centring": "centring the particles",
    "neighbours": "comparing particles with each other",
    "laying neighbours out": "laying out what looks alike",
    "first classes": "averaging what looks alike",
    "poses": "finding the poses",
    "ordering": "ordering the map",
    "gauge": "registering the pictures of the map",
    "training": "learning",
    "encoding": "placing every particle",
}
"""What models call their steps, and what they are called here."""


class Complaint(QWidget):
    """One sentence about what went wrong, with the details behind a button; nothing while all is well."""

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.sentence = QLabel()
        self.sentence.setWordWrap(True)
        self.sentence.setStyleSheet("color: #D55E00; font-weight: bold;")
        self.sentence.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.MinimumExpanding)
        self.button = QPushButton("Details")
        self.button.setCheckable(True)
        self.button.setToolTip("Show what the program wrote when it failed")
        self.details = QPlainTextEdit()
        self.details.setReadOnly(True)
        self.details.setMaximumHeight(160)
        row = QHBoxLayout()
        row.addWidget(self.sentence, 1)
        row.addWidget(self.button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addLayout(row)
        layout.addWidget(self.details)
        self.button.toggled.connect(self.details.setVisible)
        self.clear()

    def clear(self) -> None:
        self.sentence.clear()
        self.setVisible(False)

    def show_failure(self, failure: Failure) -> None:
        self.sentence.setText(failure.sentence)
        self.details.setPlainText(failure.details)
        self.button.setVisible(bool(failure.details))
        self.button.setChecked(False)
        self.details.setVisible(False)
        self.setVisible(True)


class JobBar(QWidget):
    """Follows the folder of one job."""

    finished = Signal(object)
    """`Status` of a job that finished"""
    stopped = Signal(object)
    """`Status` of a job that was cancelled"""
    failed = Signal(object)
    """`Failure`"""

    def __init__(self, parent: QWidget | None = None, *, cancel_text: str = "Cancel") -> None:
        super().__init__(parent)
        self.words = QLabel()
        self.words.setWordWrap(True)
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setMaximumHeight(10)
        self.cancel = QPushButton(cancel_text)
        self.cancel.setToolTip("End this job in good order")
        self.cancel.clicked.connect(self._cancel)
        row = QHBoxLayout()
        row.addWidget(self.bar, 1)
        row.addWidget(self.cancel)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        layout.addWidget(self.words)
        layout.addLayout(row)
        self._follower = JobFollower(self, read_job, self._told, every_ms=250)
        self._passing = False
        self.setVisible(False)

    @property
    def folder(self) -> Path | None:
        """Of the job that is followed, None when there is none."""
        return self._follower.folder

    def follow(self, folder: Path, what: str, *, passing: bool = False) -> None:
        """Show how the job of this folder fares; one that is `passing` goes with a job that ends well."""
        self._passing = passing
        self.words.setText(what)
        self.bar.setRange(0, 0)
        self.cancel.setEnabled(True)
        self.setVisible(True)
        self._follower.follow(folder)

    def stop(self) -> None:
        """Look away; the job goes on."""
        self._follower.stop()

    def _cancel(self) -> None:
        if self.folder is not None:
            request_stop(self.folder)
            self.cancel.setEnabled(False)
            self.words.setText("Stopping …")

    def _told(self, told: tuple[Status, str]) -> None:
        status, log_text = told
        if not status.is_over:
            if status.state == "running" and self.cancel.isEnabled():
                self.words.setText(progress_words(status))
                self.bar.setRange(0, 1000 if status.fraction > 0 else 0)
                self.bar.setValue(int(1000 * status.fraction))
            return
        folder = self._follower.folder
        self._follower.follow(None)
        self.setVisible(False)
        if status.state in ("finished", "stopped"):
            if self._passing and folder is not None:
                shutil.rmtree(folder, ignore_errors=True)  # what is still open elsewhere stays
            (self.finished if status.state == "finished" else self.stopped).emit(status)
        else:
            sentence = status.error or "The job ended without a word; its log is under Details"
            self.failed.emit(Failure(sentence, log_text))


def read_job(folder: Path) -> tuple[Status, str]:
    """The status of a job, and, when it failed, the end of its log."""
    status = read_status(folder)
    log = Path(folder) / LOG_NAME
    if status.state in ("failed", "interrupted") and log.exists():
        return status, log.read_text(encoding="utf-8", errors="replace")[-LOG_BYTES:]
    return status, ""


def progress_words(status: Status) -> str:
    """What is being done and how long it will take, for people."""
    words = PLAIN.get(status.what, status.what) or "Starting"
    if status.n_epochs:
        words += f" · epoch {status.epoch} of {status.n_epochs}"
    if status.images_per_second > 0:
        words += f" · {status.images_per_second:,.0f} images/s".replace(",", "\u202f")
    if status.seconds_left >= 0:
        words += f" · {duration(status.seconds_left)} left"
    return words


def duration(seconds: float) -> str:
    """About how long: "8 s", "3 min", "2 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def number(n: int) -> str:
    """Thousands set apart by a thin space: 20 000."""
    return f"{n:,}".replace(",", "\u202f")
