"""The Classes dock: average particles, look at the averages and their quality, export both."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import Qt, QTimer
from qtpy.QtGui import QKeySequence, QShortcut
from qtpy.QtWidgets import (
    QComboBox,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QScrollArea,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.state import Opened, read
from particle_explorer.status import Status
from particle_explorer.widgets.average_form import GRID, SELECTION, AverageForm
from particle_explorer.widgets.average_words import (
    SHARED,
    made_words,
    quality_words,
    refined_words,
)
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.class_layer import ClassLayer
from particle_explorer.widgets.class_tools import ClassTools, MembersPanel
from particle_explorer.widgets.exporting import ExportPanel
from particle_explorer.widgets.form import Folded
from particle_explorer.widgets.job_bar import Complaint, JobBar, number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.moving import TransferPanel
from particle_explorer.widgets.painted import Curve, CurveView
from particle_explorer.widgets.set_comparison import SetComparison
from particle_explorer.widgets.workspace import state_of, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.class_sets import StoredClasses
    from particle_explorer.session import Session


class ClassesDock(QWidget):
    """Averages of the current selection or of clusters."""

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        super().__init__()
        self.viewer = unwrapped(napari_viewer)
        self.state = state_of(self.viewer)
        self.tasks = Tasks(self)
        self.picture = ClassLayer(self.viewer, self._look_at, self.mark)
        self.stored: StoredClasses | None = None
        self._after: Callable[[], None] | None = None

        self.no_run = QLabel("Train a map first (tab Train); averages are aligned with the poses it infers.")
        self.no_run.setWordWrap(True)
        self.complaint = Complaint()
        self.make = AverageForm(self.state, self._on_failed)
        self.make.average_asked.connect(self.average)
        self.make.halves_asked.connect(self.average_halves)
        self.make.refine_asked.connect(self.refine)
        self.bar = JobBar()
        self.bar.finished.connect(self._on_averaged)
        self.bar.stopped.connect(self._on_stopped)
        self.bar.failed.connect(self._on_failed)
        self.results = self._build_results()
        self.exporting = ExportPanel(self.state)
        self.export_part = Folded("Export…", self.exporting)
        self.transfer = TransferPanel(self.state)
        self.transfer_part = Folded("Onto another extraction…", self.transfer)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(6, 6, 6, 6)
        layout.setSpacing(5)
        for part in (
            self.no_run,
            self.make,
            self.complaint,
            self.bar,
            self.results,
            self.export_part,
            self.transfer_part,
        ):
            layout.addWidget(part)
        layout.addStretch(1)

        follow(self, self.state.session_changed, self._on_session)
        follow(self, self.state.features_changed, self._update_buttons)
        follow(self, self.state.classes_changed, self._list_sets)
        self._on_session(self.state.session)
        self._update_buttons()

    # --- parts ------------------------------------------------------------------------------------

    def _build_results(self) -> QWidget:
        page = QWidget()
        self.sets = QComboBox()
        self.sets.setToolTip("Averages made in this session")
        self.sets.activated.connect(self._show_chosen_set)
        self.one = QComboBox()
        self.one.setToolTip("One average; or click it in the picture")
        self.one.currentIndexChanged.connect(self._show_quality)
        row = QHBoxLayout()
        row.addWidget(QLabel("Shown"))
        row.addWidget(self.sets, 1)
        row.addWidget(self.one, 1)
        self.quality = CurveView(x_label="Å", height=130)
        self.quality_words = QLabel(SHARED)
        self.quality_words.setWordWrap(True)
        self.quality_words.setToolTip(
            "<p>Both halves were aligned to the same map, so they agree in part because of that map:"
            " this curve is an upper bound, not a resolution.</p>"
        )
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addLayout(row)
        layout.addLayout(self._build_marks(page))
        self.tools = ClassTools()
        self.tools.current_changed.connect(self._look_at)
        self.tools.order_changed.connect(self._draw_montage)
        self.tools.amended.connect(self.amend)
        self.members = MembersPanel(self.state)
        self.members.leave_out.connect(self._leave_out)
        self.members_part = Folded("Members", self.members)
        self.members_part.button.toggled.connect(self._show_members)
        self.examine_button = QPushButton("Examine")
        self.examine_button.setToolTip(
            "<p>Compares all members with their averages: residuals, mirror partners, symmetries</p>"
        )
        self.examine_button.clicked.connect(self.examine)
        self.comparison = SetComparison(self.state, self._on_failed)
        self.made_words = QLabel()
        self.made_words.setWordWrap(True)
        self.made_words.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        layout.addWidget(Folded("List: sort, join, divide, rename", self.tools))
        layout.addWidget(self.quality)
        layout.addWidget(self.quality_words)
        layout.addWidget(self.made_words)
        layout.addWidget(self.examine_button)
        layout.addWidget(self.members_part)
        layout.addWidget(Folded("Compare with another set", self.comparison))
        return page

    def _build_marks(self, page: QWidget) -> QHBoxLayout:
        self.good_button, self.bad_button = QPushButton("Good"), QPushButton("Bad")
        row = QHBoxLayout()
        for button, mark in ((self.good_button, "good"), (self.bad_button, "bad")):
            key = mark[0].upper()
            button.setToolTip(f"Mark this average {mark}, or take the mark back (key {key})")
            button.clicked.connect(partial(self.mark, mark))
            shortcut = QShortcut(QKeySequence(key), page)
            shortcut.setContext(Qt.ShortcutContext.WidgetWithChildrenShortcut)
            shortcut.activated.connect(partial(self.mark, mark))
            row.addWidget(button)
        self.select_good_button = QPushButton("Select particles of good")
        self.select_good_button.clicked.connect(self.select_good)
        row.addWidget(self.select_good_button, 1)
        return row

    def shutdown(self) -> None:
        """End all background work of this dock; jobs go on."""
        self.tasks.stop()
        self.make.rigid_part.stop()
        self.comparison.stop()
        self.exporting.tasks.stop()
        self.transfer.stop()
        for bar in (self.bar, self.exporting.bar):
            bar.stop()

    # --- what there is to average -----------------------------------------------------------------

    def _on_session(self, session: Session | None) -> None:
        self.complaint.clear()
        self.stored = None
        self.results.setVisible(False)
        self.picture.hide()
        for part in (self.export_part, self.transfer_part):
            part.setVisible(session is not None)
        if session is not None:
            self._list_sets()

    def _update_buttons(self, *_: object) -> None:
        run, busy = self.state.run, self.bar.folder is not None
        self.no_run.setVisible(run is None)
        self.make.setVisible(run is not None)
        self.make.set_busy(busy)
        self.tools.set_busy(busy)
        self.examine_button.setEnabled(not busy)
        good = "good" in self._marks
        self.select_good_button.setEnabled(good)
        self.select_good_button.setToolTip(
            "Make the particles of the averages marked good the selection"
            if good
            else "Mark averages first: G"
        )

    # --- averaging --------------------------------------------------------------------------------

    def average(self) -> None:
        """Start the worker that averages."""
        from particle_explorer import jobs

        session, run = self.state.session, self.state.run
        if session is None or run is None:
            return
        self.complaint.clear()
        by, mask, words = self.make.by, np.array(self.state.selection.mask), self.make.words(run)

        def work() -> Path:
            arguments = ["average", str(run.path)]
            if by == SELECTION:
                name = unused("averaged", session.selections.names())
                session.selections.save(name, mask, how="averaged")
                arguments += ["--selection", name]
            else:
                arguments += ["--by", by]
            return jobs.start([*arguments, *words], session.new_job("average"))

        self.make.average_button.setEnabled(False)
        self.tasks.run("average", work, self._follow, self._on_failed)

    def average_selection(self) -> None:
        """Average what is selected, if something is."""
        self.make.choose_selection()
        if self.make.average_button.isEnabled():
            self.average()

    def average_halves(self) -> None:
        """Let a worker train two models on disjoint halves and average with both."""
        run = self.state.run
        if run is None:
            return
        groups = self.stored.classes if self.stored is not None else []
        words = ["average-independent", str(run.path), "--classes", str(min(max(len(groups), 1), 200))]
        words += self.make.settings()
        self._start(words, "Averaging two independent halves")

    def refine(self) -> None:
        """Let a worker refine the poses of the classes that are to be averaged."""
        run, by = self.state.run, self.make.by
        if run is None:
            return
        if by in (SELECTION, GRID):
            self.complaint.show_failure(
                Failure("Poses are refined against the averages of classes: cluster first and choose them")
            )
            return
        self._after = self._on_refined
        self._start(["refine", str(run.path), "--by", by], "Refining the poses")

    def _on_refined(self) -> None:
        session, run = self.state.session, self.state.run

        if run is None:
            return

        def work() -> tuple[Opened, str]:
            return read(session, run), refined_words(run.column_record("pose-refined")["config"])

        def done(found: tuple[Opened, str]) -> None:
            if self.state.run is run:
                self.state.set_features(found[0].features)
                self.make.show_refined(found[1])

        self.tasks.run("refined", work, done, self._on_failed)

    def examine(self) -> None:
        """Let a worker compare the members of the averages that are shown with them."""
        session, stored = self.state.session, self.stored
        if session is not None and stored is not None:
            self._start(["examine", str(session.path), "--averages", stored.name], "Examining the averages")

    def amend(self, words: list[str], leave_out: NDArray[np.uint64] | None = None) -> None:
        """Let a worker change the averages that are shown; a new set comes of it."""
        session, stored = self.state.session, self.stored
        if session is not None and stored is not None:
            command = ["amend", str(session.path), "--averages", stored.name, *words]
            self._start(command, "Changing the averages", leave_out)

    def _leave_out(self, uid: NDArray[np.uint64]) -> None:
        self.amend([], uid)

    def _start(self, words: list[str], title: str, leave_out: NDArray[np.uint64] | None = None) -> None:
        from particle_explorer import jobs

        session = self.state.session
        if session is None or self.bar.folder is not None:
            return
        self.complaint.clear()

        def follow_it(folder: Path) -> None:
            self.bar.follow(folder, title)
            self._update_buttons()
            self.state.job_changed.emit(str(folder))

        def work() -> Path:
            folder, more = session.new_job(words[0]), []
            if leave_out is not None:
                listed = folder / "leave-out.txt"
                listed.write_text("\n".join(map(str, leave_out.tolist())), encoding="utf-8")
                more = ["--leave-out", str(listed)]
            return jobs.start([*words, *more], folder)

        self.make.average_button.setEnabled(False)
        self.tasks.run("average", work, follow_it, self._on_failed)

    def _follow(self, folder: Path) -> None:
        self.bar.follow(folder, "Averaging")
        self._update_buttons()
        self.state.sets_changed.emit()
        self.state.job_changed.emit(str(folder))

    def _on_averaged(self, status: Status) -> None:
        self._update_buttons()
        after, self._after = self._after, None
        if after is not None:
            after()
        else:
            self.state.classes_changed.emit(Path(status.message).stem)

    def _on_stopped(self, *_: object) -> None:
        self._after = None
        self._update_buttons()

    def _on_failed(self, failure: Failure) -> None:
        self._after = None
        self._update_buttons()
        self.complaint.show_failure(failure)

    # --- looking ----------------------------------------------------------------------------------

    def _list_sets(self, name: str = "") -> None:
        session = self.state.session
        if session is not None:
            self.tasks.run("class sets", session.classes.names, lambda names: self._on_sets(names, name))

    def _on_sets(self, names: list[str], wanted: str) -> None:
        self.sets.clear()
        self.sets.addItems(names)
        if self.stored is not None:
            self.sets.setCurrentText(self.stored.name)
            self.comparison.offer(self.stored, names)
        if wanted in names:
            self.sets.setCurrentText(wanted)
            self._show_chosen_set()
        elif names and self.stored is None:
            self.sets.setCurrentIndex(len(names) - 1)
            self._show_chosen_set()

    def _show_chosen_set(self, *_: object) -> None:
        session, name = self.state.session, self.sets.currentText()
        if session is not None and name:
            self.tasks.run("classes", lambda: session.classes.read(name), self._show_classes, self._on_failed)

    def _show_classes(self, stored: StoredClasses) -> None:
        self.stored = stored
        self.exporting.show_averages(stored)
        self.results.setVisible(True)
        self.one.blockSignals(True)
        self.one.clear()
        self.one.addItems([f"{each['label']} · N {number(each['n'])}" for each in stored.classes])
        self.one.blockSignals(False)
        self.members.clear()
        names = [self.sets.itemText(i) for i in range(self.sets.count())]
        self.comparison.offer(stored, names)
        self.tools.show_classes(stored.classes)
        self._draw_montage()
        self._show_quality()
        self._update_buttons()
        self._scroll_to_results()

    def _draw_montage(self) -> None:
        """All averages, in the order of the list."""
        if self.stored is not None and self.tools.order:
            self.picture.show(self.stored, self.tools.order)

    def _look_at(self, index: int) -> None:
        self.one.setCurrentIndex(index)

    def _show_members(self, *_: object) -> None:
        session, stored, index = self.state.session, self.stored, self.one.currentIndex()
        if session is not None and stored is not None and index >= 0 and self.members_part.button.isChecked():
            self.members.look_at(session, stored, index)

    def _scroll_to_results(self) -> None:
        area: QWidget | None = self
        while area is not None and not isinstance(area, QScrollArea):
            area = area.parentWidget()
        if isinstance(area, QScrollArea):
            QTimer.singleShot(0, partial(area.ensureWidgetVisible, self.quality_words))

    # --- judging ----------------------------------------------------------------------------------

    @property
    def _marks(self) -> list[str]:
        """ "good", "bad" or nothing for each average that is shown."""
        return [] if self.stored is None else [str(each.get("mark", "")) for each in self.stored.classes]

    def mark(self, mark: str, *_: object) -> None:
        """Mark the average that is looked at "good" or "bad"; the same mark again takes it back."""
        session, stored, index = self.state.session, self.stored, self.one.currentIndex()
        if session is None or stored is None or not 0 <= index < len(stored.classes):
            return
        one = stored.classes[index]
        one["mark"] = "" if one.get("mark") == mark else mark
        marks = self._marks
        self.picture.redraw(stored, index)
        self.tools.redraw(index)
        self._update_buttons()
        self.tasks.run(
            "mark", lambda: session.classes.mark(stored.name, marks), lambda _: None, self._on_failed
        )

    def select_good(self) -> None:
        """Make the particles of the averages that are marked good the selection."""
        session, stored = self.state.session, self.stored
        if session is None or stored is None:
            return
        good = np.flatnonzero(np.asarray(self._marks) == "good")

        def work() -> NDArray[np.bool_]:
            members = stored.members
            return np.isin(session.uid, members.index[members["average"].isin(good)])

        def done(mask: NDArray[np.bool_]) -> None:
            if session is self.state.session:
                self.state.selection.set(mask)

        self.tasks.run("select good", work, done, self._on_failed)

    def _show_quality(self, *_: object) -> None:
        stored, index = self.stored, self.one.currentIndex()
        if stored is None or not 0 <= index < len(stored.classes):
            return
        one = stored.classes[index]
        frc = np.asarray(one["frc"], float)
        n, size = stored.images.shape[-1], stored.pixel_size_A
        known = math.isfinite(size)
        x = np.arange(len(frc)) / (n * (size if known else 1.0))
        self.quality.x_label = "Å" if known else "pixels"
        self.quality.title = f"Agreement of two halves (FRC), class {one['label']}"
        curves = [Curve("this average", x, frc)]
        if one.get("control_frc"):
            words = f"noise, N {number(one['control_n'])}"
            curves.append(Curve(words, x, np.asarray(one["control_frc"], float), dashed=True))
        self.quality.set_curves(curves, y_range=(-0.1, 1.0), levels=(0.0, 0.143, 0.5), x_as_period=True)
        self.quality_words.setText(quality_words(one, known))
        self.made_words.setText(made_words(stored, index))
        self.tools.set_current(index)
        self._show_members()

    # --- exporting --------------------------------------------------------------------------------

    def show_export(self) -> None:
        """Unfold the export, if there is something to export."""
        if self.state.session is not None:
            self.export_part.button.setChecked(True)
            self.exporting.button.setFocus()


def unused(name: str, taken: list[str]) -> str:
    """NAME-1, NAME-2 …, the first that is free."""
    n = 1
    while f"{name}-{n}" in taken:
        n += 1
    return f"{name}-{n}"
