"""What holds for every model: any box, any channels, every weight learns, saved and loaded is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from particle_explorer import preprocess
from particle_explorer.configs import DataSpec, ModelConfig
from particle_explorer.encoding import encode, unexplained
from particle_explorer.files import UserError
from particle_explorer.models.base import Batch, ParticleModel
from particle_explorer.models.build import build_model
from particle_explorer.session import Session
from particle_explorer.widgets.colours import title_of

SETTINGS: dict[str, dict[str, object]] = {
    "vae": {"hidden": 32},
    "spatial-vae": {"hidden": 32},
    "target-vae": {"channels": 16, "kernel_functions": 40, "features": 64, "hidden": 32, "rotations": "P4"},
}
"""Small settings of a kind; the defaults where there are none."""
CONFIGS = {config.model_fields["kind"].default: config for config in get_args(get_args(ModelConfig)[0])}
KINDS = [kind for kind in CONFIGS if kind != "class-map"]  # that one fits by passes of its own


def model_of(kind: str, box_px: int = 24, n_channels: int = 1, **settings: object) -> ParticleModel:
    data = DataSpec(box_px=box_px, n_channels=n_channels, diameter_px=0.8 * box_px, n_particles=10)
    torch.manual_seed(0)
    model = build_model(CONFIGS[kind].model_validate({**SETTINGS.get(kind, {}), **settings}), data)
    model.schedule(1.0, 1000)
    return model


def batch_of(images: Tensor) -> Batch:
    return Batch(images, None, torch.arange(len(images)))


class InMemory:
    """Images as `models.base.Batches`."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor) -> Batch:
        return Batch(self.images[index], None, index)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("box_px", [16, 40, 41, 64])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_every_box_trains_encodes_and_decodes(kind: str, box_px: int, n_channels: int) -> None:
    model = model_of(kind, box_px, n_channels, latent_dim=2)
    images = torch.randn(4, n_channels, box_px, box_px)
    steps = list(model.start(InMemory(images)))
    assert all(0 <= step.fraction <= 1 for step in steps)
    model.schedule(1.0, 1000)
    got: set[str] = set()
    for part in model.parts():
        model.zero_grad(set_to_none=True)
        losses = model(batch_of(images), part)
        assert all(torch.isfinite(loss) and loss.ndim == 0 for loss in losses.values())
        sum(losses.values()).backward()
        got |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got == {name for name, _ in model.named_parameters()}
    model.eval()
    encoding = model.encode(batch_of(images))
    assert encoding.z.shape == (4, model.latent_dim)
    assert encoding.z_std is None or encoding.z_std.shape == encoding.z.shape
    assert encoding.angle is None or encoding.angle.shape == (4,)
    assert encoding.shift is None or encoding.shift.shape == (4, 2)
    assert all(value.shape == (4,) for value in encoding.extras.values())
    for pose in ((None, None), (torch.ones(4), torch.ones(4, 2))):
        view = model.decode(encoding.z, *pose)
        assert view.shape == images.shape and view.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Watches how many bytes the largest tensor has that anybody makes."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, Tensor):
                self.n_bytes = max(self.n_bytes, one.numel() * one.element_size())
        return made


IN_A_LARGE_BOX = {
    "spatial-vae": {"starts": 1},
    "class-map": {"nodes_per_dim": 2, "angle_step_deg": 30},
    "class-map of 4 dimensions": {"nodes_per_dim": 2, "angle_step_deg": 30, "latent_dim": 4},
}
"""Further settings that make a fit short."""


@pytest.mark.parametrize("kind", [*KINDS, "class-map", "class-map of 4 dimensions"])
def test_a_large_box_is_built_in_little_memory_trains_and_encodes(kind: str) -> None:
    n, settings = 255, IN_A_LARGE_BOX.get(kind, {})
    kind = kind.partition(" ")[0]
    with LargestTensor() as largest:
        model = model_of(kind, n, 3, **settings)
    weights = max(p.numel() * p.element_size() for p in model.parameters())
    assert largest.n_bytes <= max(weights, 64 * 2**20)
    images = torch.randn(2, 3, n, n)
    if kind != "class-map":
        for _ in model.start(InMemory(images)):
            pass
    model.schedule(1.0, 1000)
    for part, parameters in model.parts().items():
        before = [p.detach().clone() for p in parameters[-2:]]
        torch.stack(list(model(batch_of(images), part).values())).sum().backward()
        torch.optim.SGD(parameters, lr=1e-3).step()
        assert all(p.isfinite().all() for p in parameters)
        assert any(not torch.equal(p, q) for p, q in zip(parameters[-2:], before, strict=True))
        model.zero_grad(set_to_none=True)
    model.eval()
    encoding = model.encode(batch_of(images))
    assert encoding.z.shape == (2, model.latent_dim) and encoding.z.isfinite().all()
    assert model.decode(encoding.z, encoding.angle, encoding.shift).shape == images.shape


IN_PARTS = [*KINDS, "class-map of 4 dimensions"]
"""Kinds whose batches are taken in parts where need be; a class map works in blocks of its own."""


