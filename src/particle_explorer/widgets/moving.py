"""Between projects and programs: another extraction of the same particles, star files joined, coordinates
that another program found. Each is one command of a worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from qtpy.QtCore import Signal
from qtpy.QtWidgets import QComboBox, QLabel, QLineEdit, QPushButton, QVBoxLayout, QWidget

from particle_explorer.state import AppState
from particle_explorer.widgets.ask import ask_path, ask_paths
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.exporting import (
    POSES,
    PathRow,
    WhichParticles,
    rows_of,
    shrinkable,
    words_label,
    written_words,
)
from particle_explorer.widgets.job_bar import Complaint, JobBar, number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.number_box import Number

if TYPE_CHECKING:
    from particle_explorer.session import Session
    from particle_explorer.status import Status


class JobPanel(QWidget):
    """A few choices, one button, and the worker that it starts."""

    def __init__(self, state: AppState, about: str, button: str) -> None:
        super().__init__()
        self.state = state
        self.tasks = Tasks(self)
        self.about = QLabel(about)
        self.about.setWordWrap(True)
        self.button = QPushButton(button)
        self.complaint = Complaint()
        self.bar = JobBar()
        self.words = words_label()
        self.bar.finished.connect(self._on_finished)
        self.bar.stopped.connect(lambda _: self._say("Cancelled; nothing was written."))
        self.bar.failed.connect(self._fail)

    def _lay_out(self, choices: QWidget) -> None:
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 4)
        layout.setSpacing(4)
        for part in (self.about, choices, self.button, self.complaint, self.bar, self.words):
            layout.addWidget(part)

    def stop(self) -> None:
        """End the threads of this panel and look away; a job goes on."""
        self.tasks.stop()
        self.bar.stop()

    def _start(self, arguments: Callable[[], list[str]], words: str, session: Session | None = None) -> None:
        """Start a worker; `arguments` are made in a thread."""
        from particle_explorer import jobs

        def work() -> Path:
            line = arguments()
            if session is not None:
                return jobs.start(line, session.new_job(line[0]))
            return jobs.start_passing(line)

        self.complaint.clear()
        self._say("")
        self.button.setEnabled(False)
        passing = session is None
        self.tasks.run(
            "start", work, lambda folder: self.bar.follow(folder, words, passing=passing), self._fail
        )

    def _say(self, words: str) -> None:
        self.words.setText(words)
        self.update_button()

    def _fail(self, failure: Failure) -> None:
        self.complaint.show_failure(failure)
        self.update_button()

    def _on_finished(self, status: Status) -> None:
        self._say(written_words([Path(status.message)], status.notes))

    def update_button(self, *_: object) -> None:
        """Whether the job can be started, and why not."""
        reason = "It is being done" if self.bar.folder is not None else self.why_not()
        self.button.setEnabled(not reason)
        self.button.setToolTip(reason or self.about.text())

    def why_not(self) -> str:
        """Why the job cannot be started now; empty where it can."""
        raise NotImplementedError


class TransferPanel(JobPanel):
    """Classes and poses of this session written onto another extraction of the same particles."""

    def __init__(self, state: AppState) -> None:
        about = (
            "Finds particles by micrograph and coordinate in another particle file, e.g. the unbinned one."
        )
        super().__init__(state, about, "Write them there")
        self.who = WhichParticles(state, self.tasks)
        self.source = PathRow("The star or cs file of the other extraction", self._ask_source)
        self.out = PathRow("The file to write: rows of the other extraction", self._ask_out)
        self.poses = QComboBox()
        shrinkable(self.poses)
        for name, words in POSES.items():
            self.poses.addItem(words, name)
        self.poses.setToolTip("Whose angles and shifts are written")
        self.tolerance = Number(0.01, 10_000, "px")
        self.tolerance.value = 2.0
        near: QWidget = self.tolerance.native
        near.setToolTip(
            "<p>How far apart the coordinates of one particle may lie, in pixels of the micrograph</p>"
        )
        choices = QWidget()
        choices.setLayout(
            rows_of(
                ("Which", self.who),
                ("In", self.source),
                ("Poses", self.poses),
                ("Within", near),
                ("Write to", self.out),
            )
        )
        self._lay_out(choices)
        self.button.clicked.connect(self.transfer)
        self.source.line.textChanged.connect(self._propose)
        self.out.line.textChanged.connect(self.update_button)
        self.who.currentIndexChanged.connect(self.update_button)
        follow(self, state.run_changed, self.update_button)
        self.update_button()

    def _ask_source(self, start: str, chosen: Callable[[str], object]) -> None:
        start = start or ("" if self.state.session is None else str(self.state.session.path.parent))
        ask_path(self, "The other extraction", chosen, start=start, patterns="Particles (*.star *.cs)")

    def _ask_out(self, start: str, chosen: Callable[[str], object]) -> None:
        patterns = "Particle files (*.star *.cs)"
        ask_path(self, "File to write", chosen, kind="save", start=start, patterns=patterns)

    def _propose(self, text: str) -> None:
        path = Path(text.strip())
        if path.suffix and not path.is_dir():
            self.out.line.setText(str(path.with_name(f"{path.stem}_explored{path.suffix}")))
        self.update_button()

    def why_not(self) -> str:
        if self.state.session is None:
            return "Open a session first"
        if not (self.source.line.text().strip() and self.out.line.text().strip()):
            return "Choose the particle file of the other extraction"
        return self.who.why_not()

    def transfer(self) -> None:
        """Start the worker."""
        session, run, who = self.state.session, self.state.run, str(self.who.currentData())
        if session is None:
            return
        mask = np.array(self.state.selection.mask)
        line = ["transfer", str(session.path), "--to", str(self.source.path()), "--out", str(self.out.path())]
        line += ["--tolerance-px", str(self.tolerance.value)]
        line += [] if run is None else ["--run", run.name, "--poses", self.poses.currentData()]
        self._start(lambda: line + self.who.arguments(session, mask, who), "Finding the particles", session)


class JoinPanel(JobPanel):
    """Several star files made one."""

    joined = Signal(object)
    """Path of the new file"""

    def __init__(self, state: AppState) -> None:
        super().__init__(state, "Makes one star file of several, to explore them together.", "Join and open")
        self.files: list[Path] = []
        self.choose_button = QPushButton("Choose the star files…")
        self.choose_button.setToolTip("Choose two star files or more, of one dialect (Ctrl and click)")
        self.choose_button.clicked.connect(self._ask_files)
        self.out = PathRow("The star file to write", self._ask_out)
        choices = QWidget()
        choices.setLayout(rows_of(("Files", self.choose_button), ("Write to", self.out)))
        self._lay_out(choices)
        self.button.clicked.connect(self.join)
        self.out.line.textChanged.connect(self.update_button)
        self.update_button()

    def _ask_files(self) -> None:
        ask_paths(
            self,
            "Star files to join",
            lambda chosen: self.choose([Path(path) for path in chosen]),
            patterns="Star files (*.star)",
        )

    def choose(self, files: list[Path]) -> None:
        """These are to be joined."""
        self.files = files
        self.choose_button.setText(f"{number(len(files))} star files")
        self.choose_button.setToolTip("\n".join(map(str, files)))
        if files:
            self.out.line.setText(str(files[0].with_name(f"{files[0].stem}_joined.star")))
        self.update_button()

    def _ask_out(self, start: str, chosen: Callable[[str], object]) -> None:
        ask_path(self, "File to write", chosen, kind="save", start=start, patterns="Star files (*.star)")

    def why_not(self) -> str:
        if len(self.files) < 2:
            return "Choose two star files or more"
        return "" if self.out.line.text().strip() else "Say what the new file is called"

    def join(self) -> None:
        """Start the worker."""
        line = ["merge", *map(str, self.files), "--out", str(self.out.path())]
        self._start(lambda: line, "Joining the files")

    def _on_finished(self, status: Status) -> None:
        super()._on_finished(status)
        self.joined.emit(Path(status.message))


class CoordinatesPanel(JobPanel):
    """Latent coordinates of another program as a run."""

    imported = Signal(object)
    """Path of the run"""

    def __init__(self, state: AppState) -> None:
        about = "Explore coordinates that another program found (cryoDRGN, RECOVAR, cryoSPARC …) as a run."
        super().__init__(state, about, "Take them as a run")
        self.file = PathRow(
            "A .npy, .npz, .csv, .tsv, .parquet, .star or .cs file; rows are joined by uid, in a star file by"
            " image name, else by order",
            self._ask_file,
        )
        self.columns = QLineEdit()
        self.columns.setPlaceholderText("automatic")
        self.columns.setToolTip(
            "<p>Columns or fields that are the coordinates, parted by commas, as components_mode_0/value; by"
            " default z_0, z_1 …, else all that hold numbers</p>"
        )
        choices = QWidget()
        choices.setLayout(rows_of(("File", self.file), ("Columns", self.columns)))
        self._lay_out(choices)
        self.button.clicked.connect(self.take)
        self.file.line.textChanged.connect(self.update_button)
        self.update_button()

    def _ask_file(self, start: str, chosen: Callable[[str], object]) -> None:
        start = start or ("" if self.state.session is None else str(self.state.session.path.parent))
        patterns = "Coordinates (*.npy *.npz *.csv *.tsv *.parquet *.star *.cs);;All files (*)"
        ask_path(self, "Coordinates of the particles", chosen, start=start, patterns=patterns)

    def why_not(self) -> str:
        if self.state.session is None:
            return "Open a session first"
        return "" if self.file.line.text().strip() else "Choose a file"

    def take(self) -> None:
        """Start the worker."""
        session, columns = self.state.session, self.columns.text().strip()
        if session is None:
            return
        line = ["import-latents", str(session.path), str(self.file.path())]
        line += ["--columns", columns] if columns else []
        self._start(lambda: line, "Reading the coordinates", session)

    def _on_finished(self, status: Status) -> None:
        self._say("\n".join(f"· {note}" for note in status.notes))
        self.imported.emit(Path(status.message))
