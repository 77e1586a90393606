"""What the window shows, without a window: one selection, one handle, one open session and run.

User acts → state changes → views redraw. A view never talks to a view.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from psygnal import Signal

if TYPE_CHECKING:
    from particle_explorer.session import Run, Session

Mask = NDArray[np.bool_]
View = Literal["raw", "low-pass", "aligned", "reconstruction", "residual"]
"""How single particles are shown: in the layer, in the gallery and under the mouse."""

UNDO_DEPTH = 100


class Selection:
    """Which of `n` particles are selected: one boolean mask, one signal, undo and redo.

    Setting an equal mask again is silence, so no view needs a guard. `active` is the one particle that is
    looked at (the slider of the layer, the ring in the scatter), or None.
    """

    changed = Signal(np.ndarray)
    active_changed = Signal(object)
    hinted = Signal(object)
    """mask that the selection is about to become while a hand draws, None when it has stopped"""

    def __init__(self, n: int = 0) -> None:
        self._mask: Mask = _read_only(np.zeros(n, bool))
        self._undo: list[bytes] = []
        self._redo: list[bytes] = []
        self._active: int | None = None

    @property
    def mask(self) -> Mask:
        """`(n,)` bool, read-only."""
        return self._mask

    @property
    def count(self) -> int:
        return int(np.count_nonzero(self._mask))

    @property
    def rows(self) -> NDArray[np.intp]:
        return np.flatnonzero(self._mask)

    @property
    def active(self) -> int | None:
        return self._active

    def reset(self, n: int) -> None:
        """Start over for another table of `n` rows; forgets undo."""
        self._undo.clear()
        self._redo.clear()
        self._mask = _read_only(np.zeros(n, bool))
        self.set_active(None)
        self.changed.emit(self._mask)

    def set(self, mask: Mask) -> None:
        if mask.shape != self._mask.shape:
            raise ValueError(f"mask of {mask.shape} for {self._mask.shape} particles")
        if np.array_equal(mask, self._mask):
            return
        # what had been undone stays within reach: undo comes by it before what lies further back
        self._undo += [*self._redo, np.packbits(self._mask).tobytes()]
        del self._undo[:-UNDO_DEPTH]
        self._redo.clear()
        self._show(mask)

    def add(self, mask: Mask) -> None:
        self.set(self._mask | mask)

    def subtract(self, mask: Mask) -> None:
        self.set(self._mask & ~mask)

    def intersect(self, mask: Mask) -> None:
        self.set(self._mask & mask)

    def invert(self) -> None:
        self.set(~self._mask)

    def clear(self) -> None:
        self.set(np.zeros_like(self._mask))

    def undo(self) -> None:
        self._step(self._undo, self._redo)

    def redo(self) -> None:
        self._step(self._redo, self._undo)

    def hint(self, mask: Mask | None) -> None:
        """Tell what the selection would be if the hand let go now; None: it draws no more."""
        self.hinted.emit(mask)

    @property
    def past(self) -> tuple[bytes, ...]:
        """The selections before this one, oldest first, as packed bits."""
        return tuple(self._undo)

    def recall(self, past: Sequence[bytes]) -> None:
        """Take these, as `past` gave them, for the selections before this one."""
        n_bytes = -(-self._mask.size // 8)
        self._undo = [bits for bits in past if len(bits) == n_bytes][-UNDO_DEPTH:]
        self._redo.clear()

    @property
    def can_undo(self) -> bool:
        return bool(self._undo)

    @property
    def can_redo(self) -> bool:
        return bool(self._redo)

    def set_active(self, row: int | None) -> None:
        if row != self._active:
            self._active = row
            self.active_changed.emit(row)

    def _step(self, taken: list[bytes], kept: list[bytes]) -> None:
        if not taken:
            return
        kept.append(np.packbits(self._mask).tobytes())
        bits = np.frombuffer(taken.pop(), np.uint8)
        self._show(np.unpackbits(bits, count=self._mask.size).astype(bool))

    def _show(self, mask: Mask) -> None:
        self._mask = _read_only(np.array(mask, bool))
        self.changed.emit(self._mask)


class AppState:
    """Everything the docks of one viewer share."""

    session_changed = Signal(object)
    """Session or None"""
    run_changed = Signal(object)
    """Run or None: the run whose map is shown"""
    features_changed = Signal()
    """`features` has other columns or values"""
    handle_changed = Signal(np.ndarray)
    """`(d,)` latent position under the handle"""
    handle_drawn = Signal()
    """the picture of a position of the handle has just been shown"""
    off_data_changed = Signal(bool)
    """whether the handle stands where there are no particles: what is drawn there is a guess"""
    axes_asked = Signal(str, str)
    """columns that somebody wants to see on the axes of the map"""
    groups_asked = Signal()
    """somebody wants to lay out or group the particles"""
    train_shown = Signal()
    """somebody wants to see the settings of the next training"""
    tour_asked = Signal()
    """somebody wants to be shown around"""
    train_asked = Signal()
    """somebody wants to train again on the selection"""
    colour_asked = Signal(str)
    """column that somebody wants the map coloured by"""
    pose_changed = Signal(float, np.ndarray)
    """angle (°) and shift (y, x) (px of the cached image) at which the reconstruction is shown"""
    held_changed = Signal(bool)
    """whether pictures and averages hold a part of the particle still (`gauge.json` of the run)"""
    view_changed = Signal(str)
    """how single particles are shown"""
    preview_changed = Signal(object)
    """`Preview` of the selection, or of what is being drawn around; None where there is none"""
    classes_changed = Signal(str)
    """name of class averages newly written into the session"""
    sets_changed = Signal()
    """a named set was saved into the session or removed"""
    job_changed = Signal(str)
    """folder of a background job that was started or has ended"""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.run: Run | None = None
        self.features: pd.DataFrame = pd.DataFrame()
        self.drawable = False
        """whether the run that is shown has a model to draw with"""
        self.pose_of_run: frozenset[str] = frozenset()
        """columns of the pose that the run that is shown has found itself"""
        self.selection = Selection()
        self.handle_z: NDArray[np.float64] = np.zeros(0)
        self._off_data: set[str] = set()
        self.held = False
        self.view: View = "aligned"
        self.preview: Preview | None = None
        self.angle_deg = 0.0
        self.shift_yx_px: NDArray[np.float64] = np.zeros(2)

    def open_session(self, session: Session | None) -> None:
        """Show a session, with its newest finished run if there is one."""
        self.show(read(session))

    def open_run(self, run: Run | None) -> None:
        """Show the map of a run; the selection stays, because rows are the session's."""
        self.show(read(self.session, run))

    def show(self, opened: Opened) -> None:
        """Show what `read` has read, maybe in another thread; quick."""
        other_session = opened.session is not self.session
        if opened.run is None or self.run is None or opened.run.path != self.run.path:
            self.set_held(False)
        self.session, self.run, self.features = opened.session, opened.run, opened.features
        self.drawable, self.pose_of_run = opened.drawable, opened.pose_of_run
        latents = [name for name in map(str, self.features) if re.fullmatch(r"z_\d+", name)]
        self.handle_z = np.zeros(0 if opened.run is None else len(latents))
        if other_session:
            self.selection.reset(len(opened.features))
            self.session_changed.emit(self.session)
        self.run_changed.emit(self.run)
        self.features_changed.emit()

    def reload_features(self) -> None:
        """Read the columns of session and run again, after a job has written some."""
        self.set_features(read(self.session, self.run).features)

    def set_features(self, features: pd.DataFrame) -> None:
        """Other columns or values for the same particles."""
        if len(features) != self.selection.mask.size:
            raise ValueError(f"{len(features)} rows of features for {self.selection.mask.size} particles")
        self.features = features
        self.features_changed.emit()

    def set_handle(self, z: NDArray[np.float64]) -> None:
        z = np.asarray(z, float)
        if not np.array_equal(z, self.handle_z):
            self.handle_z = z
            self.handle_changed.emit(z)

    @property
    def off_data(self) -> bool:
        """Whether the handle stands where there are no particles."""
        return bool(self._off_data)

    def set_off_data(self, where: str, off: bool) -> None:
        """Say that in a space, `where` ("latent", "axes"), the handle stands away from particles, or not."""
        before = self.off_data
        (self._off_data.add if off else self._off_data.discard)(where)
        if self.off_data != before:
            self.off_data_changed.emit(self.off_data)

    def set_held(self, held: bool) -> None:
        """Show everything with a part of the particle held still, or as the run has it."""
        if held != self.held:
            self.held = held
            self.held_changed.emit(held)

    def set_view(self, view: View) -> None:
        """Show single particles in another way."""
        if view != self.view:
            self.view = view
            self.view_changed.emit(view)

    def set_preview(self, preview: Preview | None) -> None:
        """Show another average in passing."""
        if preview is not self.preview:
            self.preview = preview
            self.preview_changed.emit(preview)

    def set_pose(self, angle_deg: float, shift_yx_px: NDArray[np.float64]) -> None:
        shift = np.asarray(shift_yx_px, float)
        if angle_deg != self.angle_deg or not np.array_equal(shift, self.shift_yx_px):
            self.angle_deg, self.shift_yx_px = float(angle_deg), shift
            self.pose_changed.emit(self.angle_deg, shift)