@pytest.mark.parametrize("kind", IN_PARTS)
def test_gradients_of_parts_add_up_to_that_of_the_batch(kind: str) -> None:
    settings = {**IN_A_LARGE_BOX, "rotation-ae": {"critic_every": 1}}.get(kind, {})
    model = model_of(kind.partition(" ")[0], 24, 1, **settings)
    assert model.step_bytes_per_image > 0
    images, index = torch.randn(7, 1, 24, 24), torch.tensor([3, 1, 0, 6, 4, 2, 5])
    found = {}
    for at_once in (7, 3):
        torch.manual_seed(5)
        for part in model.parts():
            model.zero_grad(set_to_none=True)
            losses: dict[str, Tensor] = {}
            for batch, weight in model.in_parts(InMemory(images), index, at_once):
                assert len(batch.row) <= at_once
                for name, loss in model(batch, part).items():
                    losses[name] = losses.get(name, torch.zeros(())) + weight * loss
            sum(losses.values()).backward()
            found[at_once, part] = [p.grad for p in model.parameters() if p.grad is not None], losses
            after = torch.rand(3)  # what comes next is drawn from the same state too
            assert torch.equal(found.setdefault((part, "after"), after), after)
    for part in model.parts():
        (whole, told), (parts, told_in_parts) = found[7, part], found[3, part]
        assert len(whole) == len(parts) > 0 and model.share is None
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(other, one, atol=1e-3 * float(one.abs().max()), rtol=1e-3)
        for name, loss in told.items():
            torch.testing.assert_close(told_in_parts[name], loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_encodes_the_same_in_batches_of_any_size(kind: str, tmp_path: Path) -> None:
    model, images = model_of(kind).eval(), torch.randn(5, 1, 24, 24)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = model_of(kind, latent_dim=model.latent_dim)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    whole, again = model.encode(batch_of(images)), other.eval().encode(batch_of(images))
    for a, b in zip(whole[:4], again[:4], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for i in range(5):
        one = model.encode(batch_of(images[i : i + 1]))
        for a, b in zip(whole[:4], one[:4], strict=True):
            if a is not None:
                torch.testing.assert_close(a[i : i + 1], b, atol=1e-4, rtol=1e-3)


LIKELIHOODS = [kind for kind in KINDS if "likelihood" in CONFIGS[kind].model_fields]


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("likelihood", ["gaussian-learned", "bernoulli"])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_likelihoods_train_every_weight(kind: str, likelihood: str, n_channels: int) -> None:
    model = model_of(kind, 24, n_channels, likelihood=likelihood)
    images = torch.rand(4, n_channels, 24, 24)
    sum(model(batch_of(images)).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    view = model.decode(torch.randn(4, model.latent_dim))
    assert view.shape == images.shape
    assert likelihood != "bernoulli" or (view.min() >= 0 and view.max() <= 1)


@pytest.mark.parametrize("kind", LIKELIHOODS)
def test_bernoulli_refuses_images_that_are_no_grey_values(kind: str) -> None:
    model = model_of(kind, likelihood="bernoulli")
    assert list(model.start(InMemory(torch.rand(8, 1, 24, 24))))
    with pytest.raises(UserError, match=r"from 0 to 1, these images go from -\d.* to \d"):
        list(model.start(InMemory(torch.randn(8, 1, 24, 24))))


@pytest.mark.parametrize("n_channels", [1, 3])
def test_the_likelihood_is_that_of_the_noise(n_channels: int) -> None:
    from particle_explorer.models.layers import PixelNoise

    rng = torch.Generator().manual_seed(0)
    mean = torch.randn(6, 50, n_channels, generator=rng)
    pixels, log_variance = torch.rand(mean.shape, generator=rng), torch.randn(mean.shape, generator=rng)
    normal = torch.distributions.Normal(mean, torch.exp(log_variance / 2))
    drawn = torch.cat([mean, log_variance], -1)
    constant = 0.5 * np.log(2 * np.pi)
    learned = PixelNoise("gaussian-learned", n_channels)
    torch.testing.assert_close(learned(drawn, pixels), -normal.log_prob(pixels) - constant)
    unit = PixelNoise("gaussian", n_channels)(mean, pixels)
    torch.testing.assert_close(unit, -torch.distributions.Normal(mean, 1).log_prob(pixels) - constant)
    binary = PixelNoise("bernoulli", n_channels)(mean, pixels.round())
    torch.testing.assert_close(binary, -torch.distributions.Bernoulli(logits=mean).log_prob(pixels.round()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_particle_gets_its_reconstruction_error(kind: str, tiny_session: Session) -> None:
    spec = tiny_session.data_spec()
    torch.manual_seed(0)
    model = build_model(CONFIGS[kind].model_validate(SETTINGS.get(kind, {})), spec).eval()
    model.schedule(1.0, 1000)
    *_, (_, latents) = encode(model, tiny_session)
    error = latents.table["residual"].to_numpy()
    # once more, from what the columns say
    scale = preprocess.original_pixels(tiny_session.table, tiny_session.plan)
    pose = [
        None if latents.angle_deg is None else torch.deg2rad(torch.from_numpy(latents.angle_deg)),
        None
        if latents.shift_yx_px is None
        else torch.from_numpy(latents.shift_yx_px / scale[:, None].astype(np.float32)),
    ]
    rows = np.arange(tiny_session.n_particles)
    images = tiny_session.images.read(rows)
    with torch.no_grad():
        drawn = model.decode(torch.from_numpy(latents.z), *pose).numpy()
    y, x = np.indices(images.shape[-2:]) - spec.box_px // 2
    disc = np.hypot(x, y) <= spec.diameter_px / 2
    again = ((images - drawn)[..., disc] ** 2).mean((1, 2))
    np.testing.assert_allclose(error, again, rtol=0.02)
    assert title_of("residual") == "reconstruction error"
    # a stain over one of the images is nothing the model can draw
    batch = batch_of(torch.from_numpy(images[:4]))
    stained = batch._replace(images=batch.images.clone())
    stained.images[2, :, 5:-5, 5:-5] += 20
    encoding = model.encode(batch)
    clean, worse = (unexplained(model, one, encoding) for one in (batch, stained))
    others = torch.tensor([0, 1, 3])
    assert worse[2] > 10 * clean[2] and torch.equal(worse[others], clean[others])
