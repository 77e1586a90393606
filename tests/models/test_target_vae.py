from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from particle_explorer.configs import DataSpec, TargetVAEConfig
from particle_explorer.files import UserError
from particle_explorer.models.base import Batch
from particle_explorer.models.target_vae import TargetVAE, angle_prior
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


@pytest.mark.parametrize("n_turns", [4, 8, 16])
@pytest.mark.parametrize("sd_deg", [5.0, 45.0, 120.0])
def test_turns_and_offsets_have_the_prior_of_the_angle(n_turns: int, sd_deg: float) -> None:
    log_p, mean, sd = angle_prior(n_turns, math.radians(sd_deg))
    angle = torch.linspace(-math.pi, math.pi, 721)[:-1]
    around = 2 * math.pi * torch.arange(-4, 5)

    def wrapped(mean: Tensor, sd: Tensor) -> Tensor:
        normal = torch.distributions.Normal(mean, sd)
        return normal.log_prob(angle[:, None, None] + around[:, None]).exp().sum(1)

    turns = 2 * math.pi * torch.arange(n_turns) / n_turns
    density = (log_p.exp() * wrapped(turns + mean, sd)).sum(1)
    expected = wrapped(torch.zeros(1), torch.tensor([math.radians(sd_deg)]))[:, 0]
    assert abs(float(density.mean()) * 2 * math.pi - 1) < 1e-3
    assert (density - expected).abs().max() < 0.03 * expected.max()


def test_without_a_spread_of_angles_all_are_alike() -> None:
    log_p, mean, sd = angle_prior(8, 0.0)
    assert (log_p == log_p[0]).all() and not mean.any() and torch.equal(sd, torch.full((8,), math.pi / 8))
    even, near = model_of(), model_of(angle_sd_deg=20)
    images = torch.randn(5, 1, 24, 24)
    by_turn = [model.pose_posterior(batch_of(images)).sum((2, 3)) for model in (even, near)]
    assert by_turn[0].max() < 0.25 < 0.5 < by_turn[1][:, 0].min()
    torch.testing.assert_close(near.log_prior.logsumexp(0), angle_prior(8, math.radians(20))[0])


def test_the_divergence_of_the_angle_is_that_from_its_prior() -> None:
    model = model_of(angle_sd_deg=45)
    images = torch.randn(3, 1, 24, 24)
    log_q, mean, log_sd = model.infer(images)
    normal = torch.distributions.Normal
    prior = normal(model.offset_mean, model.offset_sd)
    each = torch.distributions.kl_divergence(normal(mean[..., 0], log_sd[..., 0].exp()), prior)
    losses = model(batch_of(images))
    torch.testing.assert_close(losses["kl_angle"], (log_q.exp() * each).sum((1, 2)).mean())
    assert model.offset_mean[1] < 0 < model.offset_mean[7]


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
