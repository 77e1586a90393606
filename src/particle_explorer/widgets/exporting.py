"""The export form: which particles, in what form, with what of a run; and pictures of averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFormLayout,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.io.joining import micrograph_pixel_size
from particle_explorer.state import AppState
from particle_explorer.widgets.ask import ask_path
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.colours import title_of
from particle_explorer.widgets.job_bar import Complaint, JobBar, number
from particle_explorer.widgets.latent_axes import varies
from particle_explorer.widgets.lifetime import follow

if TYPE_CHECKING:
    from particle_explorer.class_sets import StoredClasses
    from particle_explorer.session import Session
    from particle_explorer.status import Status

ALL, SELECTED, SHOWN, GOOD, SET = "all", "selected", "shown", "good", "set:"
FORMS = {
    ".star": "RELION (.star)",
    ".cs": "cryoSPARC (.cs, .csg)",
    ".csv": "table (.csv)",
    ".tsv": "table (.tsv)",
    ".parquet": "table (.parquet)",
    ".txt": "row numbers (.txt)",
}
TABLES = (".csv", ".tsv", ".parquet")
POSES = {
    "run": "of this run",
    "held": "of this run, a part held still",
    "refined": "refined",
    "none": "as in the particle file",
}


class WhichParticles(QComboBox):
    """The selected particles, all, a set; and more that its owner offers."""

    def __init__(self, state: AppState, tasks: Tasks) -> None:
        super().__init__()
        self.state, self.tasks = state, tasks
        self.more: list[tuple[str, str]] = []
        self._sets: list[str] = []
        self._was_chosen = False
        shrinkable(self)
        self.setToolTip("Which particles are written")
        self.activated.connect(self._on_chosen)
        follow(self, state.session_changed, self._on_session)
        follow(self, state.selection.changed, self.fill)
        follow(self, state.sets_changed, self._read_sets)
        self._on_session(state.session)

    def _on_chosen(self, *_: object) -> None:
        self._was_chosen = True

    def _on_session(self, *_: object) -> None:
        self._was_chosen, self.more, self._sets = False, [], []
        self.fill()
        self._read_sets()

    def _read_sets(self) -> None:
        session = self.state.session
        if session is not None:
            self.tasks.run("sets to export", session.selections.names, self._on_sets, lambda _: None)

    def _on_sets(self, names: list[str]) -> None:
        self._sets = names
        self.fill()

    def fill(self, *_: object, choose: str = "") -> None:
        """List what there is; what was chosen stays, else a selection is taken as soon as there is one."""
        n = self.state.selection.count
        before = choose or (self.currentData() if self._was_chosen or self.more else SELECTED if n else ALL)
        offered = [(f"the {number(n)} selected particles" if n else "the selected particles", SELECTED)]
        offered += [("all particles", ALL), *self.more]
        offered += [(f"set {name}", SET + name) for name in self._sets]
        self.blockSignals(True)
        self.clear()
        for words, what in offered:
            self.addItem(words, what)
        self.setCurrentIndex(max(0, self.findData(before)))
        self.blockSignals(False)
        self.currentIndexChanged.emit(self.currentIndex())

    def why_not(self) -> str:
        """Why these cannot be written, empty where they can."""
        if self.currentData() == SELECTED and not self.state.selection.count:
            return "Select particles on the map first (L: lasso)"
        return ""

    def arguments(self, session: Session, mask: NDArray[np.bool_], chosen: str) -> list[str]:
        """`--selection NAME` for what was `chosen`; a selection gets a name by which a worker finds it. A
        thread's work."""
        if chosen == SELECTED:
            return ["--selection", saved_selection(session, mask)]
        return ["--selection", chosen.removeprefix(SET)] if chosen.startswith(SET) else []


def shrinkable(combo: QComboBox) -> None:
    """Long entries do not widen the dock."""
    combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
    combo.setMinimumContentsLength(10)


def rows_of(*rows: tuple[str, QWidget]) -> QFormLayout:
    """Titles and controls beneath each other."""
    layout = QFormLayout()
    layout.setContentsMargins(0, 0, 0, 0)
    layout.setVerticalSpacing(4)
    layout.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
    for title, control in rows:
        layout.addRow(QLabel(title), control)
    return layout


