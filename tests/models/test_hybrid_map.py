from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from particle_explorer import metrics
from particle_explorer.configs import ClassMapConfig, DataSpec
from particle_explorer.ctf import ctf_2d
from particle_explorer.files import UserError
from particle_explorer.models.base import Batch
from particle_explorer.models.build import build_model
from particle_explorer.models.hybrid_map import HybridMap
from particle_explorer.models.pose_posterior import posterior
from particle_explorer.transforms import fourier_radius, place


def model_of(box_px: int = 24, n_channels: int = 1, n_particles: int = 600, **settings: object) -> HybridMap:
    settings = {"latent_dim": 4, "nodes_per_dim": 4, "angle_step_deg": 30, **settings}
    data = DataSpec(box_px=box_px, n_channels=n_channels, diameter_px=0.85 * box_px, n_particles=n_particles)
    model = build_model(ClassMapConfig.model_validate(settings), data)
    assert isinstance(model, HybridMap)
    return model


class Fitted:
    """Images at hand, as training gives them."""

    def __init__(self, images: Tensor, ctf: Tensor | None = None) -> None:
        self.images, self.ctf = images, ctf

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor) -> Batch:
        return Batch(self.images[index], None if self.ctf is None else self.ctf[index], index)


def fit(model: HybridMap, images: Tensor, n_epochs: int, ctf: Tensor | None = None) -> None:
    """What training does."""
    batches = Fitted(images, ctf)
    model.train()
    for _ in model.start(batches):
        pass
    optimiser = torch.optim.Adam(model.parts()["model"], lr=model.learning_rate)
    n_steps, step = n_epochs * math.ceil(len(images) / 25), 0
    for epoch in range(n_epochs):
        for index in torch.randperm(len(images)).split(25):
            model.schedule(step / n_steps, epoch)
            optimiser.param_groups[0]["lr"] = (
                0.5 * model.learning_rate * (1 + math.cos(math.pi * step / n_steps))
            )
            optimiser.zero_grad()
            torch.stack(list(model(batches.take(index)).values())).sum().backward()
            optimiser.step()
            step += 1
    model.eval()
    for _ in model.finish(batches):
        pass


