"""The Classes dock: average particles, look at the averages and their quality, export both."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import Qt, QTimer
from qtpy.QtGui import QKeySequence, QShortcut
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QScrollArea,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.configs import AverageConfig
from particle_explorer.state import Opened, read
from particle_explorer.status import Status
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.class_tools import ClassTools, MembersPanel
from particle_explorer.widgets.colours import title_of
from particle_explorer.widgets.exporting import ExportPanel, groupings
from particle_explorer.widgets.form import ConfigForm, Folded, command_line
from particle_explorer.widgets.job_bar import Complaint, JobBar, number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.montage import Montage, caption_lines, draw_tile, montage
from particle_explorer.widgets.moving import TransferPanel
from particle_explorer.widgets.painted import Curve, CurveView
from particle_explorer.widgets.workspace import fit_view, state_of, tile, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.class_sets import StoredClasses
    from particle_explorer.session import Run, Session

LAYER = "class averages"
SELECTION = "selection"
GRID = "grid"
SHARED = "shared alignment: self-consistency, upper bound"


class ClassesDock(QWidget):
    """Averages of the current selection or of clusters."""

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        super().__init__()
        self.viewer = unwrapped(napari_viewer)
        self.state = state_of(self.viewer)
        self.tasks = Tasks(self)
        self.layer: Any = None
        self.montage: Montage | None = None
        self.stored: StoredClasses | None = None
        self._after: Callable[[], None] | None = None

        self.no_run = QLabel("Train a map first (tab Train); averages are aligned with the poses it infers.")
        self.no_run.setWordWrap(True)
        self.complaint = Complaint()
        self.make = self._build_make()
        self.bar = JobBar()
        self.bar.finished.connect(self._on_averaged)
        self.bar.stopped.connect(self._on_stopped)
        self.bar.failed.connect(self._on_failed)
        self.held_bar = JobBar()
        self.held_bar.finished.connect(self._on_held_ready)
        self.held_bar.stopped.connect(lambda _: self.held.setChecked(False))
        self.held_bar.failed.connect(self._on_held_failed)
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
            self.held_bar,
            self.complaint,
            self.bar,
            self.results,
            self.export_part,
            self.transfer_part,
        ):
            layout.addWidget(part)
        layout.addStretch(1)

        follow(self, self.state.session_changed, self._on_session)
        follow(self, self.state.features_changed, self._on_features)
        follow(self, self.state.held_changed, self._show_held)
        follow(self, self.state.selection.changed, self._update_buttons)
        follow(self, self.state.classes_changed, self._list_sets)
        self._on_session(self.state.session)
        self._on_features()

    # --- parts ------------------------------------------------------------------------------------

    def _build_make(self) -> QWidget:
        page = QWidget()
        self.what = QComboBox()
        self.what.setToolTip("Average the particles selected on the map, or one average per cluster or class")
        self.what.currentIndexChanged.connect(self._update_buttons)
        self.held = QCheckBox("Hold the most rigid part still")
        self.held.toggled.connect(self._on_held)
        self.held.setToolTip(
            "<p>Turns the frames along the map so that the part that changes least stays where it is;"
            " motion is then seen relative to it.</p>"
        )
        self.held_words = QLabel()
        self.held_words.setWordWrap(True)
        self.held_words.setVisible(False)
        self.control = QCheckBox("Noise control")
        self.control.setChecked(True)
        self.control.setToolTip(
            "<p>Also puts pure noise through the same inference of poses and the same averaging and draws its"
            " curve beside that of the average: what the alignment alone makes of nothing. Takes about as"
            " long again.</p>"
        )
        self.independent_button = QPushButton("Two independent halves")
        self.independent_button.setToolTip(
            "<p>Trains the model of this run anew on either half of the particles, averages each half by its"
            " own model, and lays the averages onto each other only then. The curves of these halves may be"
            " called a resolution. Takes about as long as training did.</p>"
        )
        self.independent_button.clicked.connect(self.average_halves)
        self.form = ConfigForm(AverageConfig)
        self.average_button = QPushButton("Average")
        self.average_button.clicked.connect(self.average)
        row = QHBoxLayout()
        row.addWidget(QLabel("Average"))
        row.addWidget(self.what, 1)
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addLayout(row)
        layout.addWidget(self.average_button)
        layout.addWidget(self.held)
        layout.addWidget(self.held_words)
        layout.addWidget(self.control)
        layout.addWidget(Folded("Settings", self._build_settings()))
        layout.addWidget(self.independent_button)
        return page

    def _build_settings(self) -> QWidget:
        page = QWidget()
        self.poses = QComboBox()
        self.poses.setToolTip("<p>Whose angles and shifts move the images back</p>")
        self.weights = QComboBox()
        for words, weighting in (
            ("every member counts once", "hard"),
            ("less the farther from the middle", "distance"),
            ("shared by the spread of positions", "posterior"),
        ):
            self.weights.addItem(words, weighting)
        self.weights.setToolTip("<p>How much a member counts in its average</p>")
        self.refine_button = QPushButton("Refine poses")
        self.refine_button.setToolTip(
            "<p>Search around the pose of every particle of the classes for a better one, against the average"
            " of the other half of its class; then average with the refined poses</p>"
        )
        self.refine_button.clicked.connect(self.refine)
        self.refined_words = QLabel()
        self.refined_words.setWordWrap(True)
        self.refined_words.setVisible(False)
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        row = QHBoxLayout()
        row.addWidget(QLabel("Poses"))
        row.addWidget(self.poses, 1)
        row.addWidget(self.refine_button)
        layout.addLayout(row)
        row = QHBoxLayout()
        row.addWidget(QLabel("Weights"))
        row.addWidget(self.weights, 1)
        layout.addLayout(row)
        layout.addWidget(self.refined_words)
        layout.addWidget(self.form)
        return page

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
        self.tools.current_changed.connect(self._on_listed)
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
        self.made_words = QLabel()
        self.made_words.setWordWrap(True)
        self.made_words.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        layout.addWidget(Folded("List: sort, join, divide, rename", self.tools))
        layout.addWidget(self.quality)
        layout.addWidget(self.quality_words)
        layout.addWidget(self.made_words)
        layout.addWidget(self.examine_button)
        layout.addWidget(self.members_part)
        layout.addWidget(Folded("Compare with another set", self._build_comparison()))
        return page

    def _build_comparison(self) -> QWidget:
        page = QWidget()
        self.beside = QComboBox()
        self.beside.setToolTip("Other averages of this session")
        self.beside.activated.connect(self._compare)
        self.comparison = QLabel()
        self.comparison.setWordWrap(True)
        self.comparison.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(3)
        layout.addWidget(self.beside)
        layout.addWidget(self.comparison)
        return page

    def _compare(self, *_: object) -> None:
        """Which class became which in the other set, and who stayed together."""
        session, stored, name = self.state.session, self.stored, self.beside.currentText()
        if session is None or stored is None or not name:
            return
        self.tasks.run(
            "compare",
            lambda: comparison_words(session, stored, session.classes.read(name)),
            self.comparison.setText,
            self._on_failed,
        )

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

    # --- what there is to average -----------------------------------------------------------------

    def _on_session(self, session: Session | None) -> None:
        self.complaint.clear()
        self.stored = None
        self.results.setVisible(False)
        if self.layer is not None:
            self.layer.visible = False
        for part in (self.export_part, self.transfer_part):
            part.setVisible(session is not None)
        if session is not None:
            self._list_sets()

    def _on_features(self) -> None:
        before = self.what.currentData()
        self.what.blockSignals(True)
        self.what.clear()
        self.what.addItem("the selected particles", SELECTION)
        columns = set(map(str, self.state.features.columns))
        if "z_0" in columns:
            self.what.addItem("each cell of a grid over the map", GRID)
        for name in groupings(self.state.features):
            self.what.addItem(f"each {title_of(name.partition(' ')[0])}", name)
        self._list_poses(columns)
        position = self.what.findData(before)
        grouped = self.what.itemData(self.what.count() - 1) not in (SELECTION, GRID)
        newest = self.what.count() - 1 if grouped else 0
        self.what.setCurrentIndex(position if before != SELECTION and position >= 0 else newest)
        self.what.blockSignals(False)
        self._update_buttons()

    def _list_poses(self, columns: set[str]) -> None:
        before, session = self.poses.currentData(), self.state.session
        self.poses.clear()
        self.poses.addItem("of this run", "run")
        if any(name.startswith("pose-refined") for name in columns):
            self.poses.addItem("of this run, refined", "refined")
        if session is not None and {"angle_deg", "shift_y_px", "shift_x_px"} <= set(session.table.columns):
            self.poses.addItem("of the particle file", "file")
        self.poses.setCurrentIndex(max(0, self.poses.findData(before)))

    def _update_buttons(self, *_: object) -> None:
        run = self.state.run
        self.no_run.setVisible(run is None)
        self.make.setVisible(run is not None)
        selection = self.what.currentData() == SELECTION
        count = self.state.selection.count
        busy = self.bar.folder is not None
        able = run is not None and not busy and (count > 0 or not selection)
        self.average_button.setEnabled(able)
        self.tools.set_busy(busy)
        self.examine_button.setEnabled(not busy)
        self.independent_button.setEnabled(run is not None and run.has_weights and not busy)
        if selection and not count:
            self.average_button.setToolTip("Select particles on the map first (L: lasso)")
        else:
            self.average_button.setToolTip(
                "Align the original images with the poses of this run and average them"
            )
        self.average_button.setText(
            f"Average {number(count)} selected particles" if selection and count else "Average"
        )
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
        by = str(self.what.currentData()).partition(" ")[0]  # a column of a repeated result: its result
        mask = np.array(self.state.selection.mask)
        settings = command_line("average", self.form.value()) + (["--held"] if self.state.held else [])
        if self.poses.currentData() not in (None, "run") and not self.state.held:
            settings += ["--poses", str(self.poses.currentData())]
        if self.weights.currentData() != "hard" and by != SELECTION:
            settings += ["--weights", str(self.weights.currentData())]
        settings += ["--noise-control"] if self.control.isChecked() and run.has_weights else []

        def work() -> Path:
            arguments = ["average", str(run.path)]
            if by == SELECTION:
                name = unused("averaged", session.selections.names())
                session.selections.save(name, mask, how="averaged")
                arguments += ["--selection", name]
            else:
                arguments += ["--by", by]
            return jobs.start([*arguments, *settings], session.new_job("average"))

        self.average_button.setEnabled(False)
        self.tasks.run("average", work, self._follow, self._on_failed)

    def average_selection(self) -> None:
        """Average what is selected, if something is."""
        self.what.setCurrentIndex(self.what.findData(SELECTION))
        if self.average_button.isEnabled():
            self.average()

    def average_halves(self) -> None:
        """Let a worker train two models on disjoint halves and average with both."""
        run = self.state.run
        if run is None:
            return
        groups = self.stored.classes if self.stored is not None else []
        words = ["average-independent", str(run.path), "--classes", str(min(max(len(groups), 1), 200))]
        words += command_line("average", self.form.value())
        self._start(words, "Averaging two independent halves")

    def refine(self) -> None:
        """Let a worker refine the poses of the classes that are to be averaged."""
        run, by = self.state.run, str(self.what.currentData()).partition(" ")[0]
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
                self.poses.setCurrentIndex(max(0, self.poses.findData("refined")))
                self.refined_words.setText(found[1])
                self.refined_words.setVisible(True)

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

        self.average_button.setEnabled(False)
        self.tasks.run("average", work, follow_it, self._on_failed)

    # --- a part held still ----------------------------------------------------------------------------

    def _on_held(self, wanted: bool) -> None:
        run = self.state.run
        if run is None or wanted == self.state.held or self.held_bar.folder is not None:
            return
        self.complaint.clear()
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
            lambda folder: self.held_bar.follow(folder, "Finding the part that changes least"),
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
        self._on_failed(failure)

    def _show_held(self, held: bool) -> None:
        self.held.setChecked(held)
        run = self.state.run
        gauge = run.gauge() if held and run is not None else None
        self.held_words.setText("" if gauge is None else gauge_words(gauge))
        self.held_words.setVisible(bool(self.held_words.text()))

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
        self.beside.clear()
        self.beside.addItems(names)
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
        self.one.addItems([f"{each['label']} · {number(each['n'])}" for each in stored.classes])
        self.one.blockSignals(False)
        self.members.clear()
        self.comparison.clear()
        self.tools.show_classes(stored.classes)
        self._draw_montage()
        self._show_quality()
        self._update_buttons()
        self._scroll_to_results()

    def _draw_montage(self) -> None:
        """All averages, in the order of the list."""
        stored, order = self.stored, self.tools.order
        if stored is None or not order:
            return
        self.montage = montage(stored.images[order], [caption_lines(stored.classes[i]) for i in order])
        self._show_layer(self.montage)
        session = self.state.session
        self.layer.metadata = {
            "session": str(session.path) if session is not None else "",
            "averages": stored.name,
            "members, weights, poses": str(Path("classes") / f"{stored.name}.parquet"),
            "order": [str(stored.classes[i]["label"]) for i in order],
            "how": stored.how,
            "settings": stored.classes[order[0]].get("settings") or {},
        }

    def _on_listed(self, index: int) -> None:
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

    def _show_layer(self, made: Montage) -> None:
        scale, translate = self._placement(made)
        if self.layer is None or self.layer not in self.viewer.layers:
            self.layer = self.viewer.add_image(
                made.pixels,
                name=LAYER,
                contrast_limits=(0, 1),
                rgb=made.pixels.ndim == 3,
                scale=scale,
                translate=translate,
                interpolation2d="linear",  # shown small, nearest pixels leave lines out of the letters
            )
            tile(self.layer)
            self.layer.mouse_drag_callbacks.append(self._on_click)
            for mark in ("good", "bad"):
                self.layer.bind_key(mark[0].upper(), self._key_for(mark), overwrite=True)
        else:
            self.layer.data = made.pixels
            self.layer.scale, self.layer.translate = scale, translate
            self.layer.visible = True
        fit_view(self.viewer)

    def _placement(self, made: Montage) -> tuple[tuple[float, float], tuple[float, float]]:
        """As large on the canvas as one particle image: all tiles of napari's grid share one camera."""
        session = self.state.session
        assert session is not None
        size = session.plan.cached_pixel_size_A
        size = float(size) if np.isfinite(size) and size > 0 else 1.0
        side = session.plan.cached_box_px * size
        height, width = made.pixels.shape[:2]
        scale = side / max(height, width)
        return (scale, scale), ((side - height * scale) / 2, (side - width * scale) / 2)

    def _on_click(self, layer: Any, event: Any) -> None:
        if self.montage is None or self.stored is None:
            return
        row, column = layer.world_to_data(event.position)[-2:]
        height, width = self.montage.pixels.shape[:2]
        index = self.montage.index_at(row, column)
        if 0 <= row < height and 0 <= column < width and index < len(self.tools.order):
            self.one.setCurrentIndex(self.tools.order[index])

    # --- judging ----------------------------------------------------------------------------------

    @property
    def _marks(self) -> list[str]:
        """ "good", "bad" or nothing for each average that is shown."""
        return [] if self.stored is None else [str(each.get("mark", "")) for each in self.stored.classes]

    def _key_for(self, mark: str) -> Callable[[object], None]:
        """What a key on the layer does; napari wants a function with a name."""

        def pressed(_: object) -> None:
            self.mark(mark)

        return pressed

    def mark(self, mark: str, *_: object) -> None:
        """Mark the average that is looked at "good" or "bad"; the same mark again takes it back."""
        session, stored, index = self.state.session, self.stored, self.one.currentIndex()
        if session is None or stored is None or self.montage is None or not 0 <= index < len(stored.classes):
            return
        one = stored.classes[index]
        one["mark"] = "" if one.get("mark") == mark else mark
        marks = self._marks
        draw_tile(self.montage, self.tools.order.index(index), stored.images[index], caption_lines(one))
        self.tools.redraw(index)
        self.layer.refresh()
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


