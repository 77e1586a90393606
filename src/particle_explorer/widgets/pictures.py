"""How one particle is shown: as prepared, low-passed, aligned, as the model draws it, and the rest."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from particle_explorer.configs import ClassMapConfig, Config, SpatialVAEConfig
from particle_explorer.latents import latent_columns
from particle_explorer.pose import rotation_matrix
from particle_explorer.preprocess import original_pixels
from particle_explorer.state import AppState, View

if TYPE_CHECKING:
    from particle_explorer.cache import CachedImages
    from particle_explorer.jobs import DecodeClient
    from particle_explorer.session import Session

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
    "residual": "The image minus what the model draws of it, aligned: what the model does not explain",
}


class Decoder:
    """One drawing process for all that show reconstructions of particles; started when first asked.

    Calls block and may come from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._client: DecodeClient | None = None
        self._idle: threading.Timer | None = None

    def decode(
        self,
        run_path: Path,
        z: NDArray[np.floating],
        held: bool = False,
        pose: tuple[NDArray[np.floating], NDArray[np.floating]] | None = None,
    ) -> Images:
        """`(b, d)` → `(b, c, m, m)`: the canonical view, or at angles (°) and shifts `(b, 2)` (cached px)."""
        from particle_explorer import jobs

        with self._lock:
            if self._idle is not None:
                self._idle.cancel()
            if self._client is None or self._client.run_path != run_path:
                self._close()
                self._client = jobs.DecodeClient(run_path)
            images = self._client.decode(z, *(pose or (None, None)), held=held)
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

    def of(self, rows: NDArray[np.intp], m: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Angles `(k,)` and shifts `(k, 2)` (y, x) of some particles, in pixels of images of `m` px."""
        shift = np.stack([self.shift_y_px[rows], self.shift_x_px[rows]], axis=1).astype(float)
        shift *= m / self.box_px[rows].astype(float)[:, None]
        return np.asarray(self.angle_deg[rows], float), shift


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
    placed: Poses | None = None
    """placement that the model itself found, which it draws particles at; None where it draws them as they
    lie"""
    free_of_ctf: Session | None = None
    """whose CTF the model's pictures are free of; None where they are drawn as the images are"""

    @classmethod
    def of(cls, state: AppState, view: View, decoder: Decoder) -> Pictures:
        """What the window shows now, in this view, or in the next best one where it cannot be made."""
        session, features = state.session, state.features
        assert session is not None
        size = session.plan.cached_pixel_size_A
        low_pass_px = max(LOW_PASS_PX, LOW_PASS_A / size if math.isfinite(size) and size > 0 else 0.0)
        run = state.run
        shown = best_view(state, view)
        drawn = run is not None and state.drawable
        free = drawn and run is not None and draws_free_of_ctf(run.config.model)
        return cls(
            session.images,
            shown,
            poses_of(state),
            tuple(features[name].to_numpy() for name in latent_columns(features)) if drawn else (),
            run.path if drawn and run is not None else None,
            state.held,
            decoder,
            low_pass_px,
            _placed(state) if drawn else None,
            session if free else None,
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
        if self.view == "residual":
            images -= self._drawn_as_seen(rows)
        self._align(images, rows)
        if self.view == "low-pass":
            for image in images:
                for channel in image:
                    channel[:] = low_passed(channel, self.low_pass_px)
        return images

    def _align(self, images: Images, rows: NDArray[np.intp]) -> None:
        if self.poses is None:
            return
        angle, shift = self.poses.of(rows, images.shape[-1])
        for image, turn, move in zip(images, angle, shift, strict=True):
            for channel in image:
                channel[:] = to_reference(channel, turn, move)

    def _drawn(self, rows: NDArray[np.intp]) -> Images:
        z, known = self._positions(rows)
        assert self.run_path is not None and self.decoder is not None
        return np.where(known, self.decoder.decode(self.run_path, z, self.held), np.float32(0))

    def _drawn_as_seen(self, rows: NDArray[np.intp]) -> Images:
        """The same at the pose of each particle, through its CTF where the model draws without."""
        z, known = self._positions(rows)
        assert self.run_path is not None and self.decoder is not None
        pose = None
        if self.placed is not None:
            angle, shift = self.placed.of(rows, self.images.shape[-1])
            pose = np.nan_to_num(angle), np.nan_to_num(shift)
        drawn = self.decoder.decode(self.run_path, z, pose=pose)
        ctf = None if self.free_of_ctf is None else self.free_of_ctf.ctf(rows)
        if ctf is not None:
            drawn = through_ctf(drawn, ctf)
        return np.where(known, drawn, np.float32(0))

    def _positions(self, rows: NDArray[np.intp]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Latent positions `(k, d)`, 0 where they are not known, and `(k, 1, 1, 1)` whether they are."""
        z = np.stack([column[rows] for column in self.z], axis=1).astype(np.float32)
        known = np.asarray(np.isfinite(z).all(axis=1), bool)
        return np.where(known[:, None], z, np.float32(0)), known[:, None, None, None]


def views_of(state: AppState) -> list[View]:
    """The views that can be shown now."""
    views: list[View] = ["raw", "low-pass"]
    if has_poses(state):
        views += ["aligned"]
    if state.drawable and state.handle_z.size:
        views += ["reconstruction", "residual"]
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
    return Poses(angle, y, x, _boxes(session))


def _boxes(session: Session) -> NDArray[np.float64]:
    """`(N,)` pixels of the originals across what the cached images show."""
    return original_pixels(session.table, session.plan) * session.plan.cached_box_px


def _placed(state: AppState) -> Poses | None:
    """Where the model of the run that is shown found the particles; None where it knows no pose."""
    features, session, own = state.features, state.session, state.pose_of_run
    if session is None or "angle_deg" not in own:
        return None
    none = np.zeros(len(features))
    angle, y, x = (features[name].to_numpy() if name in own else none for name in POSE)
    return Poses(angle, y, x, _boxes(session))


def draws_free_of_ctf(model: Config) -> bool:
    """Whether a model compares its pictures with images through their CTF, where these have one."""
    return (isinstance(model, ClassMapConfig) and model.use_ctf) or (
        isinstance(model, SpatialVAEConfig) and model.apply_ctf
    )


def through_ctf(pictures: Images, ctf: NDArray[np.float32]) -> Images:
    """`(k, c, m, m)` as a microscope with these CTFs `(k, m, m // 2 + 1)` shows them."""
    m = pictures.shape[-1]
    return np.asarray(np.fft.irfft2(np.fft.rfft2(pictures) * ctf[:, None], s=(m, m)), np.float32)


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
