"""The layer "selected particles": the selection as a stack, read from disk image by image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QWidget

from particle_explorer.pose import rotation_matrix
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.latent_plot import follow
from particle_explorer.widgets.workspace import caption, fit_view, state_of, tile, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import CachedImages, Session

LAYER = "selected particles"
N_FOR_CONTRAST = 48
View = Literal["raw", "aligned"]


class ParticleRows:
    """Some rows of a session's images as an array `(k, m, m)` (colour: `(k, m, m, 3)`) that is never whole.

    With poses, every image is turned and moved back to the frame of the reference as it is read.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        images: CachedImages,
        rows: NDArray[np.intp],
        angle_deg: NDArray[np.floating] | None = None,
        shift_yx_px: NDArray[np.floating] | None = None,
    ) -> None:
        """`angle_deg (k,)` and `shift_yx_px (k, 2)` in pixels of the cached images belong to `rows`."""
        self._images, self.rows = images, rows
        self._angle_deg, self._shift_yx_px = angle_deg, shift_yx_px
        n_channels, m = images.shape[1], images.shape[2]
        self.shape = (len(rows), m, m) if n_channels == 1 else (len(rows), m, m, n_channels)
        self.ndim = len(self.shape)
        self.size = int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if isinstance(first, int | np.integer):
            index = int(first) % len(self)
            image = self.read(np.array([index]))[0]
            return image[rest] if rest else image
        chosen = np.arange(len(self))[first]
        images = self.read(chosen)
        return images[(slice(None), *rest)] if rest else images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        raise TypeError("the selected particles are not loaded whole; index them")

    def read(self, chosen: NDArray[np.intp]) -> NDArray[np.float32]:
        """Images `chosen` of these rows, `(j, m, m)` or `(j, m, m, 3)`."""
        images = self._images.read(self.rows[chosen])
        if self._angle_deg is not None and self._shift_yx_px is not None:
            for image, index in zip(images, chosen, strict=True):
                for channel in image:
                    channel[:] = to_reference(channel, self._angle_deg[index], self._shift_yx_px[index])
        return images[:, 0] if images.shape[1] == 1 else np.moveaxis(images, 1, -1)


def to_reference(
    image: NDArray[np.float32], angle_deg: float, shift_yx_px: NDArray[np.floating]
) -> NDArray[np.float32]:
    """`(m, m)` image → the frame of the reference: undoes the placement of `pose`, about pixel m // 2."""
    from scipy.ndimage import affine_transform

    if not (np.isfinite(angle_deg) and np.isfinite(shift_yx_px).all()):
        return image
    # at reference point x the image is wanted at R x + shift; R acts on (x, y), the transform on (y, x)
    matrix = rotation_matrix(angle_deg)[::-1, ::-1]
    centre = np.array([image.shape[0] // 2, image.shape[1] // 2], float)
    offset = centre + np.asarray(shift_yx_px, float) - matrix @ centre
    return affine_transform(image, matrix, offset, order=1, mode="constant", cval=0.0)


class SelectedParticles:
    """Shows the selection as a layer whose slider is the particle; with no selection, all particles."""

    def __init__(self, viewer: napari.Viewer, owner: QWidget) -> None:
        self.viewer = unwrapped(viewer)
        self.state = state_of(self.viewer)
        self.layer: Any = None
        self.view: View = "aligned"
        self._session: Session | None = None
        self._pending = QTimer(owner)
        self._pending.setSingleShot(True)
        self._pending.setInterval(0)
        self._pending.timeout.connect(self._show)
        follow(owner, self.state.session_changed, self._later)
        follow(owner, self.state.features_changed, self._later)
        follow(owner, self.state.held_changed, self._later)
        follow(owner, self.state.selection.changed, self._later)
        follow(owner, self.state.selection.active_changed, self._on_active)
        self.viewer.dims.events.current_step.connect(self._on_slider)
        self._later()

    @property
    def can_align(self) -> bool:
        """Whether the particles shown have poses."""
        return {"angle_deg", "shift_y_px", "shift_x_px"} <= set(self.state.features.columns)

    def set_view(self, view: View) -> None:
        """As recorded, or turned and moved back by their poses."""
        if view != self.view:
            self.view = view
            self._later()

    def _later(self, *_: object) -> None:
        # several of these come in one turn of the event loop; one picture is enough
        self._pending.start()

    def _rows(self) -> NDArray[np.intp]:
        rows = self.state.selection.rows
        return rows if rows.size else np.arange(self.state.selection.mask.size)

    def _show(self) -> None:
        session = self.state.session
        if session is None or self.state.selection.mask.size == 0:
            if self.layer is not None:
                self.layer.visible = False
            caption(self.viewer, "selected", "")
            return
        rows = self._rows()
        data = self._stack(session, rows)
        if self.layer is None or self.layer not in self.viewer.layers:
            self._make_layer(session, data)
        else:
            self.layer.data = data
            if session is not self._session:
                self.layer.contrast_limits = _limits(data)
                self.layer.scale = self._scale(session)
                fit_view(self.viewer)
        self._session = session
        if not self.layer.visible:
            self.layer.visible = True
        self._keep_active(rows)
        self._say(rows.size)

    def _stack(self, session: Session, rows: NDArray[np.intp]) -> ParticleRows:
        if self.view == "raw" or not self.can_align:
            return ParticleRows(session.images, rows)
        features = self.state.features
        held = "pose-held " if self.state.held and "pose-held angle_deg" in features else ""
        angle = features[f"{held}angle_deg"].to_numpy(float)[rows]
        shift = features[[f"{held}shift_y_px", f"{held}shift_x_px"]].to_numpy(float)[rows]
        originals = session.table["box_px"].to_numpy(float)[rows]
        return ParticleRows(
            session.images, rows, angle, shift * (session.images.shape[-1] / originals)[:, None]
        )

    def _make_layer(self, session: Session, data: ParticleRows) -> None:
        self.layer = self.viewer.add_image(
            data,
            name=LAYER,
            contrast_limits=_limits(data),
            rgb=data.ndim == 4,
            scale=self._scale(session),
            axis_labels=("particle", "y", "x"),
            multiscale=False,
        )
        tile(self.layer)
        self.viewer.dims.set_current_step(self._axis(), 0)
        fit_view(self.viewer)

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
        how = "aligned" if self.view == "aligned" and self.can_align else "as prepared"
        if self.state.selection.count:
            words = f"{number(n)} of {number(total)} particles selected, {how}"
        else:
            words = f"none selected: all {number(total)} particles, {how}"
        caption(self.viewer, "selected", words)


def _limits(data: ParticleRows) -> tuple[float, float]:
    few = data.read(np.linspace(0, len(data) - 1, min(N_FOR_CONTRAST, len(data))).astype(int))
    low, high = np.percentile(few, [0.5, 99.8])
    return float(low), float(max(high, low + 1e-6))
