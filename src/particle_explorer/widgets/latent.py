"""The latent view: the scatter with its axes, colours and handle, and what one does with a selection."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QPoint, QPointF, QRectF, QSignalBlocker, QSize, Qt, QTimer, Signal
from qtpy.QtGui import QColor, QIcon, QImage, QPainter, QPainterPath, QPen, QPixmap, QResizeEvent, QShowEvent
from qtpy.QtWidgets import (
    QApplication,
    QComboBox,
    QFrame,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QMenu,
    QPushButton,
    QScrollArea,
    QSizePolicy,
    QSlider,
    QSpinBox,
    QStackedWidget,
    QToolButton,
    QVBoxLayout,
    QWidget,
    QWidgetAction,
)

from particle_explorer.state import AppState, Mask, Preview
from particle_explorer.widgets.background import Failure, JobFollower, Mailbox, Tasks, in_turn
from particle_explorer.widgets.colours import Colouring, plain, recoloured, title_of, with_limits
from particle_explorer.widgets.histogram import Counts, HistogramPanel, count, recount, within
from particle_explorer.widgets.job_bar import Complaint, number
from particle_explorer.widgets.latent_axes import (
    ONE_COLOUR,
    Choice,
    Columns,
    HandleAxes,
    LiveReader,
    Place,
    Seen,
    read_columns,
)
from particle_explorer.widgets.latent_plot import LOOKS, Look, ScatterCanvas, Tool
from particle_explorer.widgets.lifetime import follow, follow_event
from particle_explorer.widgets.painted import to_qimage
from particle_explorer.widgets.picking import groups, micrographs, nearest, same
from particle_explorer.widgets.pictures import Decoder, Pictures, displayed, thumbnail
from particle_explorer.widgets.sets import sets_colouring
from particle_explorer.widgets.splat import Points

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import Run, Session

HINT = "Drag ◉ across the map. Lasso to select."
NOTHING_OPEN = "No particles yet.\nOpen a stack in the tab Particles: its map appears here."
NO_RUN = "No map yet.\nPress Train in the tab Train: the map appears here while it forms."
LEARNING = "Learning the map … it appears here in a moment."
MODIFIERS = "Shift adds, Alt or Ctrl takes away, both together keep the overlap.\nEsc clears, Ctrl+Z undoes."
TOOLS: dict[Tool, str] = {
    "handle": "Handle (D): click or drag anywhere to move ◉ there.\n"
    "Arrow keys move it, with Shift ten steps; Enter takes it to the nearest particle.",
    "lasso": f"Lasso (L): draw around particles, or click one.\n{MODIFIERS}",
    "rectangle": f"Rectangle (R): drag a box around particles, or click one.\n{MODIFIERS}",
    "ellipse": f"Ellipse (O): drag its box around particles, or click one.\n{MODIFIERS}",
    "pan": "Move the view (P), also with the middle button or the space bar.\n"
    "The wheel zooms, over an axis only that axis.",
}
SLIDER_STEPS = 1000
SETS = "named sets"
"""Key of the colouring by sets, which are no column of the table"""


class LatentDock(QWidget):
    """Shows the map of `state.run`; writes only into `state` (selection, handle, pose)."""

    def __init__(
        self,
        napari_viewer: napari.Viewer | None = None,
        *,
        state: AppState | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__()
        self.viewer = getattr(napari_viewer, "__wrapped__", napari_viewer)
        if state is None:
            from particle_explorer.widgets.workspace import state_of

            state = state_of(self.viewer)
        self.state = state
        self.decoder = decoder or Decoder()
        self.tasks = Tasks(self)
        self._pictures: Pictures | None = None
        self._thumbnails = Mailbox(self, _thumbnail, self._on_thumbnail, lambda _: None, "thumbnail")
        self._columns = Columns(state.features, np.zeros((0, 0)))
        self._axes: HandleAxes | None = None
        self._drawn: tuple[NDArray[np.float64], str, str] | None = None  # what the points were made of
        self._held: tuple[NDArray[np.float64], Place] | None = (
            None  # where the hand put the handle, and its z
        )
        self._live_run: Path | None = None
        self._hint_shown = False
        self._asked_axes: tuple[str, str] | None = None
        self._asked_colour: str | None = None
        self._colouring: Colouring = plain(0)
        self._limits: tuple[float, float] | None = None
        self._remembered: dict[str, Any] | None = None
        self._part: tuple[float, float, float, float] | None = None  # to be shown once points are there
        self._view_of: tuple[Path | None, int] | None = (
            None  # what the view is a view of: zoom is kept while this stays
        )

        self.canvas = ScatterCanvas(state.selection)
        self.canvas.setMinimumHeight(150)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(2, 2, 2, 2)
        layout.setSpacing(3)
        picture = QHBoxLayout()
        picture.setSpacing(0)
        picture.addLayout(self._build_tools())
        picture.addWidget(self.canvas, 1)
        layout.addLayout(picture, 1)
        layout.addLayout(self._build_choices())
        self.histogram = HistogramPanel()
        self.histogram.setVisible(False)
        self._counts: Counts | None = None
        layout.addWidget(self.histogram)
        layout.addWidget(self._build_sliders_area())
        layout.addWidget(self._build_actions())
        self.complaint = Complaint()
        layout.addWidget(self.complaint)
        self.setMinimumWidth(300)

        self.canvas.handle_moved.connect(self._on_hand_moved)
        self.canvas.hovered.connect(self._on_hovered)
        self.canvas.menu_asked.connect(self._on_menu_asked)
        self.canvas.help_asked.connect(self._show_help)
        self.histogram.histogram.brushed.connect(self._brushed)
        self.histogram.histogram.brushing.connect(self._brushing)
        self.histogram.histogram.limits_moved.connect(self._on_limits)
        self.histogram.gated.connect(self._gated)
        self.histogram.reset.connect(self._reset_limits)
        self.canvas.snap_asked.connect(self._on_snap)
        self.canvas.tool_changed.connect(self._on_tool)
        self.canvas.density_changed.connect(self._on_density)
        self.canvas.save_asked.connect(self._ask_name)
        self.canvas.cluster_asked.connect(self._ask_groups)
        follow(self, state.session_changed, self._on_session)
        follow(self, state.run_changed, self._on_run)
        follow(self, state.features_changed, self._on_features)
        follow(self, state.handle_changed, self._show_handle)
        follow(self, state.handle_drawn, self.canvas.show_handle)
        follow(self, state.pose_changed, self._show_pose)
        follow(self, state.off_data_changed, self.canvas.set_handle_hollow)
        follow(self, state.axes_asked, self._on_axes_asked)
        follow(self, state.colour_asked, self._on_colour_asked)
        follow(self, state.selection.changed, self._show_counts)
        follow(self, state.selection.changed, self._recount)
        follow(self, state.sets_changed, self._on_sets)
        follow(self, state.selection.hinted, self._show_hinted_count)
        follow(self, state.preview_changed, self._show_preview)
        for signal in (state.features_changed, state.run_changed, state.view_changed, state.held_changed):
            follow(self, signal, self._forget_pictures)
        if self.viewer is not None:
            follow_event(self, self.viewer.events.theme, self._on_theme)
        self._on_theme()
        self._live = JobFollower(self, LiveReader(), self._on_live, every_ms=600)
        self._on_tool(self.canvas.tool)
        self._on_session(state.session)
        self._on_features()

    def shutdown(self) -> None:
        """Stop all background work; for tests and for whoever takes the dock away."""
        self._live.stop()
        self._thumbnails.stop()
        self.tasks.stop()

    def sizeHint(self) -> QSize:
        return QSize(392, 430)

    # ---- parts ----------------------------------------------------------------

    def _build_tools(self) -> QVBoxLayout:
        column = QVBoxLayout()
        column.setSpacing(1)
        self.tools: dict[str, QToolButton] = {}
        for name, tip in TOOLS.items():
            button = _tool_button(tip, checkable=True)
            button.clicked.connect(lambda _=False, tool=name: self.canvas.set_tool(tool))
            self.tools[name] = button
            column.addWidget(button)
        self.fit_button = _tool_button("Show the whole map (double click)")
        self.fit_button.clicked.connect(self.canvas.fit)
        self.density_button = _tool_button(
            "Show how densely particles lie instead of single ones;\n"
            "switches itself on when more than 300 000 are visible",
            checkable=True,
        )
        self.density_button.clicked.connect(lambda on: self.canvas.set_density("on" if on else "off"))
        column.addSpacing(4)
        column.addWidget(self.fit_button)
        column.addWidget(self.density_button)
        column.addStretch(1)
        return column

    def _build_choices(self) -> QVBoxLayout:
        self.x, self.y = _combo("Horizontal axis"), _combo("Vertical axis")
        self.colour = _combo("Colour of the particles")
        axes = QHBoxLayout()
        for words, combo in (("x", self.x), ("y", self.y)):
            axes.addWidget(QLabel(words))
            axes.addWidget(combo, 1)
        self.x.activated.connect(self._on_axes_chosen)
        self.y.activated.connect(self._on_axes_chosen)
        self.colour.activated.connect(self._on_colour_chosen)
        below = QHBoxLayout()
        below.addWidget(QLabel("colour"))
        below.addWidget(self.colour, 1)
        self.histogram_button = _tool_button(
            "Histogram of the colour column: set the range of the colours,\nselect by brushing or by numbers",
            checkable=True,
        )
        self.histogram_button.toggled.connect(self._on_histogram)
        below.addWidget(self.histogram_button)
        self.live_button = QToolButton()
        self.live_button.setText("live")
        self.live_button.setCheckable(True)
        self.live_button.setChecked(True)
        self.live_button.setVisible(False)
        self.live_button.setToolTip(
            "A run is learning: show its map as it forms, or the map of the finished run"
        )
        self.live_button.toggled.connect(self._on_live_toggled)
        below.addWidget(self.live_button)
        self.counts = QLabel()
        self.counts.setAlignment(Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter)
        self.counts.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        below.addWidget(self.counts, 1)
        rows = QVBoxLayout()
        rows.setSpacing(3)
        for row in (axes, below):
            row.setSpacing(4)
            rows.addLayout(row)
        return rows

    def _build_sliders_area(self) -> QScrollArea:
        """Sliders of the latent dimensions that are not on the axes, and of the pose."""
        page = QWidget()
        self._slider_rows = QVBoxLayout(page)
        self._slider_rows.setContentsMargins(0, 0, 2, 0)
        self._slider_rows.setSpacing(1)
        self._dimension_rows = QVBoxLayout()
        self._dimension_rows.setSpacing(1)
        self._slider_rows.addLayout(self._dimension_rows)
        self._sliders: dict[int, ValueSlider] = {}
        self._fit_soon = QTimer(self)  # ours, so that it goes with us
        self._fit_soon.setSingleShot(True)
        self._fit_soon.setInterval(0)
        self._fit_soon.timeout.connect(self._fit_sliders)
        self.angle = ValueSlider("angle", -180, 180, unit="°", digits=0, tip="Turn the reconstruction")
        self.shift_x = ValueSlider("shift x", -10, 10, unit=" px", tip="Shift the reconstruction right")
        self.shift_y = ValueSlider("y", -10, 10, unit=" px", tip="Shift the reconstruction down")
        self.reset_pose = QToolButton()
        self.reset_pose.setText("reset")
        self.reset_pose.setToolTip("Angle and shift back to 0")
        self.reset_pose.clicked.connect(lambda: self.state.set_pose(0.0, np.zeros(2)))
        for widgets in ((self.angle, self.reset_pose), (self.shift_x, self.shift_y)):
            row = QHBoxLayout()
            row.setSpacing(8)
            for widget in widgets:
                row.addWidget(widget, 1 if isinstance(widget, ValueSlider) else 0)
            self._slider_rows.addLayout(row)
        for slider in (self.angle, self.shift_x, self.shift_y):
            slider.moved.connect(self._on_pose_moved)
        self.sliders = QScrollArea()
        self.sliders.setWidgetResizable(True)
        self.sliders.setFrameShape(QFrame.Shape.NoFrame)
        self.sliders.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.sliders.setWidget(page)
        return self.sliders

    def _fit_sliders(self) -> None:
        """All sliders where there is room, else four rows of them and a scroll bar."""
        row = max(self.angle.sizeHint().height(), self.reset_pose.sizeHint().height()) + 1
        room = max(4 * row, int(0.2 * self.height()))
        for rows in (self._dimension_rows, self._slider_rows):
            rows.invalidate()
        frame = 2 * self.sliders.frameWidth()  # napari's style draws one that was switched off
        self.sliders.setFixedHeight(min(self._slider_rows.totalSizeHint().height(), room) + frame)

    def resizeEvent(self, event: QResizeEvent | None) -> None:
        super().resizeEvent(event)
        self._fit_sliders()

    def showEvent(self, event: QShowEvent | None) -> None:
        super().showEvent(event)
        self._fit_soon.start()

    def _build_actions(self) -> QStackedWidget:
        self.actions_stack = QStackedWidget()
        self.actions_stack.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        self.groups_button = QPushButton("Layouts, groups…")
        self.save_button = QPushButton("Save set…")
        self.select_button = QPushButton("Select")
        self.select_button.setToolTip("Select all, others, neighbours, a micrograph; undo; the shortcuts")
        self.select_menu = QMenu(self)
        self.select_menu.aboutToShow.connect(lambda: self._fill_menu(self.select_menu, None))
        self.select_button.setMenu(self.select_menu)
        self.n_nearest = 100
        self.groups_button.clicked.connect(self._ask_groups)
        self.save_button.clicked.connect(self._ask_name)
        self.actions_stack.addWidget(_row(self.groups_button, self.save_button, self.select_button))
        self.set_name = QLineEdit()
        self.set_name.setPlaceholderText("Name of the set")
        self.set_name.returnPressed.connect(self.save_set)
        self.confirm_save = QPushButton("Save")
        self.confirm_save.clicked.connect(self.save_set)
        self.actions_stack.addWidget(_row(self.set_name, self.confirm_save, self._back_button()))
        self.point_size = QSlider(Qt.Orientation.Horizontal)
        self.point_size.setRange(0, 24)
        self.point_size.setToolTip("Size of the points; at the left end it follows from their number")
        self.point_size.valueChanged.connect(lambda value: self.canvas.set_point_size(value / 2))
        self.opacity = QSlider(Qt.Orientation.Horizontal)
        self.opacity.setRange(10, 100)
        self.opacity.setValue(100)
        self.opacity.setToolTip("Strength of the points")
        self.opacity.valueChanged.connect(lambda value: self.canvas.set_opacity(value / 100))
        self.density = QComboBox()
        self.density.setToolTip("Single points or how densely they lie; automatic from 300 000 points on")
        for words, mode in (("auto", "auto"), ("density", "on"), ("points", "off")):
            self.density.addItem(words, mode)
        self.density.activated.connect(lambda _: self.canvas.set_density(self.density.currentData()))
        look = _row(QLabel("size"), self.point_size, QLabel("strength"), self.opacity, self.density)
        look.layout().addWidget(self._back_button())
        self.actions_stack.addWidget(look)
        return self.actions_stack

    def _back_button(self) -> QPushButton:
        button = QPushButton("Back")
        button.clicked.connect(lambda: self.actions_stack.setCurrentIndex(0))
        return button

    # ---- what is open ----------------------------------------------------------

    def _on_session(self, session: Session | None) -> None:
        self.complaint.clear()
        self._live_run, self._held = None, None
        self._live.follow(None if session is None else session.path)
        self.canvas.set_density("auto")
        self.density.setCurrentIndex(0)
        self._limits, self._remembered, self._part, self._drawn = None, None, None, None
        self.canvas.clear_points()
        self.canvas.set_handle(None, None)
        self._view_of = None
        self._show_state()

    def _on_run(self, run: Run | None) -> None:
        self._held, self._axes, self._drawn = None, None, None
        if run is not None and self._live_run == run.path:
            self._live_run = None
        self._show_state()

    def _on_features(self) -> None:
        if not self._shows_live:
            features, before = self.state.features, self._columns
            self.tasks.run(
                "columns",
                lambda: in_turn(read_columns, features, None, before),
                self._on_columns,
                self._complain,
            )

    @property
    def _shows_live(self) -> bool:
        return self._live_run is not None and self.live_button.isChecked()

    def _on_live(self, seen: Seen) -> None:
        was = self._live_run
        self._live_run = seen.run_path
        self.live_button.setVisible(self._live_run is not None)
        if self._shows_live and seen.live is not None:
            features, live = self.state.features, seen.live
            self.tasks.run(
                "columns", lambda: in_turn(read_columns, features, live), self._on_columns, self._complain
            )
        if was != self._live_run:
            if was is not None and self._live_run is None and self.state.run is not None:
                self._on_features()  # it has ended without a map of its own, or that map is being opened now
            self._show_state()

    def _on_live_toggled(self, on: bool) -> None:
        if not on:
            self._on_features()
        self._show_state()

    def _on_columns(self, columns: Columns) -> None:
        """Offer and show the columns that were found; choices made before stay where they still fit."""
        if len(columns.features) != self.state.selection.mask.size:
            return  # of a session that has been closed meanwhile
        self._columns = columns
        if self._drawn is None or self._drawn[0] is not columns.z:
            self._axes = None  # of other positions; the new ones come with the points
        first = columns.first_axes()
        self._offer_columns(columns)
        self._choose_asked()
        keys = {choice.key for choice in columns.axes}
        run = self.state.run
        shown = self._live_run if self._shows_live else None if run is None else run.path
        source = (shown, columns.n_dims)
        chosen = (
            self.x.currentData() in keys
            and self.y.currentData() in keys
            and self.x.currentData() != self.y.currentData()
        )
        if first is not None and (not chosen or self._view_of is None or self._view_of[1] != columns.n_dims):
            _choose(self.x, first[0])
            _choose(self.y, first[1])
        self._recall(columns)
        self._show_points(keep_view=self._view_of == source)
        self._view_of = source
        self._show_colour()
        if columns.n_dims and self.state.handle_z.size == columns.n_dims and not self.state.handle_z.any():
            self.state.set_handle(columns.median)  # the origin may be far from every particle
        self._build_sliders()
        self._show_state()

    # ---- what a session remembers -------------------------------------------------------

    def remembered(self) -> dict[str, Any]:
        """How the map is looked at, for `recall`."""
        canvas = self.canvas
        return {
            "x": self.x.currentData(),
            "y": self.y.currentData(),
            "colour": self.colour.currentData(),
            "limits": None if self._limits is None else list(self._limits),
            "part": None if canvas.is_fitted or not canvas.n_points else list(canvas.view),
            "tool": canvas.tool,
            "density": canvas.density,
            "point_size": canvas.point_size,
            "opacity": canvas.opacity,
            "histogram": self.histogram_button.isChecked(),
            "n_nearest": self.n_nearest,
        }

    @property
    def is_recalling(self) -> bool:
        """Whether something is still to be put back."""
        waits = self._remembered is not None or self._part is not None
        return waits and self.state.run is not None

    def recall(self, found: dict[str, Any]) -> None:
        """Look at the map as `remembered` said, as soon as it is there; what has gone is passed over."""
        self._remembered = found
        if self._columns.features is self.state.features:
            self._recall(self._columns)
            self._show_points()
            self._show_colour()
            self._build_sliders()

    def _recall(self, columns: Columns) -> None:
        if self._remembered is None or not columns.n_dims:
            return
        found, self._remembered = self._remembered, None
        axes = {choice.key for choice in columns.axes}
        if found.get("x") in axes and found.get("y") in axes and found["x"] != found["y"]:
            _choose(self.x, found["x"])
            _choose(self.y, found["y"])
            part = found.get("part")
            if part is not None:
                x0, x1, y0, y1 = (float(value) for value in part)
                self._part = (x0, x1, y0, y1)
        if self.colour.findData(found.get("colour")) >= 0:
            _choose(self.colour, found["colour"])
            limits = found.get("limits")
            self._limits = None if limits is None else (float(limits[0]), float(limits[1]))
        if found.get("tool") in TOOLS:
            self.canvas.set_tool(found["tool"])
        density = self.density.findData(found.get("density"))
        if density >= 0:
            self.density.setCurrentIndex(density)
            self.canvas.set_density(self.density.currentData())
        self.point_size.setValue(round(2 * float(found.get("point_size", 0))))
        self.opacity.setValue(round(100 * float(found.get("opacity", 1))))
        self.histogram_button.setChecked(bool(found.get("histogram")))
        self.n_nearest = max(1, int(found.get("n_nearest", self.n_nearest)))

    def _offer_columns(self, columns: Columns) -> None:
        axes, colours = (columns.axes, columns.colours) if columns.n_dims else ((), ())
        if colours and self.state.session is not None and self.state.session.selections.names():
            colours = (*colours[:1], Choice(SETS, "set"), *colours[1:])
        for combo, choices in ((self.x, axes), (self.y, axes), (self.colour, colours)):
            _offer(combo, choices)

    def _show_points(self, *, keep_view: bool = False) -> None:
        columns, x, y = self._columns, self.x.currentData(), self.y.currentData()
        if columns.n_dims == 0 or x is None or y is None:
            self.canvas.clear_points()
            self.canvas.set_handle(None, None)
            self._axes = self._drawn = None
            return
        if keep_view and self._part is None and self._is_drawn(columns, x, y):
            return
        titles = (columns.title(x), columns.title(y))

        def work() -> tuple[Points, HandleAxes]:
            return columns.points(x, y), columns.handle_axes(x, y)

        def done(found: tuple[Points, HandleAxes]) -> None:
            if len(columns.features) != self.state.selection.mask.size:
                return
            points, self._axes = found
            self._drawn = (columns.z, x, y)
            self.canvas.set_points(points, titles=titles, keep_view=keep_view)
            part, self._part = self._part, None
            if part is not None:
                self.canvas.show_part(part)
            self._show_handle(self.state.handle_z)
            self._show_hint()

        self.tasks.run("points", work, done, self._complain)

    def _is_drawn(self, columns: Columns, x: str, y: str) -> bool:
        """Whether the points on the canvas are these positions on these axes, neither of them a column."""
        drawn, axes = self._drawn, self._axes
        if drawn is None or axes is None or drawn[0] is not columns.z or drawn[1:] != (x, y):
            return False
        return columns.is_of_map(x) and columns.is_of_map(y)

    def _on_axes_chosen(self, *_: object) -> None:
        self._held = None
        self._show_points()
        self._build_sliders()

    def _on_axes_asked(self, x: str, y: str) -> None:
        self._asked_axes = (x, y)
        if self._choose_asked():
            self._on_axes_chosen()

    def _on_colour_asked(self, key: str) -> None:
        self._asked_colour = key
        if self._choose_asked():
            self._show_colour()

    def _choose_asked(self) -> bool:
        """Choose what somebody asked to see, if it is there yet; else it waits for the next columns."""
        chosen = False
        if self._asked_axes is not None and self.x.findData(self._asked_axes[0]) >= 0:
            _choose(self.x, self._asked_axes[0])
            _choose(self.y, self._asked_axes[1])
            self._asked_axes, chosen = None, True
        if self._asked_colour is not None and self.colour.findData(self._asked_colour) >= 0:
            _choose(self.colour, self._asked_colour)
            self._asked_colour, chosen = None, True
        return chosen

    def _on_colour_chosen(self, *_: object) -> None:
        self._limits = None
        self._show_colour()

    def _show_colour(self, *_: object) -> None:
        columns, key, limits = self._columns, self.colour.currentData(), self._limits
        key = ONE_COLOUR if key is None else key

        session, run = self.state.session, self.state.run

        def work() -> Colouring:
            if key == SETS and session is not None:
                return sets_colouring(session)
            colouring = columns.colouring(key)
            if colouring.kind == "category" and run is not None:
                colouring = recoloured(colouring, run.group_colours(key))
            ranged = limits is not None and colouring.kind == "continuous"
            return with_limits(colouring, *limits) if ranged and limits is not None else colouring

        def done(colouring: Colouring) -> None:
            self._colouring = colouring
            self.canvas.set_colouring(colouring)
            self._count_colours()

        self.tasks.run("colour", work, done, self._complain)

    def _on_sets(self) -> None:
        self._offer_columns(self._columns)
        if self.colour.currentData() == SETS:
            self._show_colour()

    # ---- the histogram of the colours --------------------------------------------------

    def _on_histogram(self, shown: bool) -> None:
        self.histogram.setVisible(shown)
        if shown:
            self._count_colours()

    def _count_colours(self) -> None:
        colouring, mask = self._colouring, self.state.selection.mask
        if self.histogram.isHidden():
            self._counts = None
            return
        if colouring.kind == "none" or colouring.level.size != mask.size:
            self._counts = None
            self.histogram.show_counts(None, None)
            return
        self.tasks.run("histogram", lambda: (count(colouring, mask), colouring), self._on_counts)

    def _on_counts(self, found: tuple[Counts, Colouring]) -> None:
        self._counts, colouring = found
        self.histogram.show_counts(self._counts, colouring)

    def _recount(self, *_: object) -> None:
        counts, mask, colouring = self._counts, self.state.selection.mask, self._colouring
        if counts is not None and not self.histogram.isHidden() and counts.bin.size == mask.size:
            self.tasks.run("histogram", lambda: (recount(counts, mask), colouring), self._on_counts)

    def _on_limits(self, low: float, high: float) -> None:
        if self._colouring.kind == "continuous":
            self._limits = (low, high)
            self._colouring = with_limits(self._colouring, low, high)
            self.canvas.set_colouring(self._colouring)
            self.histogram.histogram.show_counts(self._counts, self._colouring)

    def _reset_limits(self) -> None:
        self._limits = None
        self._show_colour()

    def _brushed(self, low: float, high: float, modifiers: Qt.KeyboardModifier) -> None:
        if self._colouring.level.size == self.state.selection.mask.size:
            self.canvas.choose(within(self._colouring, low, high), modifiers)
            self.state.selection.hint(None)

    def _brushing(self, low: float, high: float, modifiers: Qt.KeyboardModifier) -> None:
        if self._colouring.level.size == self.state.selection.mask.size:
            mask = within(self._colouring, low, high)
            self.state.selection.hint(self.canvas.combined(mask, modifiers))

    def _gated(self, low: float, high: float) -> None:
        self._brushed(low, high, Qt.KeyboardModifier.NoModifier)

    # ---- selecting by what particles are -------------------------------------------------

    def _on_menu_asked(self, row: int | None, where: QPoint) -> None:
        menu = QMenu(self)
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self._fill_menu(menu, row)
        menu.popup(where)

    def _fill_menu(self, menu: QMenu, row: int | None) -> None:
        """Everything that can be selected, `row` being the particle that was clicked."""
        menu.clear()
        menu.setToolTipsVisible(True)
        selection, features = self.state.selection, self.state.features
        n, marked = selection.count, selection.active if row is None else row
        has_map = self._columns.n_dims > 0 and len(self._columns.features) == selection.mask.size
        if row is not None:
            menu.addSection(f"particle {number(row + 1)}")
        self._add_k(menu)
        k = number(self.n_nearest)

        def offer(words: str, does: Callable[[], object], able: bool, tip: str, keys: str = "") -> None:
            action = menu.addAction(words + (f"\t{keys}" if keys else ""))
            action.setToolTip(tip)
            action.setEnabled(able)
            action.triggered.connect(lambda *_: does())

        near = self.state.handle_z
        offer(
            f"The {k} nearest to ◉",
            lambda: self._pick_nearest(near),
            has_map and near.size == self._columns.n_dims,
            "Particles whose positions on the map (all its dimensions) are nearest to the handle",
        )
        there = has_map and marked is not None and bool(np.isfinite(self._columns.z[marked]).all())
        offer(
            f"The {k} most like this one",
            lambda: self._pick_nearest(self._columns.z[marked]),
            there,
            "Particles nearest on the map to the one clicked or looked at",
        )
        from_rows = np.array([marked]) if row is not None or not n else selection.rows
        able = row is not None or n > 0 or marked is not None
        micrograph = micrographs(features)
        offer(
            "The same micrograph",
            lambda: self._pick_same(str(micrograph), from_rows),
            able and micrograph is not None,
            "All particles of the micrographs of these particles"
            if micrograph
            else "The file names no micrographs, or one for all",
        )
        group = groups(features, self.colour.currentData())
        offer(
            "The same group" + (f" ({title_of(group)})" if group else ""),
            lambda: self._pick_same(str(group), from_rows),
            able and group is not None,
            "All particles of the groups of these particles; or click a group in the legend"
            if group
            else "There are no groups yet: make some in the tab Explore (C)",
        )
        menu.addSeparator()
        offer("All", lambda: selection.set(np.ones(selection.mask.size, bool)), n < selection.mask.size, "")
        offer("Invert", selection.invert, selection.mask.size > 0, "What is not selected now", "I")
        offer("Clear", selection.clear, n > 0, "Select nothing; undo brings it back", "Esc")
        offer("Undo", selection.undo, selection.can_undo, "The selection before this one", "Ctrl+Z")
        offer("Redo", selection.redo, selection.can_redo, "", "Ctrl+Shift+Z")
        menu.addSeparator()
        offer(
            "Train again on the selected particles",
            self.state.train_asked.emit,
            n > 0 and self.state.session is not None,
            "A new run on these particles alone, with the settings of the tab Train; it remembers this run",
        )
        offer("Points and density…", self._show_look, True, "Size and strength of the points")
        offer("Shortcuts…", self._show_help, True, "What keys and mouse do on the map", "F1")

    def _add_k(self, menu: QMenu) -> None:
        page = QWidget()
        row = QHBoxLayout(page)
        row.setContentsMargins(20, 2, 8, 2)
        row.addWidget(QLabel("neighbours"))
        spin = QSpinBox()
        spin.setRange(1, max(1, self.state.selection.mask.size))
        spin.setValue(min(self.n_nearest, spin.maximum()))
        spin.setToolTip("How many particles the two lines below select")
        spin.valueChanged.connect(self._set_n_nearest)
        row.addWidget(spin, 1)
        action = QWidgetAction(menu)
        action.setDefaultWidget(page)
        menu.addAction(action)
        self._k_menu = menu

    def _set_n_nearest(self, k: int) -> None:
        self.n_nearest = k
        for action in self._k_menu.actions():
            action.setText(re.sub(r"^The [\d\u202f]+ ", f"The {number(k)} ", action.text()))

    def _pick_nearest(self, z: NDArray[np.floating]) -> None:
        points, k = self._columns.z, self.n_nearest
        self._pick(lambda: nearest(points, z, k))

    def _pick_same(self, column: str, rows: NDArray[np.intp]) -> None:
        values = self.state.features[column]
        self._pick(lambda: same(values, rows))

    def _pick(self, work: Callable[[], Mask]) -> None:
        modifiers = QApplication.keyboardModifiers()

        def done(mask: Mask) -> None:
            if mask.size == self.state.selection.mask.size:
                self.canvas.choose(mask, modifiers)

        self.tasks.run("pick", work, done, self._complain)

    def _show_look(self) -> None:
        self.actions_stack.setCurrentIndex(2)

    def _show_help(self) -> None:
        from particle_explorer.widgets.shortcuts import show_shortcuts

        show_shortcuts(self)

    def _show_state(self) -> None:
        """Words where there is nothing to see; what cannot be done now says why."""
        state, learning = self.state, self._shows_live
        message = (
            NOTHING_OPEN
            if state.session is None and not len(state.features)
            else LEARNING
            if learning
            else NO_RUN
        )
        self.canvas.set_message(message)
        mapped = self._columns.n_dims > 0 and len(self._columns.features) == state.selection.mask.size
        for widget in (
            self.x,
            self.y,
            self.colour,
            self.fit_button,
            self.density_button,
            *self.tools.values(),
        ):
            widget.setEnabled(mapped)
        self.sliders.setVisible(state.handle_z.size > 0)
        encoded = state.run is not None and state.handle_z.size > 0
        self.groups_button.setEnabled(encoded)
        self.groups_button.setToolTip(
            "UMAP, t-SNE, k-means and others, in the tab Explore (C)"
            if encoded
            else "There is no trained map yet"
        )
        self._show_counts()

    def _show_counts(self, *_: object) -> None:
        selection = self.state.selection
        n, total = selection.count, selection.mask.size
        if n:
            self._hint_shown = True
            self.canvas.set_hint("")
        if not total:
            self.counts.setText("")
        elif n:
            self.counts.setText(f"{number(n)} of {number(total)} selected")
        else:
            self.counts.setText(f"{number(total)} particles")
        for button, tip in ((self.save_button, "Keep the selected particles under a name (S)"),):
            button.setEnabled(n > 0)
            button.setToolTip(tip if n else "Nothing is selected; draw a lasso around particles first")
        if n == 0 and self.actions_stack.currentIndex() == 1:
            self.actions_stack.setCurrentIndex(0)

    def _show_hint(self) -> None:
        has_handle = self.canvas.handle != (None, None)
        if has_handle and not self._hint_shown:
            self.canvas.set_hint(HINT)

    # ---- while a lasso is drawn ------------------------------------------------------

    def _show_hinted_count(self, mask: Mask | None) -> None:
        if mask is None:
            self._show_counts()
        else:
            self.counts.setText(f"{number(int(np.count_nonzero(mask)))} of {number(mask.size)} …")

    def _show_preview(self, preview: Preview | None) -> None:
        if preview is None:
            self.canvas.set_inset(None)
        else:
            self.canvas.set_inset(to_qimage(thumbnail(preview.image)), f"preview, N {number(preview.n)}")

    # ---- the particle under the mouse ----------------------------------------------

    def _forget_pictures(self, *_: object) -> None:
        self._pictures = None
        self.canvas.forget_thumbnail()

    def _on_hovered(self, row: int) -> None:
        session = self.state.session
        if row < 0 or session is None:
            return
        if self._pictures is None:
            if not session.has_images:
                return
            self._pictures = Pictures.of(self.state, self.state.view, self.decoder)
        self._thumbnails.submit(self._pictures, row)

    def _on_thumbnail(self, made: tuple[Pictures, int, QImage]) -> None:
        pictures, row, picture = made
        if pictures is self._pictures:
            self.canvas.set_thumbnail(row, picture)

    # ---- the handle --------------------------------------------------------------

    def _on_hand_moved(self, x: float, y: float) -> None:
        if self._axes is None:
            return
        self._hint_shown = True
        self.canvas.set_hint("")
        place: Place = (None if math.isnan(x) else x, None if math.isnan(y) else y)
        z = self._axes.z_at(*place, self.state.handle_z)
        self._held = (z, place)
        self.state.set_handle(z)

    def _on_snap(self, row: int) -> None:
        z = self._columns.z[row]
        if not np.isfinite(z).all() or self.state.handle_z.size != z.size:
            return
        x, y = (float(self._columns.values(combo.currentData())[row]) for combo in (self.x, self.y))
        kept = self.canvas.handle
        self._held = (z, (None if kept[0] is None else x, None if kept[1] is None else y))
        self.state.selection.set_active(row)
        self.state.set_handle(z)
        self._show_handle(z)

    def _show_handle(self, z: NDArray[np.float64]) -> None:
        if self._axes is None or z.size == 0 or z.size != self._columns.n_dims:
            self.canvas.set_handle(None, None)
            self.canvas.set_hint("")  # of a handle that is not there, as on a live map of other dimensions
            self.state.set_off_data("axes", False)
            return
        if self._held is not None and np.array_equal(self._held[0], z):
            place = self._held[1]  # in an embedding the way back from z is only approximate
        else:
            place = self._axes.place(z)
        self.canvas.set_handle(*place)
        self.state.set_off_data("axes", not self.canvas.handle_near_data)
        for i, slider in self._sliders.items():
            slider.set_value(float(z[i]))

    def _build_sliders(self) -> None:
        """One slider for each dimension that the axes do not hold, unless they hold the whole space."""
        d = self._columns.n_dims if self.state.handle_z.size == self._columns.n_dims else 0
        keys = {self.x.currentData(), self.y.currentData()}
        on_axes = [
            key for key in keys if key is not None and key.startswith(("z_", "pc_")) and key[-1].isdigit()
        ]
        hidden = (
            []
            if len([key for key in on_axes if "std" not in key]) >= d
            else [i for i in range(d) if f"z_{i}" not in keys]
        )
        if list(self._sliders) != hidden:
            for old in self._sliders.values():
                self._dimension_rows.removeWidget(old)
                old.deleteLater()
            self._sliders = {}
            for i in hidden:
                tip = f"Move ◉ along dimension {i + 1} of the map"
                slider = ValueSlider(f"map {i + 1}", 0, 1, tip=tip)
                slider.moved.connect(lambda value, i=i: self._on_slider(i, value))
                self._sliders[i] = slider
                self._dimension_rows.addWidget(slider)
                slider.show()  # now: the room for the rows is measured in a moment
        for i, slider in self._sliders.items():
            slider.set_range(*(float(value) for value in self._columns.spread[i]))
            slider.set_value(float(self.state.handle_z[i]))
        self._fit_soon.start()  # when the style has had its say

    def _on_slider(self, i: int, value: float) -> None:
        z = self.state.handle_z.copy()
        z[i] = value
        self.state.set_handle(z)

    # ---- the pose ----------------------------------------------------------------

    def _on_pose_moved(self, _: float) -> None:
        self.state.set_pose(self.angle.value, np.array([self.shift_y.value, self.shift_x.value]))

    def _show_pose(self, angle_deg: float, shift_yx_px: NDArray[np.float64]) -> None:
        self.angle.set_value(angle_deg)
        self.shift_y.set_value(float(shift_yx_px[0]))
        self.shift_x.set_value(float(shift_yx_px[1]))

    def _complain(self, failure: Failure) -> None:
        self.complaint.show_failure(failure)

    # ---- sets ------------------------------------------------------------------------

    def _ask_groups(self) -> None:
        if self.groups_button.isEnabled():
            self.state.groups_asked.emit()

    def _ask_name(self) -> None:
        if not self.state.selection.count or self.state.session is None:
            return
        self.actions_stack.setCurrentIndex(1)
        taken = set(self.state.session.selections.names())
        free = next(name for i in range(1, 10_000) if (name := f"set {i}") not in taken)
        self.set_name.setText(free)
        self.set_name.selectAll()
        self.set_name.setFocus()

    def save_set(self) -> None:
        """Keep the selection under the name that was typed."""
        session, name = self.state.session, self.set_name.text().strip()
        if session is None or not name:
            return
        mask = self.state.selection.mask
        how = f"chosen by hand in {self.x.currentText()} / {self.y.currentText()}"
        if self.state.run is not None:
            how += f" of run {self.state.run.name}"

        def done(_: None) -> None:
            self.actions_stack.setCurrentIndex(0)
            self.canvas.setFocus()
            self.state.sets_changed.emit()

        self.complaint.clear()
        self.tasks.run("save set", lambda: session.selections.save(name, mask, how), done, self._complain)

    # ---- look ------------------------------------------------------------------------

    def _on_tool(self, tool: str) -> None:
        for name, button in self.tools.items():
            button.setChecked(name == tool)

    def _on_density(self, on: bool) -> None:
        self.density_button.setChecked(on)

    def _on_theme(self, *_: object) -> None:
        look = LOOKS["dark"] if self.viewer is None else look_of(self.viewer.theme)
        self.canvas.set_look(look)
        self.histogram.histogram.look = look
        self.histogram.histogram.update()
        for name, button in (
            *self.tools.items(),
            ("fit", self.fit_button),
            ("density", self.density_button),
            ("histogram", self.histogram_button),
        ):
            button.setIcon(_icon(name, look.text, look.line))
            button.setStyleSheet(
                f"QToolButton:checked:enabled {{ background: {look.line}; border-radius: 3px; }}"
            )


def _thumbnail(pictures: Pictures, row: int) -> tuple[Pictures, int, QImage]:
    """A thread's work."""
    return pictures, row, to_qimage(thumbnail(displayed(pictures.read(np.array([row])))[0]))


