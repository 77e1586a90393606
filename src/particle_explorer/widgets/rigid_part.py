"""A box to tick that holds the most rigid part of the map still, and the job that finds it first."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qtpy.QtWidgets import QCheckBox, QLabel, QVBoxLayout, QWidget

from particle_explorer.state import AppState, Opened, read
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.job_bar import JobBar
from particle_explorer.widgets.lifetime import follow

if TYPE_CHECKING:
    from particle_explorer.session import Run


class RigidPart(QWidget):
    """Ticked while a part is held still; ticking it finds one where the run has none."""

    def __init__(self, state: AppState, failed: Callable[[Failure], None]) -> None:
        super().__init__()
        self.state, self._failed = state, failed
        self.tasks = Tasks(self)
        self.held = QCheckBox("Hold the most rigid part still")
        self.held.toggled.connect(self._on_held)
        self.held.setToolTip(
            "<p>Turns the frames along the map so that the part that changes least stays where it is;"
            " motion is then seen relative to it.</p>"
        )
        self.words = QLabel()
        self.words.setWordWrap(True)
        self.words.setVisible(False)
        self.bar = JobBar()
        self.bar.finished.connect(self._on_held_ready)
        self.bar.stopped.connect(self._on_stopped)
        self.bar.failed.connect(self._on_held_failed)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        for part in (self.held, self.words, self.bar):
            layout.addWidget(part)
        follow(self, state.held_changed, self._show_held)

    def stop(self) -> None:
        """Look away; the job goes on."""
        self.tasks.stop()
        self.bar.stop()

    def _on_held(self, wanted: bool) -> None:
        run = self.state.run
        if run is None or wanted == self.state.held or self.bar.folder is not None:
            return
        if not wanted:
            self.state.set_held(False)
        elif run.gauge() is not None:
            self.state.set_held(True)
        else:
            self._start_holding(run)

    def _start_holding(self, run: Run) -> None:
        from particle_explorer import jobs

        self.held.setEnabled(False)
        self.tasks.run(
            "hold still",
            lambda: jobs.start(["hold-still", str(run.path), "--auto"], run.session.new_job("hold-still")),
            lambda folder: self.bar.follow(folder, "Finding the part that changes least"),
            self._on_held_failed,
        )

    def _on_held_ready(self, _: object) -> None:
        session, run = self.state.session, self.state.run

        def done(opened: Opened) -> None:
            self.held.setEnabled(True)
            if self.state.run is run:
                self.state.set_features(opened.features)
                self.state.set_held(True)

        self.tasks.run("held", lambda: read(session, run), done, self._on_held_failed)

    def _on_held_failed(self, failure: Failure) -> None:
        self.held.setEnabled(True)
        self.held.setChecked(False)
        self._failed(failure)

    def _show_held(self, held: bool) -> None:
        self.held.setChecked(held)
        run = self.state.run
        gauge = run.gauge() if held and run is not None else None
        self.words.setText("" if gauge is None else gauge_words(gauge))
        self.words.setVisible(bool(self.words.text()))

    def _on_stopped(self, _: object) -> None:
        self.held.setEnabled(True)
        self.held.setChecked(False)


def gauge_words(gauge: dict[str, Any]) -> str:
    """By how much the frames were turned to hold the part still."""
    turned = gauge.get("largest_turn_deg")
    return "" if turned is None else f"The frames were turned by up to {float(turned):.0f}°."
