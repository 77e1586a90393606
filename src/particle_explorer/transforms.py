"""Turning and shifting images on tensors, by the convention of `pose`.

    x_img = R(angle) · x_ref + shift,      R(a) = [[cos a, -sin a], [sin a, cos a]] on (x, y), y down,

about pixel `n // 2` of each axis, odd and even boxes alike. `place` draws a reference as it appears in the
image; `unplace` brings an image back to its reference.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Interpolation = Literal["bilinear", "bicubic", "fourier"]
_FOLDS = (2, 4)
"""Waves around each shell that powers are described by."""


def rotation_matrix(angle: Tensor) -> Tensor:
    """R(angle) on (x, y): `(...,)` rad → `(..., 2, 2)`."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)


def place(
    images: Tensor, angle: Tensor | None = None, shift: Tensor | None = None, mode: Interpolation = "bilinear"
) -> Tensor:
    """References → images: turned by `angle` about pixel n // 2, then moved by `shift`.

    Parameters
    ----------
    images
        `(b, c, n, n)` or `(b, n, n)`; `b` may be 1 against several poses.
    angle, shift
        `(b,)` rad and `(b, 2)` px (y, x); None is 0.
    mode
        `fourier` refines the pixel grid fourfold (zero-padded spectrum) before a bicubic look-up.

    Returns
    -------
    Images of the same shape (`b` as that of the poses); 0 comes in from outside.
    """
    turn, move = _pose(images, angle, shift)
    # the output pixel x_img shows the reference at R(-angle) (x_img - shift)
    inverse = rotation_matrix(-turn)
    return _sample(images, inverse, -torch.einsum("bij,bj->bi", inverse, move.flip(-1)), mode)


def unplace(
    images: Tensor, angle: Tensor | None = None, shift: Tensor | None = None, mode: Interpolation = "bilinear"
) -> Tensor:
    """Images → references: undo `place` of the same `angle` and `shift`; arguments as there."""
    turn, move = _pose(images, angle, shift)
    return _sample(images, rotation_matrix(turn), move.flip(-1), mode)


def fourier_shift(images: Tensor, shift: Tensor) -> Tensor:
    """`(b, ..., n, n)` images moved by `(b, 2)` px (y, x) through their spectrum, around the edges."""
    n_y, n_x = images.shape[-2:]
    f_y = torch.fft.fftfreq(n_y, device=images.device)[:, None]
    f_x = torch.fft.rfftfreq(n_x, device=images.device)
    phase = shift[:, 0, None, None] * f_y + shift[:, 1, None, None] * f_x
    factor = torch.polar(torch.ones_like(phase), -2 * torch.pi * phase)
    factor = factor.reshape(len(shift), *[1] * (images.ndim - 3), *factor.shape[-2:])
    return torch.fft.irfft2(torch.fft.rfft2(images) * factor, s=(n_y, n_x))


def upsample(images: Tensor, factor: int) -> Tensor:
    """`(..., n, n)` → `(..., factor·n, factor·n)` by padding the spectrum; pixel i becomes pixel factor·i."""
    n = images.shape[-1]
    if images.shape[-2] != n:
        raise ValueError(f"square images are needed, not {tuple(images.shape[-2:])}")
    spectrum = torch.fft.rfft2(images)
    padded = torch.zeros(
        *images.shape[:-2], factor * n, factor * n // 2 + 1, dtype=spectrum.dtype, device=images.device
    )
    low, high = (n + 1) // 2, n // 2
    columns = n // 2 + 1
    if n % 2 == 0:  # half of the Nyquist row and column belongs to either sign
        row = spectrum[..., high, :] / 2
        padded[..., high, :columns] = row
        padded[..., factor * n - high, :columns] = row
        if high > 1:
            padded[..., factor * n - high + 1 :, :columns] = spectrum[..., high + 1 :, :]
        padded[..., :low, :columns] = spectrum[..., :low, :]
        padded[..., columns - 1] = padded[..., columns - 1] / 2
    else:
        padded[..., :low, :columns] = spectrum[..., :low, :]
        padded[..., factor * n - high :, :columns] = spectrum[..., low:, :]
    return torch.fft.irfft2(padded, s=(factor * n, factor * n)) * factor**2