class PathRow(QWidget):
    """A path, and a button that asks for it."""

    def __init__(self, tip: str, ask: Callable[[str, Callable[[str], object]], object]) -> None:
        super().__init__()
        self.line = QLineEdit()
        self.line.setToolTip(f"<p>{tip}</p>")
        self.button = QPushButton("…")
        self.button.setMaximumWidth(32)
        self.button.setToolTip("Choose it")
        self.button.clicked.connect(lambda: ask(self.line.text(), self.line.setText))
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self.line, 1)
        row.addWidget(self.button)

    def path(self) -> Path:
        return Path(self.line.text().strip()).expanduser()


def words_label() -> QLabel:
    """Words that wrap, can be copied and do not widen the dock."""
    label = QLabel()
    label.setWordWrap(True)
    label.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
    label.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
    return label


class ExportPanel(QWidget):
    """Everything that leaves a session, written by workers, one file after the other."""

    def __init__(self, state: AppState) -> None:
        super().__init__()
        self.state = state
        self.tasks = Tasks(self)
        self.stored: StoredClasses | None = None
        self._files: list[Path] = []
        self._steps: list[list[str]] = []
        self._notes: list[str] = []
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addLayout(self._build_choices())
        layout.addLayout(self._build_what())
        self.path_row = PathRow(
            "The particle file; averages, montage and class set get names beside it", self._ask
        )
        self.path = self.path_row.line
        self.button = QPushButton("Export")
        self.button.clicked.connect(self.export)
        layout.addWidget(self.path_row)
        layout.addWidget(self.button)
        self.question = self._build_question()
        self.complaint = Complaint()
        self.bar = JobBar()
        self.bar.finished.connect(self._on_step)
        self.bar.failed.connect(self._on_failed)
        self.bar.stopped.connect(self._on_stopped)
        self.words = words_label()
        for part in (self.question, self.complaint, self.bar, self.words):
            layout.addWidget(part)

        follow(self, state.session_changed, self._on_session)
        follow(self, state.features_changed, self._list_columns)
        follow(self, state.held_changed, lambda held: self._choose(self.poses, "held" if held else "run"))
        self._on_session(state.session)
        self.path.textChanged.connect(self._on_path)
        self.form.currentIndexChanged.connect(self._on_form)
        for combo in (self.who, self.form, self.classes, self.poses):
            combo.currentIndexChanged.connect(self._update)
        for box in (*self._boxes(), self.recentre):
            box.toggled.connect(self._update)
        self.micrograph_size.valueChanged.connect(self._update)

    # --- parts ------------------------------------------------------------------------------------

    def _build_choices(self) -> QFormLayout:
        self.who = WhichParticles(self.state, self.tasks)
        self.form, self.classes, self.poses = (QComboBox() for _ in range(3))
        for combo in (self.form, self.classes, self.poses):
            shrinkable(combo)
        for suffix, words in FORMS.items():
            self.form.addItem(words, suffix)
        self.form.setToolTip(
            "<p>A star file keeps the dialect of its source. Row numbers are those of the particle file,"
            " counted from 0.</p>"
        )
        self.classes.setToolTip("Column that is written as the class of each particle")
        for name, words in POSES.items():
            self.poses.addItem(words, name)
        self.poses.setToolTip("Whose angles and shifts are written")
        return rows_of(("Which", self.who), ("As", self.form), ("Class", self.classes), ("Poses", self.poses))

    def _build_what(self) -> QVBoxLayout:
        self.particles = QCheckBox("Particles")
        self.particles.setToolTip("The particle file itself, with all columns that the source has")
        self.latents = QCheckBox("with coordinates on the map")
        self.latents.setToolTip(
            "<p>As columns explorerZ0, explorerZ1 … of a star file, fields explorer/z_0 … of a cs file</p>"
        )
        self.every_column = QCheckBox("with every column of the source")
        self.every_column.setToolTip("Tables have classes, poses and coordinates; star and cs files have all")
        self.recentre = QCheckBox("recentred, to extract them again")
        self.recentre.setToolTip(
            "<p>Moves rlnCoordinateX and Y to where the particles are, by whole pixels of the micrograph;"
            " what is left stays in the origins</p>"
        )
        self.micrograph_size = QDoubleSpinBox()
        self.micrograph_size.setDecimals(4)
        self.micrograph_size.setRange(0, 1000)
        self.micrograph_size.setSuffix(" Å/px")
        self.micrograph_size.setSpecialValueText("Å/px ?")
        self.micrograph_size.setToolTip("Pixel size of the micrographs, which the particle file does not say")
        self.averages = QCheckBox("Averages (.mrcs)")
        self.averages.setToolTip("The averages that are shown, as an image stack")
        self.montage = QCheckBox("Montage (.png)")
        self.montage.setToolTip("The averages that are shown side by side, by rows")
        self.class_set = QCheckBox("Class set for RELION and cryoSPARC (folder)")
        self.class_set.setToolTip(
            "<p>Averages, model, data and chosen classes as RELION's class display opens them, templates for"
            " cryoSPARC and a montage, in a new folder beside the particle file. Chosen are classes marked"
            " good; where none is, those that are not marked bad.</p>"
        )
        self.report = QCheckBox("Report (.html)")
        self.report.setToolTip("<p>Averages, curves, counts and all settings on one page</p>")
        self.aligned = QCheckBox("Aligned images (interpolated)")
        self.aligned.setToolTip(
            "<p>The particles turned and shifted in their pixels, as NAME_aligned.star with a stack; the"
            " angle of the CTF turns with them. Only for programs that know no poses: poses lose nothing,"
            " this does.</p>"
        )
        for box in (self.particles, self.averages):
            box.setChecked(True)
        layout = QVBoxLayout()
        layout.setSpacing(3)
        layout.addWidget(self.particles)
        for box in (self.latents, self.every_column, self.recentre):
            row = QHBoxLayout()
            row.setContentsMargins(18, 0, 0, 0)
            row.addWidget(box)
            layout.addLayout(row)
        row.addWidget(self.micrograph_size)
        row.addStretch(1)
        row = QHBoxLayout()
        row.addWidget(self.averages)
        row.addWidget(self.montage)
        row.addStretch(1)
        layout.addLayout(row)
        for box in (self.class_set, self.report, self.aligned):
            layout.addWidget(box)
        return layout

    def _build_question(self) -> QWidget:
        question = QWidget()
        self.question_words = QLabel()
        self.question_words.setWordWrap(True)
        self.replace_button, self.keep_button = QPushButton("Replace"), QPushButton("Keep")
        self.replace_button.setToolTip("Write the new files in their place")
        self.keep_button.setToolTip("Leave them as they are and write nothing")
        self.replace_button.clicked.connect(self._replace)
        self.keep_button.clicked.connect(lambda: self.question.setVisible(False))
        row = QHBoxLayout(question)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self.question_words, 1)
        row.addWidget(self.replace_button)
        row.addWidget(self.keep_button)
        question.setVisible(False)
        return question

    # --- what there is ----------------------------------------------------------------------------

    def _on_session(self, session: Session | None) -> None:
        self.stored = None
        self.complaint.clear()
        self.words.clear()
        self.question.setVisible(False)
        if session is not None:
            self.path.setText(str(default_export(session)))
        self._list_columns()

    def show_averages(self, stored: StoredClasses) -> None:
        """The averages that are looked at."""
        first = self.stored is None or self.stored.name != stored.name
        self.stored = stored
        self.who.more = [
            ("particles of the averages shown", SHOWN),
            ("particles of the good averages", GOOD),
        ]
        self.who.fill(choose=SHOWN if first else "")

    def _list_columns(self) -> None:
        before = self.classes.currentData()
        names = [name.partition(" ")[0] for name in groupings(self.state.features)]
        self.classes.blockSignals(True)
        self.classes.clear()
        self.classes.addItem("as in the particle file", "none")
        for name in names:
            self.classes.addItem(title_of(name), name)
        self.classes.blockSignals(False)
        self._choose(self.classes, before if before in names else names[-1] if names else "none")
        self._update()

    def _choose(self, combo: QComboBox, data: str) -> None:
        combo.setCurrentIndex(max(0, combo.findData(data)))

    def _update(self, *_: object) -> None:
        """What can be asked for, and why the rest cannot."""
        run, who = self.state.run, self.who.currentData()
        suffix = self.form.currentData()
        wanted = self.particles.isChecked()
        of_averages = who in (SHOWN, GOOD)
        for part in (self.who, self.form, self.classes, self.poses):
            part.setEnabled(wanted)
        self.classes.setEnabled(wanted and not of_averages and suffix != ".txt")
        self.poses.setEnabled(wanted and not of_averages and suffix != ".txt" and run is not None)
        self.poses.setToolTip(
            "The pose that each particle was averaged at is written"
            if of_averages
            else "Whose angles and shifts are written"
        )
        self.latents.setEnabled(wanted and run is not None and suffix in (".star", ".cs"))
        self.every_column.setEnabled(wanted and suffix in TABLES)
        can_recentre = wanted and suffix == ".star" and "rlnCoordinateX" in self.state.features
        self.recentre.setEnabled(can_recentre)
        recentred = self._asked(self.recentre)
        says = recentred and bool(np.isfinite(micrograph_pixel_size(self.state.features)).all())
        self.micrograph_size.setVisible(recentred and not says)
        for box in self._boxes()[1:]:
            box.setEnabled(self.stored is not None)
        reason = self._why_not()
        self.button.setEnabled(not reason)
        self.button.setToolTip(reason or "Write the files and read them again")

    def _why_not(self) -> str:
        if self.bar.folder is not None:
            return "An export is being written"
        if not any(self._asked(box) for box in self._boxes()):
            return "Choose what to export"
        if not self.micrograph_size.isHidden() and not self.micrograph_size.value():
            return "Give the pixel size of the micrographs, to recentre"
        return self.who.why_not() if self.particles.isChecked() else ""

    def _boxes(self) -> tuple[QCheckBox, ...]:
        averages = (self.averages, self.montage, self.class_set, self.report, self.aligned)
        return (self.particles, *averages)

    def _asked(self, box: QCheckBox) -> bool:
        return box.isChecked() and box.isEnabled()

    # --- the path and its ending --------------------------------------------------------------------

    def _on_form(self, *_: object) -> None:
        path = Path(self.path.text())
        if self.path.text() and path.suffix.lower() != self.form.currentData():
            self.path.setText(str(path.with_suffix(self.form.currentData())))

    def _on_path(self, text: str) -> None:
        found = self.form.findData(Path(text).suffix.lower())
        if found >= 0:
            self.form.setCurrentIndex(found)

    def _ask(self, start: str, chosen: Callable[[str], object]) -> None:
        patterns = " ".join(f"*{suffix}" for suffix in FORMS)
        ask_path(
            self,
            "Export particles",
            chosen,
            kind="save",
            start=start,
            patterns=f"Particle files ({patterns})",
        )

    def out(self) -> Path:
        """The particle file."""
        path = Path(self.path.text()).expanduser()
        known = path.suffix.lower() in FORMS
        return path if known else path.with_name(path.name + self.form.currentData())

    def files(self) -> list[Path]:
        """What would be written and could be in the way."""
        out = self.out()
        wanted = (
            (self.particles, out),
            (self.averages, out.with_suffix(".mrcs")),
            (self.montage, out.with_suffix(".png")),
            (self.report, out.with_suffix(".html")),
            (self.aligned, out.with_name(f"{out.stem}_aligned.star")),
        )
        return [path for box, path in wanted if self._asked(box)]

    # --- writing ----------------------------------------------------------------------------------

    def export(self) -> None:
        """Export, or ask first when a file is there already."""
        self.words.clear()
        there = [path.name for path in self.files() if path.exists()]
        if there:
            plural = "s" if len(there) == 1 else ""
            self.question_words.setText(f"{' and '.join(there)} exist{plural} already.")
            self.question.setVisible(True)
            return
        self._start(overwrite=False)

    def _replace(self) -> None:
        self.question.setVisible(False)
        self._start(overwrite=True)

    def _start(self, *, overwrite: bool) -> None:
        session, stored = self.state.session, self.stored
        if session is None:
            return
        self.complaint.clear()
        mask = np.array(self.state.selection.mask)
        self._files = self.files()
        self._steps = [self.arguments(path, overwrite=overwrite) for path in self._files]
        if stored is not None and self._asked(self.class_set):
            folder = unused_folder(self.out())
            self._files = [*self._files, folder]
            self._steps.append(
                ["export-classes", str(session.path), "--out", str(folder), "--averages", stored.name]
            )
        self.button.setEnabled(False)
        who = str(self.who.currentData())
        self._notes = []
        self.tasks.run(
            "export",
            lambda: self.who.arguments(session, mask, who) if self._any_particles() else [],
            self._on_selection_saved,
            self._on_failed,
        )

    def _any_particles(self) -> bool:
        return any(_is_particles(step) for step in self._steps)

    def _on_selection_saved(self, selection: list[str]) -> None:
        self._steps = [[*step, *selection] if _is_particles(step) else step for step in self._steps]
        if selection:
            self.state.sets_changed.emit()
        self._on_step(None)

    def arguments(self, path: Path, *, overwrite: bool) -> list[str]:
        """The command line that writes one file."""
        assert self.state.session is not None
        run, who, suffix = self.state.run, str(self.who.currentData()), path.suffix.lower()
        if self.stored is not None and (suffix == ".html" or path.name.endswith("_aligned.star")):
            command = "report-classes" if suffix == ".html" else "export-aligned"
            found = [command, str(self.state.session.path), "--averages", self.stored.name]
            return [*found, "--out", str(path), *(["--overwrite"] if overwrite else [])]
        found = ["export", str(self.state.session.path), "--out", str(path)]
        if suffix in (".mrcs", ".png"):
            assert self.stored is not None
            found += ["--members", self.stored.name]
            return [*found, "--overwrite"] if overwrite else found
        found += ["--run", run.name] if run is not None else []
        if who in (SHOWN, GOOD):
            assert self.stored is not None
            found += ["--members", self.stored.name, *(["--good"] if who == GOOD else [])]
        elif suffix != ".txt":
            found += ["--classes", self.classes.currentData()]
            found += ["--poses", self.poses.currentData()] if run is not None else []
        for box, option in (
            (self.latents, "--latents"),
            (self.every_column, "--every-column"),
            (self.recentre, "--recentre"),
        ):
            found += [option] if self._asked(box) else []
        if not self.micrograph_size.isHidden():
            found += ["--micrograph-pixel-size-A", f"{self.micrograph_size.value():g}"]
        return [*found, "--overwrite"] if overwrite else found

    def _on_step(self, status: Status | None) -> None:
        """Start the next worker; after the last, say what was written."""
        from particle_explorer import jobs

        session = self.state.session
        self._notes += [] if status is None else [note for note in status.notes if note not in self._notes]
        if not self._steps or session is None:
            self.words.setText(written_words(self._files, self._notes))
            self._update()
            return
        arguments = self._steps.pop(0)
        self.tasks.run(
            "export",
            lambda: jobs.start(arguments, session.new_job(arguments[0])),
            lambda folder: self.bar.follow(folder, "Exporting"),
            self._on_failed,
        )

    def _on_stopped(self, _: object) -> None:
        self._steps = []
        self.words.setText("Cancelled.")
        self._update()

    def _on_failed(self, failure: Failure) -> None:
        self._steps = []
        self.complaint.show_failure(failure)
        self._update()


