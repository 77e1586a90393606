"""The layer "reconstruction": what the model draws at the handle, live under the mouse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from psygnal import Signal
from qtpy.QtCore import Qt, QTimer
from qtpy.QtWidgets import QWidget

from particle_explorer.widgets.background import Failure, Mailbox, notify
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.pictures import has_poses
from particle_explorer.widgets.workspace import caption, fit_view, state_of, tile, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.jobs import DecodeClient
    from particle_explorer.session import Run

LAYER = "reconstruction"
N_FOR_CONTRAST = 24
REST_MS = 250
"""So long after the last picture the layer's thumbnail follows too."""


class Request(NamedTuple):
    """What is to be drawn."""

    run_path: Path
    z: NDArray[np.float64]
    angle_deg: float
    shift_yx_px: NDArray[np.float64]
    held: bool
    for_contrast: NDArray[np.float64] | None
    """`(k, d)` positions of particles, once per run"""


class Drawn(NamedTuple):
    """What was drawn."""

    run_path: Path
    image: NDArray[np.float32]
    """`(m, m)` or `(m, m, 3)`"""
    limits: tuple[float, float] | None


class Reconstruction:
    """Follows the handle: newest position in, newest picture out, what came between is dropped."""

    shown = Signal(np.ndarray)
    """the picture, after the layer has taken it"""

    def __init__(self, viewer: napari.Viewer, owner: QWidget) -> None:
        self.viewer = unwrapped(viewer)
        self.state = state_of(self.viewer)
        self.layer: Any = None
        self.image: NDArray[np.float32] | None = None
        """what was drawn last, of the run that is shown"""
        self._limits_of: Path | None = None
        self._client: DecodeClient | None = None
        self._paused = False
        self._mailbox = Mailbox(owner, self._draw, self._show, self._fail, "reconstruction", self._close)
        self._rest = QTimer(owner)
        self._rest.setSingleShot(True)
        self._rest.setInterval(REST_MS)
        self._rest.setTimerType(Qt.TimerType.CoarseTimer)
        self._rest.timeout.connect(self._at_rest)
        follow(owner, self.state.run_changed, self._on_run)
        follow(owner, self.state.handle_changed, self._ask)
        follow(owner, self.state.pose_changed, self._ask)
        follow(owner, self.state.held_changed, self._ask)
        follow(owner, self.state.off_data_changed, self._say_at_rest)
        self._on_run(self.state.run)

    def pause(self) -> None:
        """Let the worker process go; nobody looks."""
        self._paused = True
        self._mailbox.submit(None)

    def resume(self) -> None:
        """Draw again."""
        if self._paused:
            self._paused = False
            self._ask()

    def stop(self) -> None:
        """End the thread and the worker process."""
        self._mailbox.stop()
        self._mailbox.join()

    def _on_run(self, run: Run | None) -> None:
        self.image = None
        drawable = self.state.drawable and self.state.handle_z.size > 0
        if self.layer is not None:
            self.layer.visible = drawable
        if drawable:
            self._limits_of = None
            self._ask()
        else:
            self._mailbox.submit(None)
            imported = run is not None and run.config.model.kind == "imported"
            words = "coordinates from a file: no model draws what the handle points at" if imported else ""
            caption(self.viewer, "reconstruction", words)

    def _ask(self, *_: object) -> None:
        run = self.state.run
        if run is None or self._paused or not self.state.handle_z.size or not self.state.drawable:
            return
        spread = self._positions() if self._limits_of != run.path else None
        state = self.state
        self._mailbox.submit(
            Request(run.path, state.handle_z, state.angle_deg, state.shift_yx_px, state.held, spread)
        )

    def _positions(self) -> NDArray[np.float64]:
        """Positions of some particles, to set the contrast by once per run."""
        names = [f"z_{i}" for i in range(self.state.handle_z.size)]
        z = self.state.features[names].to_numpy(float)
        z = z[np.isfinite(z).all(1)]
        if not len(z):
            return self.state.handle_z[None]
        return z[np.linspace(0, len(z) - 1, min(N_FOR_CONTRAST, len(z))).astype(int)]

    # in the thread ---------------------------------------------------------------------------------

    def _draw(self, request: Request | None) -> Drawn | None:
        from particle_explorer.jobs import DecodeClient

        if request is None:
            self._close()
            return None
        if self._client is None or self._client.run_path != request.run_path:
            self._close()
            self._client = DecodeClient(request.run_path)
        turned = request.angle_deg != 0 or bool(np.any(request.shift_yx_px))
        pose = (request.angle_deg, request.shift_yx_px) if turned else (None, None)
        image = self._client.decode(request.z[None], *pose, held=request.held)[0]
        limits = None
        if request.for_contrast is not None:
            some = self._client.decode(request.for_contrast)
            low, high = np.percentile(some, [1, 99.8])
            limits = (float(low), float(max(high, low + 1e-6)))
        pixels = image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)
        return Drawn(request.run_path, np.array(pixels, np.float32), limits)

    def _close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    # in the window ---------------------------------------------------------------------------------

    def _show(self, drawn: Drawn | None) -> None:
        run = self.state.run
        if drawn is None or run is None or drawn.run_path != run.path:
            return
        image = self.image = drawn.image
        if self.layer is None or self.layer not in self.viewer.layers:
            self._make_layer(image)
        elif self.layer.data.shape == image.shape:
            self.layer.data[...] = image
            self.layer.refresh(thumbnail=False, highlight=False, extent=False)
        else:
            self.layer.data = image
        if drawn.limits is not None:
            self._limits_of = drawn.run_path
            self.layer.contrast_limits_range = _widened(drawn.limits)
            self.layer.contrast_limits = drawn.limits
            if tuple(self.layer.scale) != self._scale():
                self.layer.scale = self._scale()
                fit_view(self.viewer)
        if not self.layer.visible:
            self.layer.visible = True
        self._rest.start()
        self.state.handle_drawn.emit()
        self.shown.emit(image)

    def _make_layer(self, image: NDArray[np.float32]) -> None:
        self.layer = self.viewer.add_image(
            image,
            name=LAYER,
            contrast_limits=(0, 1),
            rgb=image.ndim == 3,
            scale=self._scale(),
            interpolation2d="cubic",
        )
        tile(self.layer)
        self.viewer.layers.move(self.viewer.layers.index(self.layer), 0)  # the first tile
        fit_view(self.viewer)
        self._limits_of = None
        if self.state.run is not None:
            self._ask()

    def _scale(self) -> tuple[float, float]:
        assert self.state.session is not None
        size = self.state.session.plan.cached_pixel_size_A
        return (size, size) if np.isfinite(size) and size > 0 else (1.0, 1.0)

    def _at_rest(self) -> None:
        if self.layer is not None and self.layer in self.viewer.layers:
            self.layer.refresh(extent=False, highlight=False)
            run = self.state.run
            self.layer.metadata = {
                "run": "" if run is None else str(run.path),
                "settings": "" if run is None else str(run.path / "config.json"),
                "position": self.state.handle_z.tolist(),
                "angle_deg": float(self.state.angle_deg),
                "shift_yx_px": [float(value) for value in self.state.shift_yx_px],
                "held": bool(self.state.held),
            }
        self._say()

    def _say_at_rest(self, *_: object) -> None:
        # the canvas builds its words anew, programs and all, which under the hand would be a stall
        self._rest.start()

    def _say(self, *_: object) -> None:
        if self.layer is None or not self.layer.visible:
            return
        pose = "a part held still" if self.state.held else "canonical view"
        if self.state.run is not None and not has_poses(self.state):
            pose = "this model knows no pose"
        if self.state.angle_deg or np.any(self.state.shift_yx_px):
            y, x = self.state.shift_yx_px
            pose = f"turned {self.state.angle_deg:.0f}°, shifted {x:.1f}, {y:.1f} px"
        guess = ", extrapolated: no particles here" if self.state.off_data else ""
        caption(self.viewer, "reconstruction", f"reconstruction: {pose}{guess}")

    def _fail(self, failure: Failure) -> None:
        caption(self.viewer, "reconstruction", "reconstruction: the worker that draws it failed")
        notify(failure)


def _widened(limits: tuple[float, float]) -> tuple[float, float]:
    span = limits[1] - limits[0]
    return limits[0] - span, limits[1] + span