def fourier_resize(images: Tensor, m: int) -> Tensor:
    """`(..., n, n)` → `(..., m, m)` by cropping or padding the spectrum about pixel n // 2."""
    n = images.shape[-1]
    if m == n:
        return images
    axes = (-2, -1)
    spectrum = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(images, dim=axes)), dim=axes)
    low = n // 2 - m // 2
    if m < n:
        spectrum = spectrum[..., low : low + m, low : low + m]
    else:
        high = m - n + low
        spectrum = F.pad(torch.view_as_real(spectrum), (0, 0, -low, high, -low, high))
        spectrum = torch.view_as_complex(spectrum.contiguous())
    back = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=axes)).real * (m / n) ** 2
    return torch.fft.fftshift(back, dim=axes)


def radius(n: int, device: torch.device | None = None) -> Tensor:
    """`(n, n)` distance of each pixel from pixel n // 2, in px."""
    at = torch.arange(n, dtype=torch.float32, device=device) - n // 2
    return torch.hypot(at[:, None], at[None, :])


def soft_disc(n: int, radius_px: float, edge_px: float = 2.0, device: torch.device | None = None) -> Tensor:
    """`(n, n)` 1 within `radius_px` of pixel n // 2, a raised cosine to 0 at `radius_px + edge_px`."""
    beyond = ((radius(n, device) - radius_px) / max(edge_px, 1e-3)).clamp(0, 1)
    return 0.5 + 0.5 * torch.cos(torch.pi * beyond)


def fourier_radius(n: int, device: torch.device | None = None) -> Tensor:
    """`(n, n // 2 + 1)` distance from the origin of the rfft2 layout, in shells (n shells per 1/px)."""
    f_y = torch.fft.fftfreq(n, device=device)[:, None] * n
    f_x = torch.fft.rfftfreq(n, device=device) * n
    return torch.hypot(f_y, f_x.expand(n, -1))


