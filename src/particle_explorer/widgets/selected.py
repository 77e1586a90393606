"""The layer "selected particles": the selection as a stack, read from disk image by image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from psygnal import Signal
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QWidget

from particle_explorer.widgets.background import Failure, Mailbox, notify
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.pictures import SHORT, Decoder, Pictures, displayed
from particle_explorer.widgets.provenance import pictures_record
from particle_explorer.widgets.workspace import caption, fit_view, state_of, tile, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import Session

LAYER = "selected particles"
N_FOR_CONTRAST = 48
N_AHEAD = 12
"""Reconstructions drawn ahead of the one looked at, so that scrolling does not wait."""
N_KEPT = 512


class ParticleRows:
    """Some particles as an array `(k, m, m)` (colour: `(k, m, m, 3)`) that is never whole.

    With `later`, single images that the drawing process must make are asked for and blank until they come.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        pictures: Pictures,
        rows: NDArray[np.intp],
        later: Callable[[NDArray[np.intp]], None] | None = None,
    ) -> None:
        self.pictures, self.rows = pictures, rows
        self._later = later if pictures.needs_model else None
        self._made: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        n_channels, m = pictures.images.shape[1], pictures.images.shape[2]
        self.shape = (len(rows), m, m) if n_channels == 1 else (len(rows), m, m, n_channels)
        self.ndim = len(self.shape)
        self.size = int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if isinstance(first, int | np.integer):
            image = self._some(np.array([int(first) % len(self)]))[0]
            return image[rest] if rest else image
        images = self._some(np.arange(len(self))[first])
        return images[(slice(None), *rest)] if rest else images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        raise TypeError("the selected particles are not loaded whole; index them")

    def read(self, chosen: NDArray[np.intp]) -> NDArray[np.float32]:
        """Images `chosen` of these rows, `(j, m, m)` or `(j, m, m, 3)`."""
        return displayed(self.pictures.read(self.rows[chosen]))

    def keep(self, rows: NDArray[np.intp], images: NDArray[np.float32]) -> None:
        """Images that have been made of `rows`."""
        for row, image in zip(rows, images, strict=True):
            self._made[int(row)] = image
        while len(self._made) > N_KEPT:
            self._made.popitem(last=False)

    def _some(self, chosen: NDArray[np.intp]) -> NDArray[np.float32]:
        if self._later is None or chosen.size > N_AHEAD or not chosen.size:
            return self.read(chosen)  # many at once are for a file, not for the eye
        if any(int(row) not in self._made for row in self.rows[chosen]):
            ahead = self.rows[chosen[0] : chosen[0] + N_AHEAD]
            self._later(np.array([row for row in ahead if int(row) not in self._made], np.intp))
        blank = np.zeros(self.shape[1:], np.float32)
        return np.stack([self._made.get(int(row), blank) for row in self.rows[chosen]])


