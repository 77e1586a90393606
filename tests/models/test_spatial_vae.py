from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from particle_explorer import devices, pose
from particle_explorer.configs import DataSpec, SpatialVAEConfig
from particle_explorer.ctf import ctf_2d
from particle_explorer.files import UserError
from particle_explorer.models import spatial_vae
from particle_explorer.models.base import Batch
from particle_explorer.models.build import build_model
from particle_explorer.models.spatial_vae import SpatialVAE
from particle_explorer.transforms import place


def model_of(box_px: int = 24, n_channels: int = 1, **settings: object) -> SpatialVAE:
    settings = {"hidden": 32, "latent_dim": 2, **settings}
    data = DataSpec(box_px=box_px, n_channels=n_channels, diameter_px=0.8 * box_px, n_particles=10)
    model = build_model(SpatialVAEConfig.model_validate(settings), data)
    assert isinstance(model, SpatialVAE)
    model.schedule(1.0, 1000)
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


@pytest.mark.parametrize("box_px", [16, 40, 41, 64])
@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("infer_shift", [True, False])
def test_every_box_trains_encodes_and_decodes(box_px: int, n_channels: int, infer_shift: bool) -> None:
    model = model_of(box_px, n_channels, infer_shift=infer_shift)
    images = torch.randn(3, n_channels, box_px, box_px)
    losses = model(batch_of(images))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss.ndim == 0 for loss in losses.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    encoding = model.encode(batch_of(images))
    assert encoding.z.shape == (3, 2) and encoding.z_std is not None and encoding.z_std.shape == (3, 2)
    assert encoding.angle is not None and encoding.angle.shape == (3,)
    assert (encoding.shift is not None) == infer_shift
    assert all(value.shape == (3,) for value in encoding.extras.values())
    assert model.decode(encoding.z, encoding.angle, encoding.shift).shape == images.shape


@pytest.mark.parametrize("settings", [{}, {"augment_rotation": False}, {"layers": 1}, {"layers": 3}])
def test_saved_and_loaded_encodes_the_same(tmp_path: Path, settings: dict[str, object]) -> None:
    model, images = model_of(**settings), torch.randn(5, 1, 24, 24)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = model_of(**settings)
    assert not torch.equal(other.encode(batch_of(images)).z, model.encode(batch_of(images)).z)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for a, b in zip(model.encode(batch_of(images))[:4], other.encode(batch_of(images))[:4], strict=True):
        assert torch.equal(a, b)


def test_batch_equals_loop() -> None:
    model, images = model_of(), torch.randn(6, 1, 24, 24)
    whole = model.encode(batch_of(images))
    for i in range(6):
        one = model.encode(batch_of(images[i : i + 1]))
        for a, b in zip(whole[:4], one[:4], strict=True):
            torch.testing.assert_close(a[i : i + 1], b, atol=1e-5, rtol=1e-4)
    views = model.decode(whole.z, whole.angle, whole.shift)
    alone = model.decode(whole.z[2:3], whole.angle[2:3], whole.shift[2:3])
    torch.testing.assert_close(views[2:3], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("box_px", [40, 41])
def test_poses_are_those_of_the_paper_by_the_pose_module(box_px: int) -> None:
    model, z = model_of(box_px), torch.randn(7, 2)
    theta, dx = torch.linspace(-3, 3, 7), 0.2 * torch.randn(7, 2)
    # the paper: x' = x R(theta) + dx, y up, corner pixel centres at +-1, row vectors
    line = torch.linspace(-1, 1, box_px)
    x = torch.stack(torch.meshgrid(line, -line, indexing="xy"), -1).reshape(-1, 2)
    cos, sin = torch.cos(theta), torch.sin(theta)
    matrix = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    canonical = x @ matrix + dx[:, None]
    # the same reference, kept about pixel n // 2
    centre = (box_px // 2 - (box_px - 1) / 2) * 2 / (box_px - 1) * torch.tensor([1.0, -1.0])
    none = torch.zeros(7)
    expected = model.decoder(canonical - centre, none, torch.zeros(7, 2), z)
    angle_deg, shift = pose.from_spatial_vae(theta.numpy(), dx.numpy(), box_px)
    angle, shift_yx = torch.tensor(np.deg2rad(angle_deg)).float(), torch.tensor(shift).float()
    move = (shift_yx * model._half_image_yx).flip(-1)
    seen = model.decoder(model.pixels.expand(7, -1, -1), angle, move, z)
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("box_px", [40, 41])
def test_decoding_at_a_pose_is_placing_the_canonical_view(box_px: int) -> None:
    model = model_of(box_px)
    z = torch.randn(6, 2)
    angle = torch.tensor([0.0, 0.5, math.pi / 2, -2.0, 3.0, 1.0])
    shift = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, -1.0], [0.5, 3.0], [-2.5, -2.0], [1.0, 0.0]])
    expected = place(model.decode(z), angle, shift, mode="bicubic")
    seen = model.decode(z, angle, shift)
    inside = model.decode(z).abs().amax()
    assert (seen - expected).abs().mean() < 0.02 * inside
    assert (seen - expected).square().mean() < 1e-3 * seen.var()