def gauge_words(gauge: dict[str, Any]) -> str:
    """By how much the frames were turned to hold the part still."""
    turned = gauge.get("largest_turn_deg")
    return "" if turned is None else f"The frames were turned by up to {float(turned):.0f}°."


def quality_words(one: dict[str, Any], known: bool) -> str:
    """What the curves of an average may be called, and what they say."""
    words = SHARED
    if one["halves_independent"]:
        found = one.get("resolution_A")
        words = "independent halves: " + (
            f"resolution {found:.3g} Å (FRC 0.143)"
            if known and found is not None
            else "no resolution to speak of"
        )
    counts = f"N {number(one['n'])}"
    if one["n_effective"] < 0.99 * one["n"]:
        counts += f", as good as {number(round(one['n_effective']))} of equal weight"
    reach = one.get("ssnr_radius_A")
    if known and reach is not None:
        counts += f"; signal above noise to {reach:.3g} Å"
    if one.get("control_frc") and known:
        beyond = one.get("believable_radius_A")
        counts += (
            f"; above what noise alone gives to {beyond:.3g} Å"
            if beyond is not None
            else "; nowhere clearly above what noise alone gives"
        )
    return f"{words}. {counts}."


def refined_words(record: dict[str, Any]) -> str:
    """How far a refinement moved poses, and how far they are from those of the file."""
    last = record["history"][-1]
    words = (
        f"In the last of {len(record['history'])} iterations angles moved by {last['median_deg']:.2f}°,"
        f" shifts by {last['median_px']:.2f} px (medians)."
    )
    apart = record.get("from_the_file")
    if apart:
        words += (
            f" Beside the poses of the file: angles {apart['median_deg']:.1f}° apart,"
            f" {apart['within_10_deg']:.0%} within 10°, shifts {apart['median_px']:.2f} px."
        )
    return words


