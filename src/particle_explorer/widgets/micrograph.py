"""The selected particles as points on the micrographs they were cut from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QHBoxLayout, QLabel, QPushButton, QToolButton, QVBoxLayout, QWidget

from particle_explorer.io.micrographs import Locations, Picture, find, read
from particle_explorer.state import Mask
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.workspace import caption, fit_view, state_of, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import Session

IMAGE, POINTS = "micrograph", "particles on the micrograph"
SELECTED, OTHER, LOOKED_AT = "#E69F00", "#56B4E980", "#FF2255"


@dataclass(frozen=True)
class Sheet:
    """One micrograph with its particles."""

    index: int
    name: str
    picture: Picture | None
    missing: str
    """Why there is no picture"""
    rows: NDArray[np.intp]
    """`(k,)` of all particles on it"""


class MicrographPanel(QWidget):
    """Shows the micrograph of the particle that is looked at, or of those selected, with points on it."""

    def __init__(self, viewer: napari.Viewer) -> None:
        super().__init__()
        self.viewer = unwrapped(viewer)
        self.state = state_of(self.viewer)
        self.tasks = Tasks(self)
        self.sheet: Sheet | None = None
        self.image: Any = None
        self.points: Any = None
        self._locations: Locations | None = None
        self._at = -1
        self._hidden: dict[Any, None] = {}
        self._had_grid = True
        self.button = QPushButton("Show on the micrograph")
        self.button.setCheckable(True)
        self.button.toggled.connect(self._on_toggled)
        self.before, self.after = QToolButton(), QToolButton()
        for arrow, kind, step, tip in (
            (self.before, Qt.ArrowType.LeftArrow, -1, "The micrograph before, of those with such particles"),
            (self.after, Qt.ArrowType.RightArrow, 1, "The next micrograph with such particles"),
        ):
            arrow.setArrowType(kind)
            arrow.setToolTip(tip)
            arrow.setVisible(False)
            arrow.clicked.connect(lambda _=False, step=step: self.step(step))
        self.words = QLabel()
        self.words.setWordWrap(True)
        self.words.setVisible(False)
        row = QHBoxLayout()
        row.setSpacing(3)
        row.addWidget(self.button, 1)
        row.addWidget(self.before)
        row.addWidget(self.after)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(3)
        layout.addLayout(row)
        layout.addWidget(self.words)
        follow(self, self.state.session_changed, self._on_session)
        follow(self, self.state.selection.changed, self._on_selection)
        follow(self, self.state.selection.active_changed, self._on_active)
        self.viewer.layers.events.removed.connect(self._on_removed)
        self.viewer.layers.events.inserted.connect(self._on_inserted)
        self._on_session(self.state.session)

    # --- on and off -----------------------------------------------------------------------------------

    @property
    def is_on(self) -> bool:
        return self.button.isChecked()

    def toggle(self) -> None:
        """Show the micrograph, or go back."""
        if self.button.isEnabled():
            self.button.toggle()

    def _on_toggled(self, on: bool) -> None:
        if not on:
            self._end()
            return
        session = self.state.session
        if session is None:
            self.button.setChecked(False)
            return
        self._say("Looking for the micrograph …")

        def located(locations: Locations) -> None:
            if self.state.session is session and self.is_on:
                self._locations = locations
                self._go(self._wanted())

        what = session.original_source.name
        known = self._locations
        work = lambda: Locations.of(session.table, what) if known is None else known  # noqa: E731
        self.tasks.run("locate", work, located, self._fail)

    def _fail(self, failure: Failure) -> None:
        self.button.setChecked(False)
        self._say(failure.sentence)

    def _end(self) -> None:
        self.tasks.forget("locate")
        self.tasks.forget("micrograph")
        self._say("")
        caption(self.viewer, "micrograph", "")
        if self.image is None and self.points is None:
            return
        mine, self.image, self.points, self.sheet, self._at = (self.image, self.points), None, None, None, -1
        for layer in mine:
            if layer is not None and layer in self.viewer.layers:
                self.viewer.layers.remove(layer)
        self.viewer.canvas.grid.enabled = self._had_grid
        hidden, self._hidden = list(self._hidden), {}
        for layer in hidden:
            layer.events.visible.disconnect(self._keep_hidden)
            if layer in self.viewer.layers:
                layer.visible = True
        fit_view(self.viewer)
        self._arm()

    # --- which micrograph -----------------------------------------------------------------------------

    def _mask(self) -> Mask:
        mask = self.state.selection.mask
        return mask if mask.any() else np.ones(mask.size, bool)

    def _wanted(self) -> int:
        """The micrograph of the particle looked at, where it is one of those shown; else the fullest one."""
        assert self._locations is not None
        active, mask = self.state.selection.active, self._mask()
        if active is not None and mask[active]:
            return int(self._locations.micrograph[active])
        counts = self._locations.counts(mask)
        return self._at if 0 <= self._at < len(counts) and counts[self._at] else int(counts.argmax())

    def step(self, by: int) -> None:
        """To the next or the last micrograph with particles that are selected."""
        if self._locations is None or not self.is_on:
            return
        those = np.flatnonzero(self._locations.counts(self._mask()))
        at = int(np.searchsorted(those, self._at))
        self._go(int(those[(at + by) % len(those)]) if those.size else self._at)

    def _go(self, index: int) -> None:
        session, locations = self.state.session, self._locations
        if session is None or locations is None or index < 0:
            return
        if index == self._at and self.sheet is not None:
            self._mark()
            return
        self._at = index

        def show(sheet: Sheet) -> None:
            if self.state.session is session and self.is_on:
                self._show(sheet)

        self.tasks.run("micrograph", lambda: look(session, locations, index), show, self._fail)

    # --- what is shown --------------------------------------------------------------------------------

    def _show(self, sheet: Sheet) -> None:
        assert self._locations is not None
        first = self.sheet is None
        self.sheet = sheet
        if first:
            self._take_canvas()
        size = float(self._locations.pixel_size_A[sheet.rows[0]]) if sheet.rows.size else 1.0
        size = size if np.isfinite(size) and size > 0 else 1.0
        picture = sheet.picture
        if picture is None:
            if self.image is not None and self.image in self.viewer.layers:
                self.viewer.layers.remove(self.image)
            self.image = None
        else:
            pixel = picture.binning * size
            # the first pixel is the mean of the first few: its centre lies among theirs
            aside = (picture.binning - 1) / 2 * size
            if self.image is None:
                self.image = self.viewer.add_image(picture.pixels, name=IMAGE)
                self.viewer.layers.move(self.viewer.layers.index(self.image), 0)
            else:
                self.image.data = picture.pixels
            self.image.scale, self.image.translate = (pixel, pixel), (aside, aside)
            low, high = picture.limits
            self.image.contrast_limits_range = (2 * low - high, 2 * high - low)
            self.image.contrast_limits = picture.limits
            session = self.state.session
            self.image.metadata = {
                "micrograph": sheet.name,
                "binned": picture.binning,
                "uid": [] if session is None else session.uid[sheet.rows],
            }
        self._show_points(size)
        self._mark()
        fit_view(self.viewer)

    def _show_points(self, size: float) -> None:
        assert self.sheet is not None and self._locations is not None
        rows = self.sheet.rows
        old, self.points = self.points, None
        if old is not None and old in self.viewer.layers:
            self.viewer.layers.remove(old)
        diameter = self._locations.size_px[rows]
        session = self.state.session
        if session is not None:
            plan = session.plan
            known = np.isfinite(plan.cached_pixel_size_A)
            if known and size != 1.0:
                diameter = np.full(len(rows), plan.diameter_px * plan.cached_pixel_size_A / size)
        self.points = self.viewer.add_points(
            self._locations.xy_px[rows][:, ::-1],
            name=POINTS,
            scale=(size, size),
            size=diameter,
            face_color="transparent",
            border_width=0.1,
            border_width_is_relative=True,
            features={"particle": rows + 1},
        )
        self.points.mode = "pan_zoom"
        self.points.mouse_drag_callbacks.append(self._on_click)

    def _mark(self) -> None:
        """Colours of the points, and what is seen in words."""
        sheet, points, locations = self.sheet, self.points, self._locations
        if sheet is None or points is None or locations is None:
            return
        selected = self.state.selection.mask[sheet.rows]
        active = sheet.rows == self.state.selection.active
        colours = np.where(active, LOOKED_AT, np.where(selected, SELECTED, OTHER))
        points.border_color = list(colours)
        points.refresh()
        counts = locations.counts(self._mask())
        those = np.flatnonzero(counts)
        at = int(np.searchsorted(those, sheet.index)) + 1
        n, chosen = len(sheet.rows), int(selected.sum())
        words = f"{chosen} of its {number(n)} particles selected" if chosen else f"{number(n)} particles"
        if those.size and sheet.index in those:
            words += f"; {number(at)} of {number(len(those))} micrographs"
            words += " with selected particles" if self.state.selection.count else ""
        name = Path(sheet.name).name
        self._say(f"{name}: {words}. {sheet.missing}".strip())
        of = f"{number(chosen)} of {number(n)} selected" if chosen else f"{number(n)} particles"
        caption(self.viewer, "micrograph", f"{name}: {of} (M goes back)")
        self._offer_others(those.size > 1)

    def _on_click(self, layer: Any, event: Any) -> Any:
        """A click on a point looks at that particle; Shift selects it too, Alt takes it away."""
        start = np.array(event.pos)
        yield
        while event.type == "mouse_move":
            if np.abs(np.array(event.pos) - start).max() > 4:
                return  # the view is being moved
            yield
        if self.sheet is None:
            return
        # circles overlap: the one whose middle is nearest is meant
        at = np.array(layer.world_to_data(event.position[-2:]))
        away = np.linalg.norm(layer.data - at, axis=1)
        index = int(away.argmin())
        if away[index] > layer.size[index] / 2:
            return
        selection, row = self.state.selection, int(self.sheet.rows[index])
        one = np.zeros(selection.mask.size, bool)
        one[row] = True
        if "Shift" in event.modifiers:
            selection.add(one)
        elif "Alt" in event.modifiers:
            selection.subtract(one)
        selection.set_active(row)

    # --- the canvas -----------------------------------------------------------------------------------

    def _take_canvas(self) -> None:
        """Points lie on their micrograph only where all layers share one tile: others step aside."""
        self._had_grid = self.viewer.canvas.grid.enabled
        self.viewer.canvas.grid.enabled = False
        for layer in list(self.viewer.layers):
            self._hide(layer)

    def _hide(self, layer: Any) -> None:
        if layer.visible and layer not in self._hidden:
            self._hidden[layer] = None
            layer.visible = False
            layer.events.visible.connect(self._keep_hidden)

    def _keep_hidden(self, event: Any) -> None:
        # others show their layers whenever they have something new
        if self.sheet is not None and event.source in self._hidden and event.source.visible:
            event.source.visible = False

    def _on_inserted(self, event: Any) -> None:
        ours = (IMAGE, POINTS)
        if self.sheet is not None and event.value.name not in ours and self.is_on:
            self.button.setChecked(False)  # somebody wants to show something else

    def _on_removed(self, event: Any) -> None:
        if self.is_on and event.value is self.points and self.sheet is not None:
            self.points = None
            self.button.setChecked(False)

    # --- the state ------------------------------------------------------------------------------------

    def _on_session(self, session: Session | None) -> None:
        self.button.setChecked(False)
        self._locations = None
        self._arm()

    def _arm(self) -> None:
        session = self.state.session
        named = session is not None and "micrograph" in session.table
        self.button.setEnabled(named)
        self.button.setToolTip(
            "<p>Particles as circles where they were picked: selected ones orange, others of that micrograph"
            " blue, the one looked at red. A click on a circle looks at that particle (M)</p>"
            if named
            else "The file does not say which micrographs its particles come from"
        )
        self._offer_others(False)

    def _offer_others(self, there: bool) -> None:
        for arrow in (self.before, self.after):
            arrow.setVisible(there)

    def _on_selection(self, _: object) -> None:
        if self.is_on and self._locations is not None:
            self._go(self._wanted())

    def _on_active(self, row: int | None) -> None:
        if self.is_on and self._locations is not None and row is not None:
            self._go(int(self._locations.micrograph[row]))

    def _say(self, words: str) -> None:
        self.words.setText(words)
        self.words.setVisible(bool(words))


def look(session: Session, locations: Locations, index: int) -> Sheet:
    """Read one micrograph and which particles lie on it; a thread's work."""
    from particle_explorer.files import UserError

    rows = np.flatnonzero(locations.micrograph == index)
    name = locations.names[index]
    stack = Path(str(session.table["stack_path"].iloc[rows[0]])) if rows.size else session.path
    path = find(name, session.original_source, stack)
    if path is None:
        where = session.original_source.parent
        missing = f"Its image {name} was not found beside {where} or in the folders above: points alone."
        return Sheet(index, name, None, missing, rows)
    try:
        return Sheet(index, name, read(path), "", rows)
    except (UserError, OSError) as error:
        return Sheet(index, name, None, f"Its image cannot be shown: {error}.", rows)