@dataclass(frozen=True)
class Preview:
    """An average in passing, of a sample of the cached images: to look at, not to measure on."""

    image: NDArray[np.float32]
    """`(m, m)` or `(m, m, 3)`"""
    n: int
    """particles in it"""
    of: int
    """particles it stands for"""
    aligned: bool
    made: dict[str, Any] = field(default_factory=dict)
    """session, run, poses, and the uids of the particles in it"""


@dataclass(frozen=True)
class Opened:
    """A session and a run, with the columns of both: what takes time to read."""

    session: Session | None
    run: Run | None
    features: pd.DataFrame
    drawable: bool = False
    """Whether the run has weights to draw with"""
    pose_of_run: frozenset[str] = frozenset()
    """Columns of the pose that are the run's own, not the file's"""


def read(session: Session | None, run: Run | Literal["newest"] | None = "newest") -> Opened:
    """Read the columns of a session and of one of its runs, by default the newest finished one."""
    if session is None:
        return Opened(None, None, pd.DataFrame())
    if run == "newest":
        run = session.newest_finished_run()
    tables = [session.table]
    drawable, own = False, frozenset[str]()
    if run is not None:
        tables.append(run.features(session.table.index))
        drawable = run.has_weights
        own = frozenset(map(str, tables[-1].columns)) & {"angle_deg", "shift_y_px", "shift_x_px"}
    joined = pd.concat(tables, axis=1)
    # a run's own column wins over one of the same name in the file (angle_deg, class_id)
    return Opened(session, run, joined.loc[:, ~joined.columns.duplicated(keep="last")], drawable, own)


def _read_only(mask: Mask) -> Mask:
    mask.setflags(write=False)
    return mask
