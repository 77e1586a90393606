"""The latent view: the scatter with its axes, colours and handle, and what one does with a selection."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QPoint, QSignalBlocker, QSize, Qt
from qtpy.QtGui import QImage, QResizeEvent
from qtpy.QtWidgets import (
    QComboBox,
    QHBoxLayout,
    QLabel,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.state import AppState, Mask, Preview
from particle_explorer.widgets.background import Failure, JobFollower, Mailbox, Tasks, in_turn
from particle_explorer.widgets.colours import Colouring, plain, recoloured, with_limits
from particle_explorer.widgets.histogram import Counts, HistogramPanel, count, recount, within
from particle_explorer.widgets.job_bar import Complaint, number
from particle_explorer.widgets.latent_axes import (
    ONE_COLOUR,
    Choice,
    Columns,
    HandleAxes,
    Live,
    LiveReader,
    Place,
    Seen,
    read_columns,
)
from particle_explorer.widgets.latent_plot import ScatterCanvas, Tool
from particle_explorer.widgets.lifetime import follow, follow_event
from particle_explorer.widgets.map_actions import MapActions
from particle_explorer.widgets.map_sliders import MapSliders
from particle_explorer.widgets.painted import to_qimage
from particle_explorer.widgets.pictures import Decoder, Pictures, displayed, thumbnail
from particle_explorer.widgets.plot_frame import LOOKS, look_of
from particle_explorer.widgets.select_menu import SelectMenu
from particle_explorer.widgets.sets import sets_colouring
from particle_explorer.widgets.splat import Points
from particle_explorer.widgets.tool_buttons import tool_button, tool_icon

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
SETS = "named sets"
"""Key of the colouring by sets, which are no column of the table"""
_BESIDE_COLOUR_PX = 140
"""Taken in the row of the colour by what is neither its name nor a number"""


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
        self._columns = Columns.none(state.features)
        self._axes: HandleAxes | None = None
        self._drawn: tuple[NDArray[np.float64], str, str] | None = None  # what the points were made of
        self._held: tuple[NDArray[np.float64], Place] | None = (
            None  # where the hand put the handle, and its z
        )
        self._has_sets = False
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
        self.sliders = MapSliders(state)
        layout.addWidget(self.sliders)
        self.complaint = Complaint()
        self.menu = SelectMenu(
            state, lambda: (self._columns, self.colour.currentData()), self._complain, self
        )
        self.actions = MapActions(state, self.canvas, self.menu, self.complaint, self._origin)
        layout.addWidget(self.actions)
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
        self.canvas.save_asked.connect(self.actions.ask_name)
        self.canvas.cluster_asked.connect(self.actions.ask_groups)
        self.menu.picked.connect(self.canvas.choose)
        self.menu.look_asked.connect(self.actions.show_look)
        self.menu.help_asked.connect(self._show_help)
        follow(self, state.session_changed, self._on_session)
        follow(self, state.run_changed, self._on_run)
        follow(self, state.features_changed, self._on_features)
        follow(self, state.handle_changed, self._show_handle)
        follow(self, state.handle_drawn, self.canvas.show_handle)
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
        self.menu.stop()
        self.actions.stop()
        self.tasks.stop()

    def sizeHint(self) -> QSize:
        return QSize(392, 430)

    # ---- parts ----------------------------------------------------------------

    def _build_tools(self) -> QVBoxLayout:
        column = QVBoxLayout()
        column.setSpacing(1)
        self.tools: dict[str, QToolButton] = {}
        for name, tip in TOOLS.items():
            button = tool_button(tip, checkable=True)
            button.clicked.connect(lambda _=False, tool=name: self.canvas.set_tool(tool))
            self.tools[name] = button
            column.addWidget(button)
        self.fit_button = tool_button("Show the whole map (double click)")
        self.fit_button.clicked.connect(self.canvas.fit)
        self.density_button = tool_button(
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
        self.colour.currentIndexChanged.connect(self._show_counts)
        below = QHBoxLayout()
        below.addWidget(QLabel("colour"))
        below.addWidget(self.colour, 1)
        self.histogram_button = tool_button(
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
        self.counts.setMinimumWidth(1)  # no wider dock for more digits
        below.addWidget(self.counts)
        rows = QVBoxLayout()
        rows.setSpacing(3)
        for row in (axes, below):
            row.setSpacing(4)
            rows.addLayout(row)
        return rows

    def resizeEvent(self, event: QResizeEvent | None) -> None:
        super().resizeEvent(event)
        self.sliders.fit_into(self.height())
        self._show_counts()

    # ---- what is open ----------------------------------------------------------

    def _on_session(self, session: Session | None) -> None:
        self.complaint.clear()
        self._live_run, self._held = None, None
        self._live.follow(None if session is None else session.path)
        self.actions.look.reset_density()
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
            self._read_columns(None, self._columns)

    def _read_columns(self, live: Live | None, before: Columns | None = None) -> None:
        features, session = self.state.features, self.state.session

        def work() -> tuple[Columns, bool]:
            columns = in_turn(read_columns, features, live, before)
            return columns, session is not None and bool(session.selections.names())

        self.tasks.run("columns", work, self._on_columns, self._complain)

    @property
    def _shows_live(self) -> bool:
        return self._live_run is not None and self.live_button.isChecked()

    def _on_live(self, seen: Seen) -> None:
        was = self._live_run
        self._live_run = seen.run_path
        self.live_button.setVisible(self._live_run is not None)
        if self._shows_live and seen.live is not None:
            self._read_columns(seen.live)
        if was != self._live_run:
            if was is not None and self._live_run is None and self.state.run is not None:
                self._on_features()  # it has ended without a map of its own, or that map is being opened now
            self._show_state()

    def _on_live_toggled(self, on: bool) -> None:
        if not on:
            self._on_features()
        self._show_state()

    def _on_columns(self, found: tuple[Columns, bool]) -> None:
        """Offer and show the columns that were found; choices made before stay where they still fit."""
        columns, self._has_sets = found
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
            self.state.set_handle(columns.positions.median)  # the origin may be far from every particle
        self._offer_sliders()
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
            **self.actions.look.remembered(),
            "histogram": self.histogram_button.isChecked(),
            "n_nearest": self.menu.n_nearest,
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
            self._offer_sliders()

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
        self.actions.look.recall(found)
        self.histogram_button.setChecked(bool(found.get("histogram")))
        self.menu.n_nearest = max(1, int(found.get("n_nearest", self.menu.n_nearest)))

    def _offer_columns(self, columns: Columns) -> None:
        axes, colours = (columns.axes, columns.colours) if columns.n_dims else ((), ())
        if colours and self._has_sets:
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
        self._offer_sliders()

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
        session = self.state.session
        if session is not None:
            self.tasks.run("sets", lambda: bool(session.selections.names()), self._on_sets_read)

    def _on_sets_read(self, some: bool) -> None:
        self._has_sets = some
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
        self.menu.pop_up(row, where)

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
        self.actions.show_able()
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
            words = f"{number(n)} of {number(total)}"
            # less of a number than all of it would be another number; the word goes before a name is cut
            metrics = self.colour.fontMetrics()
            name = self.width() - metrics.horizontalAdvance(self.colour.currentText()) - _BESIDE_COLOUR_PX
            room = min(self.width() // 2, name)
            whole = self.counts.fontMetrics().horizontalAdvance(f"{words} selected") <= room
            self.counts.setText(f"{words} selected" if whole else words)
        else:
            self.counts.setText(f"{number(total)} particles")

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
        self.sliders.show_position(z)

    def _offer_sliders(self) -> None:
        self.sliders.offer(self._columns, self.x.currentData(), self.y.currentData())

    def _origin(self) -> str:
        """Where on the map a selection is made, in words."""
        words = f"chosen by hand in {self.x.currentText()} / {self.y.currentText()}"
        return words if self.state.run is None else f"{words} of run {self.state.run.name}"

    def _complain(self, failure: Failure) -> None:
        self.complaint.show_failure(failure)

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
            button.setIcon(tool_icon(name, look.text, look.line))
            button.setStyleSheet(
                f"QToolButton:checked:enabled {{ background: {look.line}; border-radius: 3px; }}"
            )


def _thumbnail(pictures: Pictures, row: int) -> tuple[Pictures, int, QImage]:
    """A thread's work."""
    return pictures, row, to_qimage(thumbnail(displayed(pictures.read(np.array([row])))[0]))


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
