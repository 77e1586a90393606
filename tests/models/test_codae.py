from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from particle_explorer.configs import CODAEConfig, DataSpec
from particle_explorer.models.base import Batch
from particle_explorer.models.build import build_model
from particle_explorer.models.codae import CODAE, EulerEncoding
from particle_explorer.transforms import place


def model_of(box_px: int = 24, n_channels: int = 1, **settings: object) -> CODAE:
    data = DataSpec(box_px=box_px, n_channels=n_channels, diameter_px=0.8 * box_px, n_particles=10)
    model = build_model(CODAEConfig.model_validate(settings), data)
    assert isinstance(model, CODAE)
    return model


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


@pytest.mark.parametrize("box_px", [16, 40, 41, 64, 129])
@pytest.mark.parametrize("group_order", [4, 8, 16])
def test_a_quarter_turn_of_the_input_is_one_of_the_pose_before_any_training(
    box_px: int, group_order: int
) -> None:
    model = model_of(box_px, group_order=group_order).eval()
    # content that a quarter turn does not push out of an even box
    images = torch.randn(3, 1, box_px, box_px)
    images[..., 0, :] = images[..., 0] = 0
    plain = model.encode(batch_of(images))
    turned = model.encode(batch_of(place(images, torch.full((3,), math.pi / 2))))
    assert plain.angle is not None and turned.angle is not None
    torch.testing.assert_close(
        torch.exp(1j * turned.angle), 1j * torch.exp(1j * plain.angle), atol=1e-3, rtol=0
    )
    y, x = plain.shift.unbind(1)
    torch.testing.assert_close(turned.shift, torch.stack([x, -y], 1), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(turned.z, plain.z, atol=1e-4, rtol=1e-3)


def test_the_pose_is_applied_to_the_output_alone() -> None:
    model = model_of().eval()
    z, angle, shift = torch.randn(4, 2), torch.randn(4), torch.randn(4, 2)
    aligned = model.decode(z)
    torch.testing.assert_close(model.decode(z, angle, shift), place(aligned, angle, shift))


def test_noise_is_as_wide_as_the_distance_to_the_nearest_neighbour() -> None:
    euler, values = EulerEncoding(3, 1.0), torch.randn(50, 3)
    values[7, 1] = values[9, 1]  # ties do not count
    away = (values[:, None] - values[None]).abs()
    nearest = torch.where(away > 0, away, torch.inf).amin(1)
    drawn = torch.stack([euler.noise(values) for _ in range(2000)])
    torch.testing.assert_close(drawn.std(0) / nearest, torch.ones(50, 3), atol=0.12, rtol=0)
    assert (euler.noise(values[:1]) == 0).all() and (euler.noise(torch.ones(4, 3)) == 0).all()


def test_stretched_content_spans_what_was_learned_and_keeps_it_outside_training() -> None:
    euler, raw = EulerEncoding(2, 0.5), torch.randn(64, 2)
    turns = euler.stretch(raw)
    torch.testing.assert_close(turns.amax(0) - turns.amin(0), torch.tensor([0.01, 0.005]), rtol=1e-4, atol=0)
    torch.testing.assert_close(euler.eval().stretch(raw), turns)
    torch.testing.assert_close(euler.stretch(raw[:1]), turns[:1])
    assert euler(turns).shape == (64, 4)
    torch.testing.assert_close(euler(turns).unflatten(1, (2, 2)).norm(dim=2), torch.ones(64, 2))


@pytest.mark.parametrize("box_px", [40, 41])
def test_moments_are_those_of_a_known_ellipse_also_in_noise(box_px: int) -> None:
    y, x = np.mgrid[:box_px, :box_px] - box_px // 2
    angle, at = 0.4, (3.0, -2.0)
    u = np.cos(angle) * (x - at[1]) + np.sin(angle) * (y - at[0])
    v = -np.sin(angle) * (x - at[1]) + np.cos(angle) * (y - at[0])
    clean = torch.from_numpy(np.exp(-0.5 * ((u / 6) ** 2 + (v / 3) ** 2)).astype(np.float32))[None, None]
    for images, within in ((clean, 0.05), (4 * clean + 0.5 * torch.randn(1, 1, box_px, box_px), 0.4)):
        centre, axis = model_of(box_px).moments(images)
        torch.testing.assert_close(centre, torch.tensor([at]), atol=10 * within, rtol=0)
        direction = 0.5 * torch.atan2(axis[0, 1], axis[0, 0])
        assert abs(direction - angle) < within and 0.2 < axis.norm() < 1
    centre, axis = model_of(box_px).moments(torch.zeros(1, 1, box_px, box_px))
    assert centre.isfinite().all() and not axis.any()


def test_the_moments_lead_the_pose_and_let_go() -> None:
    model = model_of(moment_share=0.25)
    images = place(phantom(24), torch.rand(16) * 6, torch.randn(16, 2))
    for fraction, weight in ((0.0, 1.0), (0.125, 0.5), (0.25, 0.0), (1.0, 0.0)):
        model.schedule(fraction, 0)
        assert model.moment_weight == pytest.approx(weight)
        assert (model(batch_of(images))["moments"] > 0) == (weight > 0)
    assert "moments" not in model_of(moment_weight=0)(batch_of(images))
    # the pose of the moments has no loss: a model that says it is left alone
    model.schedule(0.0, 0)
    centre, axis = model.moments(images)
    direction = 0.5 * torch.atan2(axis[:, 1], axis[:, 0])
    right = direction[:, None] + math.pi * torch.arange(8)
    wrong = right + 0.3
    log_p = torch.full((16, 8), 1 / 8).log()
    assert model._moment_loss(images, log_p, right, centre) < 1e-6
    assert model._moment_loss(images, log_p, wrong, centre) > 1e-3
    assert model._moment_loss(images, log_p, right, centre + 1) > 0.05


def test_the_scores_learn_the_posterior_of_the_angles() -> None:
    model = model_of(moment_weight=0)
    images = place(phantom(24), torch.rand(8) * 6)
    model.power.fill_(1.0)
    score, angle, shift, raw = model.infer(images)
    z = model.coordinates(raw)
    error = model._errors(images, model.aligned(z), angle, shift).detach()
    by_hand = [
        0.5 * (images - place(model.aligned(z), angle[:, i], shift)).square().sum((1, 2, 3)) for i in range(8)
    ]
    torch.testing.assert_close(error, torch.stack(by_hand, 1).detach(), rtol=1e-4, atol=1e-4)
    # the gradient of the cross-entropy by the scores is that of the marginal likelihood over the angles
    leaf = score.detach().requires_grad_()
    marginal = -torch.logsumexp(leaf.log_softmax(1) - error, 1).sum()
    (expected,) = torch.autograd.grad(marginal, leaf)
    posterior = (leaf.log_softmax(1) - error).softmax(1).detach()
    (got,) = torch.autograd.grad(-(posterior * leaf.log_softmax(1)).sum(), leaf)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