def groupings(features: Any) -> list[str]:
    """Columns that put particles into a few groups, the newest last."""
    found = []
    for name in map(str, features.columns):
        column = features[name]
        if name.startswith("cluster") or (name == "class_id" and varies(column)):
            found.append(name)
    return found


def written_words(files: Sequence[Path], notes: Sequence[str]) -> str:
    """What was written where, and what there is to know of it."""
    names = ", ".join(path.name for path in files)
    return "\n".join([f"Written into {files[0].parent}: {names}", *(f"· {note}" for note in notes)])


def _is_particles(step: list[str]) -> bool:
    return step[0] == "export" and "--members" not in step


def saved_selection(session: Session, mask: NDArray[np.bool_]) -> str:
    """Keep what is selected under a name by which a worker finds it; the same selection again keeps its."""
    names = [name for name in session.selections.names() if name.startswith("exported-")]
    for name in names:
        if np.array_equal(session.selections.mask(name), mask):
            return name
    n = 1
    while f"exported-{n}" in names:
        n += 1
    session.selections.save(f"exported-{n}", mask, how="exported")
    return f"exported-{n}"


def unused_folder(out: Path) -> Path:
    """NAME_classes beside a particle file, or NAME_classes-2 …, the first that is not there."""
    folder, n = out.with_name(f"{out.stem}_classes"), 1
    while folder.exists():
        n += 1
        folder = out.with_name(f"{out.stem}_classes-{n}")
    return folder


def default_export(session: Session) -> Path:
    """Where an export goes unless another place is chosen: beside the session, in the source's own format."""
    suffix = ".cs" if session.info.source_kind == "cs" else ".star"
    return session.path / "export" / f"{session.path.name.removesuffix('_explorer')}{suffix}"
