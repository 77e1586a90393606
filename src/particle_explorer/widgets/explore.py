"""The Explore dock: everything that starts from the handle: positions, what is held still, paths, groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtpy.QtWidgets import QLabel, QVBoxLayout, QWidget

from particle_explorer.state import Opened, read
from particle_explorer.status import Status
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.form import Folded
from particle_explorer.widgets.job_bar import Complaint, JobBar
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.workspace import state_of, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import Run
    from particle_explorer.widgets.reconstruction import Reconstruction

GROUPS = "Layouts and groups"

Finished = Callable[[Status], None]


class Worker(QWidget):
    """One background job at a time for all parts of a dock, with its bar and what it complains about."""

    def __init__(self, viewer: napari.Viewer) -> None:
        super().__init__()
        self.state = state_of(viewer)
        self.tasks = Tasks(self)
        self.bar = JobBar()
        self.complaint = Complaint()
        self._finished: Finished = lambda _: None
        self._starting = False
        self._waiters: list[Callable[[], None]] = []
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.bar)
        layout.addWidget(self.complaint)
        self.bar.finished.connect(self._on_finished)
        self.bar.stopped.connect(lambda _: self._tell())
        self.bar.failed.connect(self.fail)

    @property
    def busy(self) -> bool:
        return self._starting or self.bar.folder is not None

    def when_changed(self, function: Callable[[], None]) -> None:
        """Call `function` whenever a job has begun or ended."""
        self._waiters.append(function)

    def start(
        self,
        kind: str,
        arguments: Callable[[Run, Path], list[str]],
        words: str,
        finished: Finished,
    ) -> None:
        """Run `particle-explorer KIND RUN …` on the run that is shown.

        `arguments` is called in a thread with the run and the folder of the job, and may write files there.
        """
        from particle_explorer import jobs

        run = self.state.run
        if run is None or self.busy:
            return
        self.complaint.clear()
        self._starting = True
        self._tell()

        def work() -> Path:
            folder = run.session.new_job(kind)
            return jobs.start([kind, *arguments(run, folder)], folder)

        def started(folder: Path) -> None:
            self._finished, self._starting = finished, False
            self.bar.follow(folder, words)
            self.state.job_changed.emit(str(folder))
            self._tell()

        self.tasks.run("start job", work, started, self.fail)

    def read_again(self, then: Callable[[], None] = lambda: None) -> None:
        """Show the columns that a job has written."""
        session, run = self.state.session, self.state.run

        def done(opened: Opened) -> None:
            if opened.run is not None and self.state.run is run:
                self.state.set_features(opened.features)
                then()

        self.tasks.run("columns again", lambda: read(session, run), done, self.fail)

    def fail(self, failure: Failure) -> None:
        self._starting = False
        self.complaint.show_failure(failure)
        self._tell()

    def stop(self) -> None:
        self.tasks.stop()
        self.bar.stop()

    def _on_finished(self, status: Status) -> None:
        self._tell()
        self._finished(status)

    def _tell(self) -> None:
        for waiter in self._waiters:
            waiter()


class ExploreDock(QWidget):
    """Around the handle; a run must be shown."""

    def __init__(self, napari_viewer: napari.Viewer, reconstruction: Reconstruction) -> None:
        from particle_explorer.widgets.groups import GroupsPanel
        from particle_explorer.widgets.handle_panel import HandlePanel
        from particle_explorer.widgets.hold_still import HoldStillPanel
        from particle_explorer.widgets.paths_panel import PathsPanel

        super().__init__()
        self.viewer = unwrapped(napari_viewer)
        self.state = state_of(self.viewer)
        self.worker = Worker(self.viewer)
        self.no_run = QLabel("Train a map first (tab Train); here one walks through it.")
        self.no_run.setWordWrap(True)
        self.handle = HandlePanel(self.viewer, self, reconstruction)
        self.hold_still = HoldStillPanel(self.viewer, self.worker, reconstruction)
        self.paths = PathsPanel(self.viewer, self.worker)
        self.groups = GroupsPanel(self.viewer, self.worker)
        self.parts = [
            Folded(title, part)
            for title, part in (
                ("Position", self.handle),
                ("Hold a part still", self.hold_still),
                ("Paths", self.paths),
                (GROUPS, self.groups),
            )
        ]
        for part in self.parts:
            part.button.toggled.connect(partial(self._fold_others, part))
        self.parts[0].button.setChecked(True)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(6, 6, 6, 6)
        layout.setSpacing(3)
        layout.addWidget(self.no_run)
        layout.addWidget(self.worker)
        for part in self.parts:
            layout.addWidget(part)
        layout.addStretch(1)
        follow(self, self.state.run_changed, self._on_run)
        follow(self, self.state.session_changed, self._on_run)
        self._on_run()

    def show_groups(self) -> None:
        """Unfold layouts and groups, with the keyboard in them."""
        self.show_part(GROUPS)
        self.groups.take_focus()

    def show_part(self, name: str) -> None:
        """Unfold one part by its title."""
        for part in self.parts:
            if part.button.text() == name:
                part.button.setChecked(True)

    def shutdown(self) -> None:
        """End all background work of this dock; jobs go on."""
        self.worker.stop()
        self.handle.stop()
        for panel in (self.paths, self.groups):
            panel.tasks.stop()

    def _fold_others(self, shown: Folded, on: bool) -> None:
        for part in self.parts if on else ():
            if part is not shown:
                part.button.setChecked(False)

    def _on_run(self, *_: Any) -> None:
        drawable = self.state.run is not None
        self.no_run.setVisible(not drawable)
        self.worker.complaint.clear()
        for part in self.parts:
            part.setVisible(drawable)