def comparison_words(session: Session, first: StoredClasses, second: StoredClasses) -> str:
    """Two sets of averages of the same particles. A thread's work."""
    from particle_explorer.membership import labels_of_members, matched, together

    labels = [labels_of_members(session.table.index, one.members) for one in (first, second)]
    both = together(labels[0], labels[1])
    if not both["n"]:
        return "The two sets have no particles in common."
    lines = [
        f"Of two particles that share a class here, {both['both']:.0%} share one there; adjusted Rand index"
        f" {both['rand']:.2f}, over {number(int(both['n']))} particles."
    ]
    for one, other, count, share in matched(labels[0], labels[1]):
        names = first.classes[one]["label"], second.classes[other]["label"]
        lines.append(f"{names[0]} → {names[1]}: {number(count)} ({share:.0%})")
    return "\n".join(lines)


POSES = {
    "run": "poses of the run",
    "held": "poses that hold a part still",
    "refined": "refined poses",
    "file": "poses of the particle file",
    "independent": "poses of two models, a half of the particles each",
}


def made_words(stored: StoredClasses, index: int) -> str:
    """Which particles, poses and settings made an average, and where they are written down."""
    how, one = stored.how, stored.classes[index]
    settings = one.get("settings") or {}
    parts = [f"run {how['run']}"] if how.get("run") else []
    parts += [f"by {how['by']}"] if how.get("by") else []
    parts += [f"selection {how['selection']}"] if how.get("selection") else []
    parts += [f"changed from {how['from']}"] if how.get("from") else []
    poses = how.get("poses") or ("held" if how.get("held") else "run")
    parts.append(POSES.get(str(poses), str(poses)))
    apart = how.get("apart")
    if apart:
        median = f"{apart['median_deg']:.1f}°, {apart['median_px']:.2f} px"
        parts.append(f"those of the {apart['from']} are {median} away (medians)")
    if how.get("weights", "hard") != "hard":
        parts.append(f"weights by {how['weights']}")
    parts.append(f"CTF: {one['ctf']}")
    if settings.get("interpolation"):
        parts.append(f"{settings['interpolation']}, box {settings.get('box_px')} px")
    symmetry, mirror = one.get("symmetry") or {}, one.get("mirror")
    if symmetry.get("fold", 1) > 1:
        parts.append(f"looks C{symmetry['fold']} (r {symmetry['correlation']:.2f})")
    if mirror:
        parts.append(f"its mirror image is most like {mirror['of']} (r {mirror['correlation']:.2f})")
    return f"{'; '.join(parts)}. Members, weights, poses: classes/{stored.name}.parquet"


def unused(name: str, taken: list[str]) -> str:
    """NAME-1, NAME-2 …, the first that is free."""
    n = 1
    while f"{name}-{n}" in taken:
        n += 1
    return f"{name}-{n}"