class SelectedParticles:
    """Shows the selection as a layer whose slider is the particle; with no selection, all particles."""

    made = Signal(object)
    """the layer, when it is new"""

    def __init__(self, viewer: napari.Viewer, owner: QWidget, decoder: Decoder | None = None) -> None:
        self.viewer = unwrapped(viewer)
        self.state = state_of(self.viewer)
        self.decoder = decoder or Decoder()
        self.layer: Any = None
        self._session: Session | None = None
        self._limits_of: object = None  # what the contrast was set for
        self._mailbox = Mailbox(owner, _make, self._on_made, self._fail, "particle pictures")
        self._pending = QTimer(owner)
        self._pending.setSingleShot(True)
        self._pending.setInterval(0)
        self._pending.timeout.connect(self._show)
        follow(owner, self.state.session_changed, self._later)
        follow(owner, self.state.features_changed, self._later)
        follow(owner, self.state.held_changed, self._later)
        follow(owner, self.state.view_changed, self._later)
        follow(owner, self.state.selection.changed, self._later)
        follow(owner, self.state.selection.active_changed, self._on_active)
        self.viewer.dims.events.current_step.connect(self._on_slider)
        self._later()

    def stop(self) -> None:
        """End the thread; the drawing process belongs to whoever made it."""
        self._mailbox.stop()

    def _later(self, *_: object) -> None:
        # several of these come in one turn of the event loop; one picture is enough
        self._pending.start()

    def _rows(self) -> NDArray[np.intp]:
        rows = self.state.selection.rows
        return rows if rows.size else np.arange(self.state.selection.mask.size)

    def _show(self) -> None:
        session = self.state.session
        if session is None or self.state.selection.mask.size == 0 or not session.has_images:
            if self.layer is not None:
                self.layer.visible = False
            there = session is None or session.has_images
            caption(self.viewer, "selected", "" if there else "the images of this session are not prepared")
            return
        rows = self._rows()
        pictures = Pictures.of(self.state, self.state.view, self.decoder)
        data = ParticleRows(pictures, rows, lambda wanted: self._mailbox.submit(data, wanted))
        if self.layer is None or self.layer not in self.viewer.layers:
            self._make_layer(session, data)
        else:
            self.layer.data = data
            if session is not self._session:
                self.layer.scale = self._scale(session)
                fit_view(self.viewer)
        shown = (session, pictures.view, pictures.run_path if pictures.needs_model else None)
        if shown != self._limits_of and not pictures.needs_model:
            self._set_limits(_limits(data))
            self._limits_of = shown
        self._session = session
        self.layer.metadata = pictures_record(self.state, pictures.view, rows)
        if not self.layer.visible:
            self.layer.visible = True
        self._keep_active(rows)
        self._say(rows.size)

    def _make_layer(self, session: Session, data: ParticleRows) -> None:
        self.layer = self.viewer.add_image(
            data,
            name=LAYER,
            contrast_limits=(0, 1),
            rgb=data.ndim == 4,
            scale=self._scale(session),
            axis_labels=("particle", "y", "x"),
            multiscale=False,
        )
        tile(self.layer)
        self.viewer.dims.set_current_step(self._axis(), 0)
        fit_view(self.viewer)
        self.made.emit(self.layer)

    def _scale(self, session: Session) -> tuple[float, float, float]:
        size = session.plan.cached_pixel_size_A
        size = float(size) if np.isfinite(size) and size > 0 else 1.0
        return (1.0, size, size)

    def _axis(self) -> int:
        return self.viewer.dims.ndim - 3

    def _step(self) -> int:
        return int(self.viewer.dims.current_step[self._axis()]) if self.viewer.dims.ndim >= 3 else 0

    def _keep_active(self, rows: NDArray[np.intp]) -> None:
        active = self.state.selection.active
        if active is not None:
            index = int(np.searchsorted(rows, active))
            if index < rows.size and rows[index] == active:
                self.viewer.dims.set_current_step(self._axis(), index)
                return
            self.state.selection.set_active(None)
        if self._step() >= rows.size:
            self.viewer.dims.set_current_step(self._axis(), 0)

    def _on_slider(self, _: object = None) -> None:
        if self.layer is None or not self.layer.visible or self._pending.isActive():
            return
        rows = self.layer.data.rows
        step = self._step()
        if step < rows.size and self.viewer.dims.ndim >= 3:
            self.state.selection.set_active(int(rows[step]))

    def _on_active(self, row: int | None) -> None:
        if row is None or self.layer is None or self._pending.isActive():
            return
        rows = self.layer.data.rows
        index = int(np.searchsorted(rows, row))
        if index < rows.size and rows[index] == row and self._step() != index:
            self.viewer.dims.set_current_step(self._axis(), index)

    def _say(self, n: int) -> None:
        total = self.state.selection.mask.size
        pictures = self.layer.data.pictures
        how = SHORT[pictures.view] if pictures.view != "low-pass" else self._low_pass_words(pictures)
        if self.state.selection.count:
            words = f"{number(n)} of {number(total)} particles selected, {how}"
        else:
            words = f"none selected: all {number(total)} particles, {how}"
        caption(self.viewer, "selected", words)

    def _low_pass_words(self, pictures: Pictures) -> str:
        assert self.state.session is not None
        size = self.state.session.plan.cached_pixel_size_A
        known = np.isfinite(size) and size > 0
        reach = f"{pictures.low_pass_px * size:.0f} Å" if known else f"{pictures.low_pass_px:.0f} px"
        return ("aligned, " if pictures.is_aligned else "") + f"low-passed to {reach}"

    # pictures that the drawing process makes ----------------------------------------------------------

    def _on_made(self, made: tuple[ParticleRows, NDArray[np.intp], NDArray[np.float32]]) -> None:
        data, rows, images = made
        if self.layer is None or data is not self.layer.data or not rows.size:
            return
        data.keep(rows, images)
        shown = (self._session, data.pictures.view, data.pictures.run_path)
        if shown != self._limits_of:
            self._limits_of = shown
            self._set_limits(_range_of(images, symmetric=data.pictures.view == "residual"))
        self.layer.refresh(highlight=False, extent=False)

    def _set_limits(self, limits: tuple[float, float]) -> None:
        span = limits[1] - limits[0]
        self.layer.contrast_limits_range = (limits[0] - span, limits[1] + span)
        self.layer.contrast_limits = limits

    def _fail(self, failure: Failure) -> None:
        caption(self.viewer, "selected", "selected particles: the worker that draws them failed")
        notify(failure)


def _make(
    data: ParticleRows, rows: NDArray[np.intp]
) -> tuple[ParticleRows, NDArray[np.intp], NDArray[np.float32]]:
    """A thread's work: waits for the drawing process."""
    return data, rows, displayed(data.pictures.read(rows))


def _limits(data: ParticleRows) -> tuple[float, float]:
    return _range_of(data.read(np.linspace(0, len(data) - 1, min(N_FOR_CONTRAST, len(data))).astype(int)))


def _range_of(images: NDArray[np.float32], *, symmetric: bool = False) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(images, [0.5, 99.8]))
    if symmetric:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    return low, max(high, low + 1e-6)