def test_a_subset_of_pixels_estimates_the_whole_error_without_bias() -> None:
    whole, part = model_of(pixel_fraction=1.0), model_of(pixel_fraction=0.1)
    part.load_state_dict(whole.state_dict())
    images = torch.randn(20, 1, 24, 24) + 2 * phantom(24)
    pose_of = torch.rand(20), 0.1 * torch.randn(20, 2), torch.randn(20, 2)
    with torch.no_grad():
        expected = whole._reconstruction(batch_of(images), *pose_of)
        estimates = torch.stack([part._reconstruction(batch_of(images), *pose_of) for _ in range(300)])
    error = estimates.std() / math.sqrt(len(estimates))
    assert estimates.std() > 0
    assert abs(estimates.mean() - expected) < 4 * error


def a_ctf(n: int, b: int) -> Tensor:
    defocus = np.linspace(8000, 20000, b)
    return torch.from_numpy(np.abs(ctf_2d(n, 4.0, defocus + 500, defocus, 30.0)))


@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian-learned"])
def test_the_ctf_of_an_image_is_applied_to_what_is_drawn(likelihood: str) -> None:
    model = model_of(24, apply_ctf=True, likelihood=likelihood)
    assert model.uses_ctf and not model_of(24).uses_ctf
    images, ctf = torch.randn(5, 1, 24, 24), a_ctf(24, 5)
    pose_of = torch.rand(5), 0.1 * torch.randn(5, 2), torch.randn(5, 2)
    batch = batch_of(images)._replace(ctf=ctf)
    loss = model._reconstruction(batch, *pose_of)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.decoder.parameters())
    # by the definition: the whole picture, its spectrum times the CTF, the error over the disc
    with torch.no_grad():
        drawn = model.decoder(model.pixels[model.disc].expand(5, -1, -1), *pose_of)
        picture = torch.zeros(5, 24 * 24)
        picture[:, model.disc] = drawn[..., 0]
        seen = torch.fft.irfft2(torch.fft.rfft2(picture.unflatten(1, (24, 24))) * ctf, s=(24, 24))
        error = (seen - images[:, 0]).flatten(1)[:, model.disc].square()
        expected = 0.5 * error
        if likelihood == "gaussian-learned":
            expected = 0.5 * (error * torch.exp(-drawn[..., 1]) + drawn[..., 1])
    torch.testing.assert_close(loss.detach(), expected.sum(1).mean(), rtol=1e-4, atol=1e-4)
    # a CTF of one changes nothing, nor does none
    plain = model_of(24, likelihood=likelihood, pixel_fraction=1.0)
    plain.load_state_dict(model.state_dict())
    flat = model._reconstruction(batch._replace(ctf=torch.ones_like(ctf)), *pose_of)
    torch.testing.assert_close(flat, plain._reconstruction(batch, *pose_of))


def test_grey_values_have_no_ctf() -> None:
    with pytest.raises(UserError, match=r"--model\.apply-ctf does not go with --model\.likelihood bernoulli"):
        model_of(24, apply_ctf=True, likelihood="bernoulli")


