from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from particle_explorer import pose
from particle_explorer.configs import DataSpec, TargetVAEConfig
from particle_explorer.files import UserError
from particle_explorer.models.base import Batch
from particle_explorer.models.target_vae import TargetVAE
from particle_explorer.transforms import place


def model_of(box_px: int = 24, n_channels: int = 1, **settings: object) -> TargetVAE:
    small = {"channels": 32, "kernel_functions": 60, "features": 128, "hidden": 64}
    data = DataSpec(box_px=box_px, n_channels=n_channels, diameter_px=0.8 * box_px, n_particles=10)
    torch.manual_seed(0)
    return TargetVAE(TargetVAEConfig.model_validate({**small, **settings}), data)


def batch_of(images: Tensor) -> Batch:
    return Batch(images, None, torch.arange(len(images)))


def phantom(n: int) -> Tensor:
    """An image that no turn brings onto itself: a bar, a blob at one end, a dot beside it."""
    y, x = np.mgrid[:n, :n] - n // 2
    r = n / 24
    image = np.exp(-0.5 * (y**2 + x**2) / (3 * r) ** 2)
    image += 1.3 * np.exp(-0.5 * ((y - 2 * r) ** 2 + (x - 6 * r) ** 2) / (1.8 * r) ** 2)
    image += 0.7 * np.exp(-0.5 * ((y + 5 * r) ** 2 + (x - 2 * r) ** 2) / (1.5 * r) ** 2)
    return torch.from_numpy(image.astype(np.float32))[None, None]


@pytest.mark.parametrize("rotations", ["P4", "P8", "P16"])
def test_the_posterior_of_the_pose_is_an_image(rotations: str) -> None:
    model = model_of(rotations=rotations, shift_sd_px=1.0, shift_range_px=4)
    q = model.pose_posterior(batch_of(torch.randn(5, 1, 24, 24)))
    assert q.shape == (5, int(rotations[1:]), 9, 9)
    torch.testing.assert_close(q.sum((1, 2, 3)), torch.ones(5))
    assert (q[:, :, 0, 0] == 0).all() and (q[:, :, 4, 4] > 0).all() and (q[:, :, 0, 4] > 0).all()
    # of a model that knows nothing it is nearly the prior: a Gaussian of 1 px
    shifts = torch.arange(-4.0, 5)
    spread = (q.sum((1, 2)) * shifts**2).sum(1).sqrt()
    assert ((spread > 0.7) & (spread < 1.3)).all()


def test_a_turned_image_has_a_turned_posterior() -> None:
    model = model_of(rotations="P8", shift_sd_px=2.0)
    with torch.no_grad():
        model.encoder.heads.weight[0] *= 40  # decided, as a trained one
    images = place(3 * phantom(24), torch.tensor([0.3]), torch.tensor([[1.0, -2.0]]), mode="fourier")
    quarter = place(images, torch.tensor([math.pi / 2]), mode="fourier")
    q, turned = model.pose_posterior(batch_of(images)), model.pose_posterior(batch_of(quarter))
    # the shifts turn with the image, from +x towards +y; two turns of 45° are added
    expected = q.roll(2, 1).rot90(-1, (2, 3))
    assert (turned - expected).abs().max() < 0.2 * q.max()
    assert turned.flatten(1).argmax() == expected.flatten(1).argmax() != q.flatten(1).argmax()


def test_the_mode_is_reported_and_not_a_mean_of_two() -> None:
    model = model_of(rotations="P8", shift_sd_px=2.0)
    n_shifts, n_turns = model.log_prior.shape
    log_q = torch.full((1, n_shifts, n_turns), -30.0)
    at = {tuple(shift): i for i, shift in enumerate(model.encoder.lifting.shifts.tolist())}
    log_q[0, at[2, 3], 3], log_q[0, at[2, 3], 4] = math.log(0.3), math.log(0.3)
    log_q[0, at[-2, -3], 0] = math.log(0.4)  # the largest cell is a mode of its own
    mean = torch.zeros(1, n_shifts, n_turns, 3)
    mean[0, at[-2, -3], 0] = torch.tensor([0.1, 1.0, -2.0])
    z, z_std, angle, shift, angle_std, shift_std, entropy = model._reported(
        log_q, mean, torch.full_like(mean, math.log(0.05))
    )
    torch.testing.assert_close(z, torch.tensor([[1.0, -2.0]]))
    torch.testing.assert_close(angle, torch.tensor([0.1]))
    torch.testing.assert_close(shift, torch.tensor([[-2.0, -3.0]]))
    torch.testing.assert_close(z_std, torch.full((1, 2), 0.05), atol=1e-4, rtol=0)
    assert abs(float(angle_std) - 0.05) < 1e-3 and float(shift_std) < 1e-3
    assert abs(float(entropy) + 0.6 * math.log(0.3) + 0.4 * math.log(0.4)) < 1e-3


def test_angles_are_averaged_across_the_wrap() -> None:
    model = model_of(rotations="P8")
    weight = torch.zeros(1, *model.log_prior.shape)
    weight[0, 0, 0] = weight[0, 0, 7] = 0.5
    angle, _, _ = model._weighed(weight, torch.zeros(1, *model.log_prior.shape, 3))
    torch.testing.assert_close(angle, torch.tensor([-math.pi / 8]))