def waving(n: int, swings: Tensor) -> Tensor:
    """A body, a long arm that is still and three that swing by `swings` (b, 3) rad: `(b, 1, n, n)`."""
    y, x = torch.meshgrid(torch.arange(n) - n // 2, torch.arange(n) - n // 2, indexing="ij")
    image = 1.2 * torch.exp(-(y**2 + x**2) / (2 * 2.0**2)).expand(len(swings), n, n)
    arms = ((0.0, 1.6, (3.5, 6.0, 8.5)), (1.5, 0.8, (4.0, 7.0)), (2.8, 1.0, (6.5,)), (4.4, 0.8, (4.0, 6.0)))
    for i, (towards, strength, reaches) in enumerate(arms):
        angle = towards + (swings[:, i - 1, None, None] if i else 0.0)
        for reach in reaches:
            at = torch.as_tensor(angle)
            away = (y - reach * at.sin()) ** 2 + (x - reach * at.cos()) ** 2
            image = image + strength * torch.exp(-away / (2 * 1.3**2))
    return image[:, None]


def blobs(n: int, n_images: int) -> Tensor:
    """Junk of no shape, standard deviation 1."""
    images = torch.randn(n_images, 1, n, n)
    images = torch.fft.irfft2(torch.fft.rfft2(images) / (1 + fourier_radius(n) ** 2), s=(n, n))
    return images / images.std()


def stack(n: int, n_images: int, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy images, the swings, the angles, the shifts."""
    random = torch.Generator().manual_seed(8)
    swings = torch.rand(n_images, 3, generator=random) * 1.2 - 0.6
    angle = torch.rand(n_images, generator=random) * 2 * math.pi - math.pi
    shift = 0.6 * torch.randn(n_images, 2, generator=random)
    images = place(waving(n, swings), angle, shift, mode="fourier") / noise
    return images + torch.randn(images.shape, generator=random), swings, angle, shift


@pytest.fixture(scope="module")
def fitted() -> tuple[HybridMap, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    images, swings, angle, shift = stack(26, 500, 0.25)
    model = model_of(26, n_particles=500, nodes_per_dim=4, angle_step_deg=15)
    fit(model, images, 25)
    return model, images, swings, angle, shift


def test_three_motions_are_held_by_the_content(
    fitted: tuple[HybridMap, Tensor, Tensor, Tensor, Tensor],
) -> None:
    model, images, swings, angle, _ = fitted
    encoding = model.encode(Fitted(images).take(torch.arange(len(images))))
    assert encoding.angle is not None and encoding.z_std is not None
    r = [metrics.knn_regression_r(encoding.z, swings[:, i]) for i in range(3)]
    assert min(r) > 0.8, r
    assert metrics.fisher_lee_T(angle, encoding.angle) > 0.95
    assert 0 < float(encoding.z_std.mean()) < 1
    assert float(encoding.extras["log_likelihood"].median()) > 20


def test_the_pose_draws_the_image_again(fitted: tuple[HybridMap, Tensor, Tensor, Tensor, Tensor]) -> None:
    model, images, swings, angle, shift = fitted
    encoding = model.encode(Fitted(images).take(torch.arange(100)))
    drawn = model.decode(encoding.z, encoding.angle, encoding.shift).detach()
    clean = place(waving(26, swings[:100]), angle[:100], shift[:100], mode="fourier")
    r = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(clean, drawn, strict=True)]
    assert np.median(r) > 0.95
    turn = torch.full((40,), math.radians(90.0))
    n = images.shape[-1]
    within = torch.hypot(torch.arange(n)[:, None] - n // 2.0, torch.arange(n) - n // 2.0) < n / 2 - 1
    some = images[:40] * within
    before, after = (model.encode(Fitted(x).take(torch.arange(40))) for x in (some, place(some, turn)))
    assert before.angle is not None and after.angle is not None
    away = torch.remainder(after.angle - before.angle - turn + math.pi, 2 * math.pi) - math.pi
    assert float(away.abs().median()) < math.radians(2)


def test_saved_and_loaded_it_encodes_and_draws_the_same(
    fitted: tuple[HybridMap, Tensor, Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    model, images, *_ = fitted
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = model_of(26, n_particles=500, nodes_per_dim=4, angle_step_deg=15).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    batch = Fitted(images).take(torch.arange(5))
    ours, theirs = model.encode(batch), other.encode(batch)
    for a, b in zip(ours[:4], theirs[:4], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.decode(ours.z), other.decode(ours.z))
    one = model.encode(Fitted(images).take(torch.arange(2, 3)))
    torch.testing.assert_close(one.z[0], ours.z[2], atol=5e-3, rtol=0)


@pytest.mark.parametrize(("box_px", "n_channels"), [(16, 1), (16, 3), (40, 1), (41, 3), (64, 1)])
def test_every_box_trains_encodes_and_decodes(box_px: int, n_channels: int) -> None:
    torch.manual_seed(0)
    model = model_of(box_px, n_channels, n_particles=6, nodes_per_dim=2)
    model.map.n_epochs = 2
    images = torch.randn(6, n_channels, box_px, box_px)
    for _ in model.start(Fitted(images)):
        pass
    losses = model(Fitted(images).take(torch.arange(6)))
    torch.stack(list(losses.values())).sum().backward()
    for parameter in model.parts()["model"]:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    encoding = model.encode(Fitted(images).take(torch.arange(6)))
    assert encoding.z.shape == (6, 4) and encoding.angle is not None and encoding.shift is not None
    assert all(value.shape == (6,) and value.isfinite().all() for value in encoding.extras.values())
    view = model.decode(encoding.z, encoding.angle, encoding.shift)
    assert view.shape == images.shape and view.isfinite().all()
    latest = model.latest()
    assert latest is not None and latest[1].shape == (6, 4)


@pytest.mark.parametrize(("box_px", "astigmatism_A"), [(32, 0.0), (32, 6000.0), (33, 6000.0)])
def test_through_a_ctf_what_is_compared_is_the_image_itself(box_px: int, astigmatism_A: float) -> None:
    """The score of a mode is that of C m against the image, written out; astigmatism turns with the image."""
    torch.manual_seed(0)
    n = box_px
    model = model_of(n, n_particles=8)
    defocus, angle = np.linspace(8000, 16000, 8), np.linspace(0, 150, 8)
    ctf = torch.from_numpy(np.abs(ctf_2d(n, 5.0, defocus + astigmatism_A, defocus, angle)))
    images = 4 * waving(n, torch.rand(8, 3))  # smooth: turning noise costs some of its finest detail
    batch = Fitted(images, ctf).take(torch.arange(8))
    modes = {
        "angle": torch.rand(8, 1) * 6,
        "move": torch.randn(8, 1, 2),
        "score": torch.zeros(8, 1),
        "centre": torch.zeros(8, 2),
    }
    with torch.no_grad():
        model.decoder.base.add_(waving(n, torch.zeros(1, 3))[0])
        views, ctf_square = model._views(batch, modes)
        mean, log_sd = model._encoded(views[:, 0])
        score = model._seen(views, ctf_square, modes).score[:, 0]
        drawn = model.map.whitened(
            place(model.decoder(mean), modes["angle"][:, 0], modes["move"][:, 0], mode="bicubic")
        )
        seen = torch.fft.irfft2(torch.fft.rfft2(drawn) * ctf[:, None], s=(n, n))
        white = model.map.whitened(images)
        expected = (white * seen).sum((1, 2, 3)) - 0.5 * seen.square().sum((1, 2, 3))
        kl = (-log_sd + 0.5 * (torch.exp(2 * log_sd) + mean**2 - 1)).sum(1)
        expected = expected - kl + model.map.log_prior(modes["move"][:, 0])
        # turned on a finer grid, images keep their finest detail
        at = modes["angle"][:, 0], modes["move"][:, 0]
        drawn = model.map.whitened(place(model.decoder(mean), *at, mode="fourier"))
        seen = torch.fft.irfft2(torch.fft.rfft2(drawn) * ctf[:, None], s=(n, n))
        norm = model.map.norms(model.map.whitened(model.decoder(mean)), ctf_square[:, 0])
    torch.testing.assert_close(norm, seen.square().sum((1, 2, 3)), rtol=0.02, atol=0)
    assert float((score - expected).abs().max()) < 0.1 * float(expected.std())


def test_junk_has_no_say_in_the_content() -> None:
    """It is known by the map, and whatever its images show, the gradient is that of the particles."""
    torch.manual_seed(0)
    images, *_ = stack(26, 300, 0.2)
    is_junk = torch.arange(300) % 4 == 0
    images[is_junk] = 4 * blobs(26, 75) + torch.randn(75, 1, 26, 26)
    model = model_of(26, n_particles=300)
    for _ in model.start(Fitted(images)):
        pass
    junk = model._modes["junk"]
    assert float(junk[is_junk].quantile(0.2)) > 0.99 and float(junk[~is_junk].quantile(0.9)) < 0.01
    weight = model._weight(model._modes)
    assert float(weight.mean()) == pytest.approx(1, abs=0.05)
    gradients = []
    for shown in (images, torch.where((junk > 0.9999)[:, None, None, None], 5 * images.flip(0), images)):
        torch.manual_seed(1)
        model.zero_grad()
        torch.stack(list(model(Fitted(shown).take(torch.arange(300))).values())).sum().backward()
        gradients.append(torch.cat([value.grad.flatten() for value in model.parts()["model"]]))
    assert float(junk.max()) > 0.9999
    assert float((gradients[1] - gradients[0]).norm()) < 0.01 * float(gradients[0].norm())


@pytest.mark.parametrize("settings", [{"junk": False}, {"varies": "classes"}])
def test_without_junk_and_of_different_objects_all_images_count_alike(settings: dict[str, object]) -> None:
    model = model_of(16, nodes_per_dim=2, n_particles=12, **settings)
    model.map.n_epochs = 1
    for _ in model.start(Fitted(torch.randn(12, 1, 16, 16))):
        pass
    assert bool((model._weight(model._modes) == 1).all())


def test_what_is_needed_to_resume_goes_through_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(12, 1, 16, 16)
    model = model_of(16, n_particles=12, nodes_per_dim=2)
    model.map.n_epochs = 1
    for _ in model.start(Fitted(images)):
        pass
    batch = Fitted(images).take(torch.arange(12))
    model(batch)
    torch.save((model.state_dict(), model.training_state()), tmp_path / "state.pt")
    other = model_of(16, n_particles=12, nodes_per_dim=2)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(weights)
    other.load_training_state(state)
    found = []
    for each in (model, other):
        torch.manual_seed(1)
        found.append(torch.stack(list(each(batch).values())))
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)


def test_mirror_images_are_refused() -> None:
    model = model_of(16, mirror=True)
    with pytest.raises(UserError, match="mirror is for maps of up to 3 dimensions, this one has 4"):
        list(model.start(Fitted(torch.randn(4, 1, 16, 16))))


def test_the_map_that_searches_computes_as_training_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a model that was loaded, resumed or started from other weights: none of these calls `start`."""
    told = []

    def products(precision: str) -> contextlib.AbstractContextManager[None]:
        told.append(precision)
        return contextlib.nullcontext()

    monkeypatch.setattr(posterior, "fast_products", products)
    model = model_of(16, nodes_per_dim=2)
    for precision in ("auto", "float32"):
        model.precision = precision
        assert model.precision == model.map.precision == precision
        model.encode(Fitted(torch.randn(2, 1, 16, 16)).take(torch.arange(2)))
    assert told == ["auto", "float32"]


def test_a_fit_that_goes_on_from_other_weights_finds_poses_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = Fitted(torch.randn(12, 1, 16, 16))
    model, asked = model_of(16, nodes_per_dim=2, n_particles=12).train(), []
    find = model.map.encode_modes

    def watched(batch: Batch, n_modes: int) -> dict[str, Tensor]:
        asked.append(batch.row.tolist())
        return find(batch, n_modes)

    monkeypatch.setattr(model.map, "encode_modes", watched)
    for rows in ([0, 1, 2], [2, 11], [1, 11]):
        assert all(bool(loss.isfinite()) for loss in model(images.take(torch.tensor(rows))).values())
    assert asked == [[0, 1, 2], [11]]
