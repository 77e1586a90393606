"""Up to four pinned positions side by side, each with what is different at the handle: one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from psygnal import Signal
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import QWidget

from particle_explorer.widgets.workspace import fit_view, state_of, tile, unwrapped

if TYPE_CHECKING:
    import napari

LAYER = "pinned positions"
MOST = 4
GAP_PX = 2
REFRESH_MS = 60
"""The differences follow a moving handle at this pace; the reconstruction itself is faster."""

Picture = NDArray[np.float32]


class Pins:
    """Pictures kept from positions on the way."""

    changed = Signal()

    def __init__(self, viewer: napari.Viewer, owner: QWidget) -> None:
        self.viewer = unwrapped(viewer)
        self.state = state_of(self.viewer)
        self.layer: Any = None
        self.positions: list[NDArray[np.float64]] = []
        self._pictures: list[Picture] = []
        self._made: list[dict[str, Any]] = []
        self._newest: Picture | None = None
        self._pending = QTimer(owner)
        self._pending.setSingleShot(True)
        self._pending.setInterval(REFRESH_MS)
        self._pending.timeout.connect(self._show)

    @property
    def is_full(self) -> bool:
        return len(self.positions) >= MOST

    def add(self, z: NDArray[np.float64], picture: Picture) -> None:
        """Keep the picture of a position."""
        if self.is_full:
            return
        if self._pictures and self._pictures[0].shape != picture.shape:
            self.clear()
        self.positions.append(np.array(z))
        self._pictures.append(np.array(picture, np.float32))
        self._made.append(self._drawn())
        self._newest = self._pictures[-1]
        self._show()
        self.changed.emit()

    def clear(self) -> None:
        """Keep nothing."""
        self.positions, self._pictures, self._made = [], [], []
        if self.layer is not None and self.layer in self.viewer.layers:
            self.layer.visible = False
        self.changed.emit()

    def compare(self, picture: Picture) -> None:
        """The handle shows another picture: the differences are to it."""
        if self._pictures:
            self._newest = np.array(picture, np.float32)
            if not self._pending.isActive():
                self._pending.start()

    def _show(self) -> None:
        if not self._pictures or self._newest is None or self._newest.shape != self._pictures[0].shape:
            return
        pixels = montage(self._pictures, self._newest)
        if self.layer is None or self.layer not in self.viewer.layers:
            self.layer = self.viewer.add_image(
                pixels,
                name=LAYER,
                contrast_limits=(0, 1),
                rgb=pixels.ndim == 3,
                scale=self._scale(pixels),
            )
            tile(self.layer)
            fit_view(self.viewer)
        elif self.layer.data.shape == pixels.shape:
            self.layer.data[...] = pixels
            self.layer.refresh(thumbnail=False, highlight=False, extent=False)
        else:
            self.layer.data = pixels
            self.layer.scale = self._scale(pixels)
            fit_view(self.viewer)
        self.layer.metadata = {
            **{f"pin {i + 1}": made for i, made in enumerate(self._made)},
            "below": {"shows": "what the handle has more (bright) or less (dark)", **self._drawn()},
        }
        if not self.layer.visible:
            self.layer.visible = True

    def _drawn(self) -> dict[str, Any]:
        """What made the reconstruction as it is."""
        state = self.state
        return {
            "run": "" if state.run is None else str(state.run.path),
            "position": state.handle_z.tolist(),
            "angle_deg": float(state.angle_deg),
            "shift_yx_px": [float(value) for value in state.shift_yx_px],
            "held": bool(state.held),
        }

    def _scale(self, pixels: Picture) -> tuple[float, float]:
        """As large on the canvas as one picture: tiles are as large as the largest layer."""
        session = self.state.session
        size = 1.0 if session is None else session.plan.cached_pixel_size_A
        size = size if np.isfinite(size) and size > 0 else 1.0
        each = size * self._pictures[0].shape[0] / max(pixels.shape[:2])
        return each, each


def montage(pictures: list[Picture], newest: Picture) -> Picture:
    """Pictures in a row, below each what `newest` has more (bright) or less (dark); 0 to 1."""
    joined = np.stack([*pictures, newest])
    low, high = np.percentile(joined, [0.5, 99.8])
    span = max(float(high - low), 1e-12)
    differences = [newest - picture for picture in pictures]
    # one scale for all differences, and never so fine that rounding looks like a difference
    largest = max(float(np.abs(np.stack(differences)).max()), 0.05 * span)
    m = pictures[0].shape[0]
    side = m + GAP_PX
    channels = pictures[0].shape[2:]
    pixels = np.zeros((2 * side - GAP_PX, len(pictures) * side - GAP_PX, *channels), np.float32)
    for i, (picture, difference) in enumerate(zip(pictures, differences, strict=True)):
        left = i * side
        pixels[:m, left : left + m] = np.clip((picture - low) / span, 0, 1)
        pixels[side:, left : left + m] = 0.5 + 0.5 * difference / largest
    return pixels