@pytest.mark.parametrize("box_px", [40, 41])
def test_decoding_at_a_pose_is_placing_the_canonical_view(box_px: int) -> None:
    model = model_of(box_px)
    with torch.no_grad():
        model.decoder.waves *= 0.3  # waves that bicubic sampling can follow
    z = torch.randn(6, 2)
    angle = torch.tensor([0.0, 0.5, math.pi / 2, -2.0, 3.0, 1.0])
    shift = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, -1.0], [0.5, 3.0], [-2.5, -2.0], [1.0, 0.0]])
    expected = place(model.decode(z), angle, shift, mode="bicubic")
    seen = model.decode(z, angle, shift)
    assert (seen - expected).abs().mean() < 0.02 * model.decode(z).abs().amax()
    assert (seen - expected).square().mean() < 2e-3 * seen.var()


def test_a_subset_of_pixels_estimates_the_whole_error_without_bias() -> None:
    whole, part = model_of(pixel_fraction=1.0), model_of(pixel_fraction=0.1)
    images = torch.randn(20, 1, 24, 24) + 2 * phantom(24)
    pose_of = torch.rand(20), torch.randn(20, 2), torch.randn(20, 2)
    with torch.no_grad():
        expected = whole._reconstruction(images, *pose_of)
        estimates = torch.stack([part._reconstruction(images, *pose_of) for _ in range(300)])
    error = estimates.std() / math.sqrt(len(estimates))
    assert estimates.std() > 0
    assert abs(estimates.mean() - expected) < 4 * error


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no half-precision products here")
def test_half_precision_keeps_the_objective_and_the_pose() -> None:
    model = model_of(40, pixel_fraction=1.0)
    images = torch.randn(8, 1, 40, 40) + phantom(40)
    torch.manual_seed(1)
    exact = model(batch_of(images))
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch_of(images))
        q = model.pose_posterior(batch_of(images))
    for name, loss in exact.items():
        torch.testing.assert_close(half[name].float(), loss, rtol=0.01, atol=0.02)
    assert (q - model.pose_posterior(batch_of(images))).abs().sum((1, 2, 3)).max() < 0.05


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kernel_px": 25}, "--model.kernel-px 25: the images have 24 px"),
        ({"shift_range_px": 13}, "--model.shift-range-px 13: in images of 24 px shifts go up to 12 px"),
    ],
)
def test_what_does_not_fit_into_the_box_is_refused(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        model_of(24, **settings)


def trained_on_turned_phantoms(box_px: int, n_steps: int = 300) -> TargetVAE:
    model = model_of(box_px, latent_dim=1, shift_sd_px=1.0, pixel_fraction=0.3)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(n_steps):
        for group in optimiser.param_groups:
            group["lr"] = 1.5e-3 * (1 + math.cos(math.pi * step / n_steps))
        images = place(3 * phantom(box_px), 2 * math.pi * torch.rand(32), torch.randn(32, 2), mode="bicubic")
        loss = sum(model(batch_of(images + 0.3 * torch.randn_like(images))).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("box_px", [24, 25])
def test_turning_and_moving_the_input_turns_and_moves_the_pose(box_px: int) -> None:
    model = trained_on_turned_phantoms(box_px)
    angle, shift = 2 * math.pi * torch.rand(200), torch.randn(200, 2)
    images = place(3 * phantom(box_px), angle, shift, mode="bicubic")
    encoding = model.encode(batch_of(images))
    assert encoding.angle is not None and encoding.shift is not None
    difference = torch.exp(1j * (encoding.angle - angle))
    constant = difference.mean()
    assert constant.abs() > 0.9  # the mirrored sense of rotation would leave nothing
    assert torch.rad2deg((difference / constant).angle().abs()).median() < 10
    # the model's own centre, a point of the molecule, is found where the turned and moved molecule has it
    xy = pose.rotation_matrix(np.rad2deg(angle.numpy())).reshape(-1, 2)
    found = (encoding.shift - shift).flip(-1).reshape(-1).numpy()
    centre = np.linalg.lstsq(xy, found, rcond=None)[0]
    assert np.sqrt(np.mean((found - xy @ centre) ** 2)) < 0.5
    # as RELION takes the exported pose: x_ref = R(psi) (x_particle + origin)
    psi, *origin = pose.to_relion(np.rad2deg(encoding.angle.numpy()), encoding.shift.numpy(), 2.0)
    grid = np.indices((box_px, box_px))[::-1].reshape(2, -1) - box_px // 2
    average, mirrored = np.zeros(box_px**2), np.zeros(box_px**2)
    for image, turn, x, y in zip(images[:, 0].numpy(), psi, *origin, strict=True):
        for total, sign in ((average, 1), (mirrored, -1)):
            at = pose.rotation_matrix(-sign * turn) @ grid - sign * np.array([[x / 2.0], [y / 2.0]])
            total += map_coordinates(image, at[::-1] + box_px // 2, order=1) / len(images)
    assert average.var() > 0.75 * images.var() > 1.5 * mirrored.var()
    views = model.decode(encoding.z, encoding.angle, encoding.shift).flatten(1)
    match = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(views, images.flatten(1), strict=True)]
    assert torch.stack(match).median() > 0.9
