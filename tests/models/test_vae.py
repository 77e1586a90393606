"""The plain baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from particle_explorer.configs import DataSpec, VAEConfig
from particle_explorer.models.base import Batch
from particle_explorer.models.vae import VAE
from particle_explorer.transforms import place


def model_of(**settings: object) -> VAE:
    data = DataSpec(box_px=24, n_channels=1, diameter_px=20, n_particles=10)
    torch.manual_seed(0)
    return VAE(VAEConfig.model_validate(settings), data)


def batch_of(images: Tensor) -> Batch:
    return Batch(images, None, torch.arange(len(images)))


def test_beta_weighs_the_prior() -> None:
    images = torch.randn(6, 1, 24, 24)
    losses = {}
    for beta in (1.0, 4.0):
        model = model_of(beta=beta, hidden=32)
        torch.manual_seed(1)
        losses[beta] = model(batch_of(images))
    torch.testing.assert_close(losses[4.0]["kl_content"], 4 * losses[1.0]["kl_content"])
    torch.testing.assert_close(losses[4.0]["reconstruction"], losses[1.0]["reconstruction"])


def test_it_learns_one_factor_and_says_nothing_of_pose() -> None:
    model = model_of(latent_dim=1, hidden=64)
    line = torch.arange(24.0) - 12

    def images(x: Tensor) -> Tensor:
        blob = torch.exp(-0.5 * ((line - x[:, None]) / 3) ** 2)
        return 3 * (torch.exp(-0.5 * (line / 3) ** 2)[:, None] * blob[:, None])[:, None]

    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):
        clean = images(8 * torch.rand(64) - 4)
        loss = sum(model(batch_of(clean + torch.randn_like(clean))).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x = 8 * torch.rand(200) - 4
    encoding = model.encode(batch_of(images(x) + torch.randn(200, 1, 24, 24)))
    assert encoding.angle is None and encoding.shift is None
    assert abs(torch.corrcoef(torch.stack([x, encoding.z[:, 0]]))[0, 1]) > 0.9
    views = model.decode(encoding.z)
    assert (views - images(x)).square().mean() < 0.1 * images(x).square().mean()
    angle, shift = torch.ones(200), torch.ones(200, 2)
    torch.testing.assert_close(
        model.decode(encoding.z, angle, shift), place(views, angle, shift, mode="bicubic")
    )