class Turned:
    """Noisy phantoms at known poses, as `models.base.Batches`."""

    def __init__(self, n: int, box_px: int) -> None:
        rng = torch.Generator().manual_seed(3)
        angle = 2 * math.pi * torch.rand(n, generator=rng)
        clean = place(3 * phantom(box_px), angle, torch.zeros(n, 2), mode="bicubic")
        self.images = clean + torch.randn(clean.shape, generator=rng)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor) -> Batch:
        return batch_of(self.images[index])


def test_of_several_starts_the_best_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, told, drawn = Turned(64, 16), [], []
    model = model_of(16, starts=3)
    networks = model._networks

    def counted() -> tuple[torch.nn.Sequential, torch.nn.Module]:
        encoder, decoder = networks()
        drawn.append(decoder)
        if len(drawn) == 2:  # the last start draws nothing like the particle, whatever it learns
            with torch.no_grad():
                decoder.out.bias.fill_(1e3)
        return encoder, decoder

    monkeypatch.setattr(model, "_networks", counted)
    first = model.decoder.coordinates.weight.detach().clone()
    held = list(model.parameters())  # by the optimisers of a fit
    torch.manual_seed(0)
    for step in model.start(batches):
        told.append(step)
    assert len(drawn) == 2 and {step.what for step in told} == {
        f"learning pose, start {i} of 3" for i in (1, 2, 3)
    }
    assert [step.fraction for step in told] == sorted(step.fraction for step in told)
    assert model.chosen and model.decoder.out.bias.abs().max() < 100
    assert not torch.equal(model.decoder.coordinates.weight, first)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))
    model.schedule(0.0, 0)
    assert model.content_frozen and not model.shift_frozen
    other = model_of(16)
    other.load_training_state(model.training_state())
    assert other.chosen


def test_starts_keep_to_the_memory_and_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Turned(300, 16)
    found, largest = {}, {}
    for free in (10**9, 0):
        monkeypatch.setattr(devices, "free_memory_bytes", lambda free=free: 100_000 + free)
        monkeypatch.setattr(spatial_vae, "TRIAL_IMAGES", 200)
        torch.manual_seed(2)
        model = model_of(16, starts=2)
        model.step_bytes_per_image = 5000  # 100 000: room for 10 at a time, a power of two of them
        seen: list[int] = []
        model.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0].row)))
        torch.manual_seed(3)
        for _ in model.start(batches):
            pass
        assert model.share is None
        found[free], largest[free] = model.state_dict(), max(seen)
    assert largest == {10**9: 250, 0: 8}
    # rounding may turn Adam's step of a weight that has next to no gradient
    for name, value in found[10**9].items():
        assert (found[0][name] - value).abs().mean() < 1e-4, name


def test_one_start_is_taken_as_it_is() -> None:
    model = model_of(16, starts=1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert list(model.start(Turned(8, 16))) == []
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_content_waits_for_the_pose() -> None:
    model = model_of(content_freeze_epochs=2)
    model.schedule(0.1, 1)
    sum(model(batch_of(torch.randn(2, 1, 24, 24))).values()).backward()
    assert model.decoder.content.weight.grad is None or not model.decoder.content.weight.grad.any()
    model.schedule(0.2, 2)
    sum(model(batch_of(torch.randn(2, 1, 24, 24))).values()).backward()
    assert model.decoder.content.weight.grad is not None and model.decoder.content.weight.grad.any()


def test_a_non_negative_mean_is_not_negative() -> None:
    model = model_of(non_negative=True)
    assert model.decode(torch.randn(4, 2)).min() >= 0
    assert model_of().decode(torch.randn(4, 2)).min() < 0


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no half-precision products here")
def test_half_precision_keeps_the_objective_and_the_pose() -> None:
    model = model_of(40, pixel_fraction=1.0, augment_rotation=False)
    images = torch.randn(8, 1, 40, 40) + phantom(40)
    torch.manual_seed(1)
    exact = model(batch_of(images))
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(batch_of(images))
        view = model.decode(torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2))
    for name, loss in exact.items():
        torch.testing.assert_close(half[name].float(), loss, rtol=0.01, atol=0.01)
    torch.testing.assert_close(
        view, model.decode(torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2)), atol=0.02, rtol=0
    )
