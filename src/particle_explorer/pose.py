"""The pose convention, in one place.

Ours says where the reference *appears in the image* (placement), about pixel `n // 2`, with x = column,
y = row, y down:

    x_img = R(angle) · x_ref + shift,      R(a) = [[cos a, -sin a], [sin a, cos a]] on (x, y)

Turning an image by +10° adds 10° to its angle. Shifts are stored as (y, x). RELION and cryoSPARC say how
to bring the image *back* (alignment): x_ref = R(psi) · (x_img + origin). Hence angle = -psi and
shift = -origin (RELION `stack_create.cpp`, `transformations.cpp`; cryoSPARC through pyem's `cryosparc2`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]


def rotation_matrix(angle_deg: ArrayLike) -> Float:
    """R(angle) acting on (x, y) columns: `(...,)` degrees → `(..., 2, 2)`."""
    angle = np.deg2rad(np.asarray(angle_deg, dtype=np.float64))
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def wrap_deg(angle_deg: ArrayLike) -> Float:
    """Degrees brought into [-180, 180)."""
    return (np.asarray(angle_deg, dtype=np.float64) + 180.0) % 360.0 - 180.0


def to_relion(
    angle_deg: ArrayLike, shift_yx_px: ArrayLike, pixel_size_A: ArrayLike
) -> tuple[Float, Float, Float]:
    """Our pose → `rlnAnglePsi` (°), `rlnOriginXAngst` (Å), `rlnOriginYAngst` (Å).

    `shift_yx_px` `(..., 2)` in pixels of the original image. For RELION 3.0 (origins in pixels) give
    `pixel_size_A=1`.
    """
    shift = np.asarray(shift_yx_px, dtype=np.float64)
    size = np.asarray(pixel_size_A, dtype=np.float64)
    # + 0.0 turns -0.0 into 0.0, which would be printed with its sign
    return -wrap_deg(angle_deg) + 0.0, -shift[..., 1] * size + 0.0, -shift[..., 0] * size + 0.0


def from_relion(
    psi_deg: ArrayLike, origin_x_A: ArrayLike, origin_y_A: ArrayLike, pixel_size_A: ArrayLike
) -> tuple[Float, Float]:
    """RELION's psi and origins (Å; or pixels with `pixel_size_A=1`) → our angle (°) and shift (y, x) (px)."""
    size = np.asarray(pixel_size_A, dtype=np.float64)
    shift = np.stack(
        [-np.asarray(origin_y_A, dtype=np.float64) / size, -np.asarray(origin_x_A, dtype=np.float64) / size],
        -1,
    )
    return wrap_deg(-np.asarray(psi_deg, dtype=np.float64)), shift


def from_cryosparc(
    pose_rad: ArrayLike, shift_xy_px: ArrayLike, alignment_pixel_size_A: ArrayLike, pixel_size_A: ArrayLike
) -> tuple[Float, Float]:
    """`alignments2D/pose` (rad), `alignments2D/shift` (x, y; pixels of `alignments2D/psize_A`) → ours."""
    shift = (
        np.asarray(shift_xy_px, dtype=np.float64)
        * np.asarray(alignment_pixel_size_A, dtype=np.float64)[..., None]
    )
    return from_relion(np.rad2deg(np.asarray(pose_rad)), shift[..., 0], shift[..., 1], pixel_size_A)


def to_cryosparc(
    angle_deg: ArrayLike, shift_yx_px: ArrayLike, alignment_pixel_size_A: ArrayLike, pixel_size_A: ArrayLike
) -> tuple[Float, Float]:
    """Our pose → `alignments2D/pose` (rad) and `alignments2D/shift` (x, y; pixels of
    `alignments2D/psize_A`)."""
    psi_deg, x_A, y_A = to_relion(angle_deg, shift_yx_px, pixel_size_A)
    unit = np.asarray(alignment_pixel_size_A, dtype=np.float64)
    return np.deg2rad(psi_deg), np.stack([x_A / unit, y_A / unit], -1)


def from_spatial_vae(theta_rad: ArrayLike, shift_xy_units: ArrayLike, box_px: int) -> tuple[Float, Float]:
    """spatial-VAE's (theta, dx) → our angle (°) and shift (y, x) (px of a `box_px` image).

    There x' = x R(theta) + dx with row vectors, y *up*, half the image (between corner pixel centres)
    as unit, and dx in the reference frame; content turns clockwise by theta on screen, which is our
    positive sense (y down). The rotation centre is (n - 1) / 2; ours is n // 2, so an even box leaves
    a half-pixel term.
    """
    theta = np.asarray(theta_rad, dtype=np.float64)
    dx = np.asarray(shift_xy_units, dtype=np.float64) * (box_px - 1) / 2.0
    angle_deg = np.rad2deg(theta)
    # a canonical point p (y down, about (n-1)/2) appears at R(theta) (p - d), d = dx with y flipped
    d = np.stack([dx[..., 0], -dx[..., 1]], -1)
    matrix = rotation_matrix(angle_deg)
    shift_xy = -np.einsum("...ij,...j->...i", matrix, d)
    # about n // 2 instead of (n - 1) / 2: the centre pixel itself is moved by the turn
    offset = np.full(2, box_px // 2 - (box_px - 1) / 2.0)
    shift_xy = shift_xy + np.einsum("...ij,j->...i", matrix, offset) - offset
    return wrap_deg(angle_deg), shift_xy[..., ::-1].copy()


def recentre(
    angle_deg: ArrayLike, shift_yx_px: ArrayLike, turn_deg: ArrayLike, move_yx_px: ArrayLike
) -> tuple[Float, Float]:
    """The pose of the same image when its reference is replaced by a turned and moved one.

    The new reference shows the old one at x_new = R(turn) · x_old + move. Then
    x_img = R(angle - turn) · x_new + shift - R(angle - turn) · move. All angles in degrees, moves and
    shifts (..., 2) as (y, x) pixels.
    """
    new_angle = np.asarray(angle_deg, dtype=np.float64) - np.asarray(turn_deg, dtype=np.float64)
    move_xy = np.asarray(move_yx_px, dtype=np.float64)[..., ::-1]
    turned = np.einsum(
        "...ij,...j->...i", rotation_matrix(new_angle), np.broadcast_to(move_xy, (*new_angle.shape, 2))
    )
    shift = np.asarray(shift_yx_px, dtype=np.float64) - turned[..., ::-1]
    return wrap_deg(new_angle), shift