def turning_matrix(n: int, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Turning as one sparse product: `(r·n², n²)` CSR, rows in the order (angle, y, x), and its transpose.

    Cubic convolution (Keys' kernel with -0.75, that of torch's `grid_sample`); times `(n², k)` images it
    gives what `place` gives, and the transpose gives the exact gradient at a fraction of the cost.
    """
    at = torch.arange(n, device=angles.device, dtype=torch.float64) - n // 2
    y, x = at[:, None].expand(n, n), at.expand(n, n)
    cos, sin = angles.double().cos()[:, None, None], angles.double().sin()[:, None, None]
    from_x, from_y = cos * x + sin * y + n // 2, cos * y - sin * x + n // 2
    low_x, low_y = from_x.floor(), from_y.floor()
    columns, values = [], []
    for i in range(-1, 3):
        weight_y = _cubic(from_y - low_y - i)
        for j in range(-1, 3):
            at_y, at_x = low_y + i, low_x + j
            inside = (at_y >= 0) & (at_y < n) & (at_x >= 0) & (at_x < n)
            values.append(torch.where(inside, weight_y * _cubic(from_x - low_x - j), 0.0))
            columns.append((at_y.clamp(0, n - 1) * n + at_x.clamp(0, n - 1)).long())
    value = torch.stack(values, -1).flatten().float()
    column = torch.stack(columns, -1).flatten()
    row = torch.arange(len(angles) * n * n, device=angles.device).repeat_interleave(16)
    keep = value != 0
    size = (len(angles) * n * n, n * n)
    index = torch.stack([row, column])[:, keep]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        matrix = torch.sparse_coo_tensor(index, value[keep], size, check_invariants=False).coalesce()
        return matrix.to_sparse_csr(), matrix.t().coalesce().to_sparse_csr()


def _cubic(t: Tensor) -> Tensor:
    a, t = -0.75, t.abs()
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return torch.where(t <= 1, near, torch.where(t < 2, far, 0.0))


class FourierBand(nn.Module):
    """Images as real vectors of their lowest Fourier coefficients, lengths and products kept.

    `band(a) @ band(b).T` is the inner product of images within `n_shells` of the origin; a shift is one
    complex multiplication. Images `(b, c, n, n)` ↔ complex `(b, c, q)`.
    """

    def __init__(self, n: int, n_shells: float) -> None:
        super().__init__()
        shell = fourier_radius(n)
        inside = shell <= n_shells
        f_y = torch.fft.fftfreq(n)[:, None].expand_as(shell)[inside]
        f_x = torch.fft.rfftfreq(n).expand_as(shell)[inside]
        # a column of the half spectrum stands for its mirror image too, except the first and Nyquist's
        twice = torch.where((f_x > 0) & (f_x < 0.5), 2.0, 1.0)
        self.n = n
        self.register_buffer("index", inside.flatten().nonzero()[:, 0], persistent=False)
        self.register_buffer("scale", twice.sqrt() / n, persistent=False)
        self.register_buffer("frequency", torch.stack([f_y, f_x], -1), persistent=False)
        self.register_buffer("shell", shell[inside], persistent=False)
        self._power: tuple[Tensor, Tensor] | None = None
        self.index: Tensor
        self.scale: Tensor
        self.frequency: Tensor
        self.shell: Tensor

    def forward(self, images: Tensor) -> Tensor:
        return torch.fft.rfft2(images).flatten(-2).index_select(-1, self.index) * self.scale

    @property
    def power_basis(self) -> Tensor:
        """`(j, q)` functions of frequency: every shell, its slope, its two- and fourfold waves."""
        return self._powers()[0]

    @property
    def power_fit(self) -> Tensor:
        """`(q, j)`: a function `(b, q)` times this is its coefficients in `power_basis` (least squares)."""
        return self._powers()[1]

    def _powers(self) -> tuple[Tensor, Tensor]:
        if self._power is None or self._power[0].device != self.index.device:
            # on the CPU: Apple's GPUs have no 64-bit floats, no GPU is fast at so small problems, and
            # the numbers are the same wherever the model is computed
            radius = self.shell.cpu().double()
            shell = radius.round().long()
            y, x = self.frequency.cpu().double().unbind(-1)
            turn = torch.atan2(y, x)
            fit = torch.zeros(0, len(shell), dtype=torch.float64)
            basis = fit
            for s in range(int(shell.max()) + 1):
                here = (shell == s).nonzero()[:, 0]
                waves = [torch.ones_like(turn), radius - s]
                waves += [wave(fold * turn) for fold in _FOLDS for wave in (torch.cos, torch.sin)]
                rows = torch.zeros(len(waves), len(shell), dtype=torch.float64)
                rows[:, here] = torch.stack(waves)[:, here]
                back = torch.zeros_like(rows)
                back[:, here] = torch.linalg.pinv(rows[:, here], rtol=1e-3).T
                basis, fit = torch.cat([basis, rows]), torch.cat([fit, back])
            device = self.index.device
            self._power = basis.float().to(device), fit.T.float().contiguous().to(device)
        return self._power

    def images(self, coefficients: Tensor) -> Tensor:
        """Back: `(..., q)` → `(..., n, n)`, nothing outside the band."""
        n = self.n
        spectrum = coefficients.new_zeros(*coefficients.shape[:-1], n * (n // 2 + 1))
        spectrum[..., self.index] = coefficients / self.scale
        return torch.fft.irfft2(spectrum.unflatten(-1, (n, n // 2 + 1)), s=(n, n))

    def phases(self, shifts: Tensor) -> Tensor:
        """`(..., 2)` px (y, x) → `(..., q)` factors that move an image by them."""
        turn = -2 * torch.pi * (shifts.to(self.frequency.dtype) @ self.frequency.T)
        return torch.polar(torch.ones_like(turn), turn)


def turned_powers(coefficients: Tensor, angle: Tensor) -> Tensor:
    """`(b, j)` coefficients in `FourierBand.power_basis` of functions that are turned by `(b,)` rad."""
    found = coefficients.unflatten(1, (-1, 2 + 2 * len(_FOLDS))).clone()
    for fold, i in zip(_FOLDS, (2, 4), strict=True):
        cos, sin = (fold * angle).cos()[:, None], (fold * angle).sin()[:, None]
        of_cos, of_sin = found[..., i].clone(), found[..., i + 1].clone()
        found[..., i], found[..., i + 1] = of_cos * cos - of_sin * sin, of_cos * sin + of_sin * cos
    return found.flatten(1)


def real_rows(coefficients: Tensor) -> Tensor:
    """Complex `(..., c, q)` → real `(..., 2·c·q)`, whose products are the images' inner products."""
    return torch.view_as_real(coefficients).flatten(-3)


def pose_gradients(images: Tensor) -> Tensor:
    """How `(b, c, n, n)` change as they are turned (per rad) and moved (per px y, x): `(b, 3, c, n, n)`."""
    n_y, n_x = images.shape[-2:]
    padded = F.pad(images, (1, 1, 1, 1))
    d_y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    d_x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    y = torch.arange(n_y, device=images.device, dtype=images.dtype)[:, None] - n_y // 2
    x = torch.arange(n_x, device=images.device, dtype=images.dtype) - n_x // 2
    # image(R(-a) x - shift) to first order
    return torch.stack([y * d_x - x * d_y, -d_y, -d_x], dim=1)


def register(
    images: Tensor,
    references: Tensor,
    weight: Tensor,
    *,
    angles: Tensor,
    max_shift_px: int,
    n_refine: int = 4,
) -> tuple[Tensor, Tensor]:
    """The turn and move that bring images onto references, found to a small fraction of a pixel.

    Parameters
    ----------
    images, references
        `(b, c, n, n)`, and the same or `(1, c, n, n)`.
    weight
        `(n, n)` what counts of the reference (a mask).
    angles
        `(r,)` turns to try (rad); the best is refined by Gauss-Newton steps.
    max_shift_px
        Whole-pixel moves of up to this many pixels per axis are tried.

    Returns
    -------
    `turn` `(b,)` rad and `move` `(b, 2)` px (y, x) such that `place(images, turn, move)` agrees with the
    references where `weight` is not 0, in the sense of least squares.
    """
    b, n = len(images), images.shape[-1]
    references = references.expand(b, -1, -1, -1)
    span = torch.arange(-max_shift_px, max_shift_px + 1, device=images.device)
    weighted = torch.fft.rfft2(references * weight)
    weight_spectrum = torch.fft.rfft2(weight.expand(1, 1, n, n))
    best = torch.full((b,), torch.inf, device=images.device)
    turn = torch.zeros(b, device=images.device)
    move = torch.zeros(b, 2, device=images.device)
    for angle in angles:
        turned = place(images, angle.expand(1), mode="bicubic")
        # Σ_x w(x) (ref(x) - turned(x - t))² for every t, without its constant term
        cross = torch.fft.irfft2(weighted * torch.fft.rfft2(turned).conj(), s=(n, n)).sum(1)
        energy = torch.fft.irfft2(weight_spectrum * torch.fft.rfft2(turned**2).conj(), s=(n, n)).sum(1)
        cost = (energy - 2 * cross)[:, span][:, :, span].reshape(b, -1)
        value, at = cost.min(dim=1)
        better = value < best
        best = torch.where(better, value, best)
        turn = torch.where(better, angle, turn)
        here = torch.stack([span[at // len(span)], span[at % len(span)]], -1).to(move.dtype)
        move = torch.where(better[:, None], here, move)
    for _ in range(n_refine):
        placed = place(images, turn, move, mode="bicubic")
        jacobian = pose_gradients(placed)
        normal = torch.einsum("bichw,bjchw,hw->bij", jacobian, jacobian, weight)
        normal = normal + 1e-6 * normal.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-12)[
            :, None, None
        ] * torch.eye(3, device=images.device)
        slope = torch.einsum("bichw,bchw,hw->bi", jacobian, references - placed, weight)
        step = torch.linalg.solve(normal, slope)
        d_turn = step[:, 0].clamp(-0.1, 0.1)
        d_move = step[:, 1:].clamp(-1, 1)
        # the step turns and moves what is already placed
        turn = turn + d_turn
        turned_move = torch.einsum("bij,bj->bi", rotation_matrix(d_turn), move.flip(-1)).flip(-1)
        move = (turned_move + d_move).clamp(-max_shift_px - 1, max_shift_px + 1)
    return turn, move


def _pose(images: Tensor, angle: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    if images.ndim not in (3, 4):
        raise ValueError(f"images are (b, c, n, n) or (b, n, n), not {tuple(images.shape)}")
    b = max(len(images), 0 if angle is None else len(angle), 0 if shift is None else len(shift))
    angle = (
        torch.zeros(b, device=images.device, dtype=images.dtype) if angle is None else angle.to(images.dtype)
    )
    if shift is None:
        shift = torch.zeros(b, 2, device=images.device, dtype=images.dtype)
    return angle.expand(b), shift.to(images.dtype).expand(b, 2)


def _sample(images: Tensor, matrix: Tensor, offset_xy: Tensor, mode: Interpolation) -> Tensor:
    """Images whose pixel x (about n // 2) shows the input at matrix · x + offset (x, y)."""
    planes = images if images.ndim == 4 else images[:, None]
    n_y, n_x = planes.shape[-2:]
    b = len(matrix)
    factor = 1
    if mode == "fourier":
        factor, planes, mode = 4, upsample(planes, 4), "bicubic"
    y = torch.arange(n_y, device=images.device, dtype=images.dtype) - n_y // 2
    x = torch.arange(n_x, device=images.device, dtype=images.dtype) - n_x // 2
    at_x = (
        matrix[:, 0, 0, None, None] * x
        + matrix[:, 0, 1, None, None] * y[:, None]
        + offset_xy[:, 0, None, None]
    )
    at_y = (
        matrix[:, 1, 0, None, None] * x
        + matrix[:, 1, 1, None, None] * y[:, None]
        + offset_xy[:, 1, None, None]
    )
    planes = planes.expand(b, -1, -1, -1)
    if mode == "bicubic" and images.device.type == "mps":  # grid_sample knows none there
        out = _sample_cubic(planes, factor * (at_y + n_y // 2), factor * (at_x + n_x // 2))
        return out if images.ndim == 4 else out[:, 0]
    # grid_sample with align_corners=False: pixel i lies at (2 i + 1) / size - 1
    size_y, size_x = planes.shape[-2:]
    grid_x = (2 * factor * (at_x + n_x // 2) + 1) / size_x - 1
    grid_y = (2 * factor * (at_y + n_y // 2) + 1) / size_y - 1
    out = F.grid_sample(
        planes, torch.stack([grid_x, grid_y], -1), mode=mode, padding_mode="zeros", align_corners=False
    )
    return out if images.ndim == 4 else out[:, 0]


def _sample_cubic(planes: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """`(b, c, h, w)` images at pixels `(b, m, m)` counted from 0; what `grid_sample` gives, zeros beyond."""
    b, c, height, width = planes.shape
    flat = planes.flatten(2)
    out = flat.new_zeros(b, c, y[0].numel())
    for i in range(-1, 3):
        at_y = y.floor() + i
        weight_y = _cubic(y - at_y)
        for j in range(-1, 3):
            at_x = x.floor() + j
            inside = (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
            weight = torch.where(inside, weight_y * _cubic(x - at_x), 0.0)
            pixel = at_y.clamp(0, height - 1).long() * width + at_x.clamp(0, width - 1).long()
            out = (
                out + flat.gather(2, pixel.flatten(1)[:, None].expand(-1, c, -1)) * weight.flatten(1)[:, None]
            )
    return out.unflatten(2, y.shape[1:])