class ValueSlider(QWidget):
    """A slider with its name and its value."""

    moved = Signal(float)
    """by hand"""

    def __init__(
        self, name: str, low: float, high: float, *, unit: str = "", digits: int = 1, tip: str = ""
    ) -> None:
        super().__init__()
        self._low, self._high, self._unit = low, high, unit
        self._digits = digits if unit else _digits(low, high)
        self._value = 0.0
        self.slider = QSlider(Qt.Orientation.Horizontal)
        self._steps = min(SLIDER_STEPS, round((high - low) * 10**digits)) if unit else SLIDER_STEPS
        self.slider.setRange(0, self._steps)
        self.slider.setPageStep(self._steps // 20)
        self.slider.setMinimumWidth(36)
        self.slider.setAccessibleName(name)
        self.slider.valueChanged.connect(self._on_moved)
        self.words = QLabel()
        self.words.setMinimumWidth(self.words.fontMetrics().horizontalAdvance(f"−{high:.{digits}f}{unit}"))
        self.setToolTip(tip)
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(3)
        row.addWidget(QLabel(name))
        row.addWidget(self.slider, 1)
        row.addWidget(self.words)
        self.set_value(0.0)

    @property
    def value(self) -> float:
        return self._value

    def set_range(self, low: float, high: float) -> None:
        """Other ends, with the digits that a hundredth of the way needs."""
        self._low, self._high = low, high if high > low else low + 1
        self._digits = _digits(self._low, self._high)
        self.set_value(self._value)

    def set_value(self, value: float) -> None:
        """Show a value, silently; one outside the range leaves the knob at its end."""
        self._value = value
        share = (value - self._low) / (self._high - self._low)
        with QSignalBlocker(self.slider):
            self.slider.setValue(round(min(max(share, 0.0), 1.0) * self._steps))
        self._say()

    def _on_moved(self, step: int) -> None:
        value = self._low + step / self._steps * (self._high - self._low)
        self._value = round(value, self._digits + 1) if self._digits else float(round(value))
        self._say()
        self.moved.emit(self._value)

    def _say(self) -> None:
        value = round(self._value, self._digits) + 0.0  # no minus before a zero
        self.words.setText(f"{value:.{self._digits}f}{self._unit}".replace("-", "−"))


def _digits(low: float, high: float) -> int:
    """Digits behind the point that show a hundredth of the way."""
    return int(np.clip(math.ceil(-math.log10(max(high - low, 1e-9) / 100)), 0, 6))


def look_of(theme: str) -> Look:
    """Our colours for one of napari's themes."""
    from napari.utils.theme import get_theme

    colours = get_theme(theme)
    base = LOOKS["light" if colours.type == "light" else "dark"]
    text, ground, line = (colours.text.as_hex(), colours.background.as_hex(), colours.secondary.as_hex())
    return Look(_six(ground), base.plot, _six(text), _six(line), base.ring, base.accent, base.plain)


def _six(colour: str) -> str:
    return QColor(colour).name()


def _combo(tip: str) -> QComboBox:
    combo = QComboBox()
    combo.setToolTip(tip)
    combo.setAccessibleName(tip)
    combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
    combo.setMinimumContentsLength(5)
    combo.setMaxVisibleItems(20)
    return combo


def _offer(combo: QComboBox, choices: tuple[Choice, ...]) -> None:
    """Put choices into a combo box without a signal; what was chosen stays chosen where it is still there."""
    if [(combo.itemData(i), combo.itemText(i)) for i in range(combo.count())] == [
        (choice.key, choice.short) for choice in choices
    ]:
        return
    kept = combo.currentData()
    with QSignalBlocker(combo):
        combo.clear()
        for choice in choices:
            combo.addItem(choice.short, choice.key)
            combo.setItemData(combo.count() - 1, choice.title, Qt.ItemDataRole.ToolTipRole)
        widest = max((combo.fontMetrics().horizontalAdvance(choice.short) for choice in choices), default=0)
        combo.view().setMinimumWidth(min(widest + 40, 380))
        combo.setCurrentIndex(max(0, combo.findData(kept)))


def _choose(combo: QComboBox, key: str) -> None:
    with QSignalBlocker(combo):
        combo.setCurrentIndex(combo.findData(key))


def _row(*widgets: QWidget) -> QWidget:
    page = QWidget()
    row = QHBoxLayout(page)
    row.setContentsMargins(0, 0, 0, 0)
    row.setSpacing(4)
    for widget in widgets:
        row.addWidget(widget, 0 if isinstance(widget, QLabel) else 1)
    return page


def _tool_button(tip: str, *, checkable: bool = False) -> QToolButton:
    button = QToolButton()
    button.setToolTip(tip)
    button.setAccessibleName(tip.partition(":")[0].partition("\n")[0])
    button.setCheckable(checkable)
    button.setAutoRaise(True)
    button.setIconSize(QSize(18, 18))
    button.setFixedSize(26, 24)
    return button


def _icon(name: str, colour: str, off: str) -> QIcon:
    icon = QIcon()
    icon.addPixmap(_drawing(name, colour), QIcon.Mode.Normal)
    icon.addPixmap(_drawing(name, off), QIcon.Mode.Disabled)
    return icon


def _drawing(name: str, colour: str) -> QPixmap:
    """Small pictures of the tools, drawn, so that no font and no file has to have them."""
    size = 54  # three times the size they are shown at, for sharp edges on dense screens
    picture = QPixmap(size, size)
    picture.fill(Qt.GlobalColor.transparent)
    painter = QPainter(picture)
    painter.setRenderHint(QPainter.RenderHint.Antialiasing)
    pen = QPen(QColor(colour), 4.5)
    pen.setCapStyle(Qt.PenCapStyle.RoundCap)
    painter.setPen(pen)
    if name == "handle":
        painter.drawEllipse(QPointF(27, 27), 18, 18)
        painter.setBrush(QColor(colour))
        painter.drawEllipse(QPointF(27, 27), 6, 6)
    elif name == "lasso":
        path = QPainterPath(QPointF(20, 46))
        path.cubicTo(26, 40, 20, 36, 14, 32)
        path.cubicTo(0, 20, 16, 6, 32, 8)
        path.cubicTo(52, 11, 54, 30, 36, 34)
        path.cubicTo(28, 36, 18, 36, 14, 32)
        painter.drawPath(path)
    elif name == "rectangle":
        pen.setDashPattern([2, 1.8])
        painter.setPen(pen)
        painter.drawRect(QRectF(8, 12, 38, 30))
    elif name == "ellipse":
        pen.setDashPattern([2, 1.8])
        painter.setPen(pen)
        painter.drawEllipse(QRectF(7, 12, 40, 30))
    elif name == "pan":
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            tip = QPointF(27 + 20 * dx, 27 + 20 * dy)
            painter.drawLine(QPointF(27, 27), tip)
            for side in (-1, 1):
                painter.drawLine(
                    tip, QPointF(tip.x() - 7 * dx + 7 * side * dy, tip.y() - 7 * dy + 7 * side * dx)
                )
    elif name == "histogram":
        for x, height in ((11, 14), (22, 32), (33, 24), (44, 10)):
            painter.fillRect(QRectF(x - 4, 46 - height, 8, height), QColor(colour))
    elif name == "fit":
        for dx, dy in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            corner = QPointF(27 + 18 * dx, 27 + 18 * dy)
            painter.drawLine(corner, QPointF(corner.x() - 11 * dx, corner.y()))
            painter.drawLine(corner, QPointF(corner.x(), corner.y() - 11 * dy))
    else:
        painter.setPen(Qt.PenStyle.NoPen)
        shade = QColor(colour)
        for radius, strength in ((22, 70), (15, 120), (8, 255)):
            shade.setAlpha(strength)
            painter.setBrush(shade)
            painter.drawEllipse(QPointF(27, 27), radius, radius * 0.8)
    painter.end()
    return picture
