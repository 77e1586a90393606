"""How one particle is shown: as prepared, low-passed, aligned, as the model draws it, and the rest."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from particle_explorer.latents import latent_columns
from particle_explorer.pose import rotation_matrix
from particle_explorer.state import AppState, View

if TYPE_CHECKING:
    from particle_explorer.cache import CachedImages
    from particle_explorer.jobs import DecodeClient

Images = NDArray[np.float32]

LOW_PASS_A = 20.0
LOW_PASS_PX = 5.0
"""Period at which a low-passed picture keeps half of the amplitude: the longer of these two."""
POSE = ("angle_deg", "shift_y_px", "shift_x_px")
IDLE_S = 60.0
"""So long after its last picture the process that draws is let go."""
SHORT: dict[View, str] = {
    "raw": "as prepared",
    "low-pass": "low-passed",
    "aligned": "aligned",
    "reconstruction": "reconstruction",
    "residual": "residual",
}
TIPS: dict[View, str] = {
    "raw": "The images as they were prepared for the model",
    "low-pass": "Turned and moved back by their poses where these are known, fine noise blurred away",
    "aligned": "Turned and moved back by their poses",
    "reconstruction": "What the model draws at the position of each particle on the map",
    "residual": "The aligned image minus its reconstruction: what the model does not explain",
}


class Decoder:
    """One drawing process for all that show reconstructions of particles; started when first asked.

    Calls block and may come from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client: DecodeClient | None = None
        self._idle: threading.Timer | None = None

    def decode(self, run_path: Path, z: NDArray[np.floating], held: bool) -> Images:
        """`(b, d)` → `(b, c, m, m)`, the canonical view."""
        from particle_explorer import jobs

        with self._lock:
            if self._idle is not None:
                self._idle.cancel()
            if self._client is None or self._client.run_path != run_path:
                self._close()
                self._client = jobs.DecodeClient(run_path)
            images = self._client.decode(z, held=held)
            self._idle = threading.Timer(IDLE_S, self.close)
            self._idle.daemon = True
            self._idle.start()
            return images

    def close(self) -> None:
        """Let the process go; the next call starts another."""
        with self._lock:
            if self._idle is not None:
                self._idle.cancel()
            self._close()

    def _close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


class Poses(NamedTuple):
    """Placement of all `n` particles, see `pose`; columns of the table, not copies."""

    angle_deg: NDArray[np.floating]
    shift_y_px: NDArray[np.floating]
    shift_x_px: NDArray[np.floating]
    box_px: NDArray[np.generic]
    """`(n,)` side of the originals, in whose pixels shifts are counted"""


@dataclass(frozen=True)
class Pictures:
    """Pictures of the particles of a session in one view; reading blocks and may be done in any thread."""

    images: CachedImages
    view: View = "raw"
    poses: Poses | None = None
    z: tuple[NDArray[np.floating], ...] = ()
    """one column `(n,)` per latent dimension, not copies"""
    run_path: Path | None = None
    held: bool = False
    decoder: Decoder | None = None
    low_pass_px: float = LOW_PASS_PX

    @classmethod
    def of(cls, state: AppState, view: View, decoder: Decoder) -> Pictures:
        """What the window shows now, in this view, or in the next best one where it cannot be made."""
        session, features = state.session, state.features
        assert session is not None
        size = session.plan.cached_pixel_size_A
        low_pass_px = max(LOW_PASS_PX, LOW_PASS_A / size if math.isfinite(size) and size > 0 else 0.0)
        run = state.run
        shown = best_view(state, view)
        drawn = run is not None and run.has_weights
        return cls(
            session.images,
            shown,
            poses_of(state),
            tuple(features[name].to_numpy() for name in latent_columns(features)) if drawn else (),
            run.path if drawn and run is not None else None,
            state.held,
            decoder,
            low_pass_px,
        )

    @property
    def needs_model(self) -> bool:
        """Whether reading asks the drawing process, which takes seconds to start."""
        return self.view in ("reconstruction", "residual")

    @property
    def is_aligned(self) -> bool:
        return self.view != "raw" and (self.poses is not None or self.view == "reconstruction")

    def read(self, rows: NDArray[np.intp]) -> Images:
        """`(k,)` rows → `(k, c, m, m)`; an unknown position has no reconstruction and is shown as zeros."""
        rows = np.asarray(rows, np.intp)
        if self.view == "reconstruction":
            return self._drawn(rows)
        images = self.images.read(rows)
        if self.view == "raw":
            return images
        self._align(images, rows)
        if self.view == "low-pass":
            for image in images:
                for channel in image:
                    channel[:] = low_passed(channel, self.low_pass_px)
        elif self.view == "residual":
            images -= self._drawn(rows)
        return images

    def _align(self, images: Images, rows: NDArray[np.intp]) -> None:
        poses = self.poses
        if poses is None:
            return
        angle = np.asarray(poses.angle_deg[rows], float)
        shift = np.stack([poses.shift_y_px[rows], poses.shift_x_px[rows]], axis=1).astype(float)
        shift *= images.shape[-1] / poses.box_px[rows].astype(float)[:, None]
        for image, turn, move in zip(images, angle, shift, strict=True):
            for channel in image:
                channel[:] = to_reference(channel, turn, move)

    def _drawn(self, rows: NDArray[np.intp]) -> Images:
        assert self.run_path is not None and self.decoder is not None
        z = np.stack([column[rows] for column in self.z], axis=1).astype(np.float32)
        known = np.asarray(np.isfinite(z).all(axis=1), bool)
        drawn = self.decoder.decode(self.run_path, np.where(known[:, None], z, 0), self.held)
        return np.where(known[:, None, None, None], drawn, np.float32(0))


def views_of(state: AppState) -> list[View]:
    """The views that can be shown now."""
    views: list[View] = ["raw", "low-pass"]
    if has_poses(state):
        views += ["aligned"]
    if state.run is not None and state.run.has_weights and state.handle_z.size:
        views += ["reconstruction", "residual"] if "aligned" in views else ["reconstruction"]
    return views


def best_view(state: AppState, wanted: View) -> View:
    """The view wanted, or the next best one that can be shown."""
    there = views_of(state)
    return wanted if wanted in there else "aligned" if "aligned" in there else "raw"


def has_poses(state: AppState) -> bool:
    """Whether the particles shown have poses."""
    return state.session is not None and set(POSE) <= set(state.features.columns)


def poses_of(state: AppState) -> Poses | None:
    """Poses of all particles, held still where that was asked for; None where there are none."""
    features, session = state.features, state.session
    if session is None or not has_poses(state):
        return None
    held = "pose-held " if state.held and "pose-held angle_deg" in features else ""
    angle, y, x = (features[f"{held}{name}"].to_numpy() for name in POSE)
    return Poses(angle, y, x, session.table["box_px"].to_numpy())


def low_passed(image: Images, period_px: float) -> Images:
    """`(m, m)` blurred so that a wave of this period keeps half of its amplitude."""
    from scipy.ndimage import gaussian_filter

    sigma = period_px * math.sqrt(math.log(2) / 2) / math.pi
    return np.asarray(gaussian_filter(image, sigma), np.float32)


def to_reference(image: Images, angle_deg: float, shift_yx_px: NDArray[np.floating]) -> Images:
    """`(m, m)` image → the frame of the reference: undoes the placement of `pose`, about pixel m // 2."""
    from scipy.ndimage import affine_transform

    if not (np.isfinite(angle_deg) and np.isfinite(shift_yx_px).all()):
        return image
    # at reference point x the image is wanted at R x + shift; R acts on (x, y), the transform on (y, x)
    matrix = rotation_matrix(angle_deg)[::-1, ::-1]
    centre = np.array(image.shape) // 2
    offset = centre + shift_yx_px - matrix @ centre
    return np.asarray(affine_transform(image, matrix, offset, order=1, mode="constant", cval=0.0), np.float32)


def displayed(images: Images) -> Images:
    """`(k, c, m, m)` → `(k, m, m)`, or `(k, m, m, 3)` in colour."""
    return images[:, 0] if images.shape[1] == 1 else np.moveaxis(images, 1, -1)


def thumbnail(image: Images) -> NDArray[np.uint8]:
    """`(m, m)` or `(m, m, 3)` → 8 bit, stretched for contrast."""
    low, high = np.percentile(image, [1, 99.5])
    return np.asarray(np.clip((image - low) / max(high - low, 1e-12), 0, 1) * 255, np.uint8)
