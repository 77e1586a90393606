from __future__ import annotations

import itertools
import math
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from torch import Tensor

from particle_explorer import pose
from particle_explorer.configs import DataSpec, RotationAEConfig
from particle_explorer.files import UserError
from particle_explorer.io.reading import read
from particle_explorer.io.writing import export_particles
from particle_explorer.models.base import Batch, Share
from particle_explorer.models.build import build_model
from particle_explorer.models.rotation_ae import RotationAE, _angle_loss
from particle_explorer.transforms import place


def model_of(box_px: int = 24, **settings: object) -> RotationAE:
    data = DataSpec(box_px=box_px, n_channels=1, diameter_px=0.8 * box_px, n_particles=10)
    model = build_model(RotationAEConfig.model_validate({"latent_dim": 4, **settings}), data)
    assert isinstance(model, RotationAE)
    return model


class Posed:
    """Images that carry poses, or none."""

    def __init__(self, images: Tensor, pose: Tensor | None) -> None:
        self.images, self.pose = images, pose

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor) -> Batch:
        return Batch(self.images[index], None, index, None if self.pose is None else self.pose[index])


def phantom(n: int) -> Tensor:
    y, x = np.mgrid[:n, :n] - n // 2
    r = n / 24
    image = np.exp(-0.5 * (y**2 + x**2) / (3 * r) ** 2)
    image += 1.3 * np.exp(-0.5 * ((y - 2 * r) ** 2 + (x - 6 * r) ** 2) / (1.8 * r) ** 2)
    image += 0.7 * np.exp(-0.5 * ((y + 5 * r) ** 2 + (x - 2 * r) ** 2) / (1.5 * r) ** 2)
    return torch.from_numpy(image.astype(np.float32))[None, None]


def posed_phantoms(n: int, k: int) -> Posed:
    pose = torch.cat([2 * math.pi * torch.rand(k, 1) - math.pi, torch.randn(k, 2)], 1)
    return Posed(place(3 * phantom(n), pose[:, 0], pose[:, 1:], mode="bicubic"), pose)


def test_what_is_learned_from_is_decided_by_what_the_particles_carry() -> None:
    with_poses = posed_phantoms(24, 4)
    without = Posed(with_poses.images, None)
    for poses, batches, supervised in (
        ("auto", with_poses, True),
        ("auto", without, False),
        ("self", with_poses, False),
        ("file", with_poses, True),
    ):
        model = model_of(poses=poses)
        (step,) = model.start(batches)
        assert bool(model.supervised) == supervised and ("angles" in step.what) == supervised
        encoding = model.encode(batches.take(torch.arange(2)))
        # without known angles none may reach a file
        assert (encoding.angle is not None) == supervised and encoding.shift is None
        other = model_of()
        other.load_state_dict(model.state_dict())
        assert bool(other.supervised) == supervised
    with pytest.raises(UserError, match=r"--model\.poses file: not all particles carry"):
        list(model_of(poses="file").start(without))


@pytest.mark.parametrize("n", [24, 25])
def test_examples_are_turned_particles_their_angles_and_upright_targets(n: int) -> None:
    batches = posed_phantoms(n, 6)
    model = model_of(n)
    list(model.start(batches))
    turned, angle, target = model._examples(batches.take(torch.arange(6)))
    upright = 3 * phantom(n).expand(6, -1, -1, -1)
    middle = (..., slice(5, -5), slice(5, -5))
    assert (target - upright)[middle].abs().max() < 0.15 * upright.max()
    # at its angle and nowhere else: bring the turned image back
    moved = place(torch.eye(1).new_zeros(6, 1, n, n), angle)
    assert moved.shape == turned.shape
    shift = batches.pose[:, 1:]
    turn = angle - batches.pose[:, 0]
    cos, sin = turn.cos(), turn.sin()
    there = torch.stack([cos * shift[:, 0] + sin * shift[:, 1], cos * shift[:, 1] - sin * shift[:, 0]], 1)
    expected = place(upright, angle, there, mode="bicubic")
    assert (turned - expected)[middle].abs().mean() < 0.02 * upright.max()
    list(model_of(n, poses="self").start(batches))


def test_the_angle_error_is_that_on_the_circle() -> None:
    angle = torch.tensor([0.1, math.pi, -3.0])
    other = torch.tensor([0.3, -math.pi + 0.2, 3.0])
    away = torch.tensor([0.2, 0.2, 2 * math.pi - 6.0])
    direction = torch.stack([other.cos(), other.sin()], 1)
    torch.testing.assert_close(_angle_loss(direction, angle), 2 - 2 * away.cos())
    # who does not know the angle says so by a short direction, and is right to
    silent, opposite = _angle_loss(0 * direction, angle), _angle_loss(-direction, angle)
    assert (silent == 1).all() and opposite.mean() > 1


def test_each_answer_of_the_reader_has_its_own_target() -> None:
    """Compared with all targets at once, as published, the best answer would be the batch's mean."""
    model = model_of()
    angle = torch.linspace(-3, 3, 8)
    right = torch.stack([angle.cos(), angle.sin()], 1)
    assert _angle_loss(right, angle).max() < 1e-5 < 0.1 < _angle_loss(right.flip(0), angle).mean()
    assert model.reader(torch.randn(8, 1, 24, 24)).shape == (8, 2)


def test_examples_of_images_from_0_to_1_stay_there() -> None:
    """As do images that were turned elsewhere and are to be encoded."""
    torch.manual_seed(0)
    edges = (torch.rand(6, 1, 24, 24) > 0.5).float()
    batch = Batch(edges, None, torch.arange(6), torch.rand(6, 3))
    for pixels, inside in (("sigmoid", True), ("linear", False)):
        model = model_of(pixels=pixels, poses="file")
        for _ in model.start(Posed(edges, torch.rand(6, 3))):
            pass
        turned, _, target = model._examples(batch)
        for images in (turned, target):
            assert (float(images.min()) >= 0 and float(images.max()) <= 1) == inside


@pytest.mark.parametrize("pixels", ["linear", "sigmoid"])
@pytest.mark.parametrize("n", [16, 28, 41])
def test_nothing_is_drawn_where_turned_images_know_nothing(n: int, pixels: str) -> None:
    drawn = model_of(n, pixels=pixels).decode(torch.randn(3, 4))
    beyond = torch.from_numpy(np.hypot(*(np.indices((n, n)) - n // 2)) > n / 2)
    assert drawn.shape == (3, 1, n, n)
    assert (drawn[..., beyond] == 0).all() and drawn[..., n // 2, n // 2].abs().min() > 0


@pytest.mark.parametrize(("total", "cuts"), [(8, (4,)), (9, (5,)), (3, (1, 2)), (1, ())])
def test_parts_of_a_batch_are_judged_as_the_whole(total: int, cuts: tuple[int, ...]) -> None:
    model, score = model_of(), torch.randn(total)
    judged, share = model._judged(score)
    expected = score[judged].mean()
    assert len(score[judged]) == math.ceil(total / 4)
    torch.testing.assert_close(share * score[judged].sum(), expected)
    found = torch.zeros(())
    for first, end in itertools.pairwise([0, *cuts, total]):
        part = score[first:end]
        model.share = Share(first, total)
        judged, share = model._judged(part)
        found += share * part[judged].sum() * len(part) / total
    torch.testing.assert_close(found, expected)


def test_the_critic_steps_once_for_several_steps_and_remembers_which() -> None:
    batches = posed_phantoms(24, 8)
    model = model_of(critic_every=3)
    list(model.start(batches))
    batch = batches.take(torch.arange(8))
    asked = [bool(model(batch, "critic")) for _ in range(7)]
    assert asked == [True, False, False, True, False, False, True]
    other = model_of(critic_every=3)
    other.load_training_state(model.training_state())
    assert not other(batch, "critic") and not other(batch, "critic") and other(batch, "critic")
    assert model_of(adversarial="none")(batch, "critic") == {}


def train(model: RotationAE, batches: Posed, n_steps: int, lr: float = 2e-3) -> dict[str, float]:
    optimisers = {name: torch.optim.Adam(p, lr, betas=model.betas) for name, p in model.parts().items()}
    list(model.start(batches))
    for step in range(n_steps):
        batch = batches.take(torch.randint(len(batches), (32,)))
        for part, optimiser in optimisers.items():
            optimiser.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / n_steps))
            losses = model(batch, part)
            if losses:
                model.zero_grad()
                sum(losses.values()).backward()
                optimiser.step()
    return {}


def test_the_slope_of_the_critic_is_held() -> None:
    """With nothing but critics stepped, the published one grows without bound; this one stays near 1."""
    batches = posed_phantoms(24, 64)
    slopes = {}
    for held in (True, False):
        torch.manual_seed(0)
        model = model_of(critic_every=1)
        list(model.start(batches))
        optimiser = torch.optim.Adam(model.critic.parameters(), 2e-3)
        for _ in range(80):
            losses = model(batches.take(torch.randint(64, (32,))), "critic")
            optimiser.zero_grad()
            (losses["discriminator"] + (losses["slope"] if held else 0)).backward()
            optimiser.step()
        batch = batches.take(torch.arange(64))
        _, _, target = model._examples(batch)
        fake = model.drawn_upright(model.infer(batch.images)[0])
        slopes[held] = float(
            model.slope(target.detach(), fake.detach(), torch.rand(64, 1, 1, 1)).detach().mean()
        )
    assert 0.3 < slopes[True] < 2 and slopes[False] > 5 * slopes[True], slopes


def exported_poses(folder: Path, posed: Posed, angle_deg: NDArray[np.float32]) -> Path:
    """The star file that results from these angles and a source with true origins and false angles."""
    n, (_, y, x) = posed.images.shape[-1], posed.pose.T.tolist()
    with mrcfile.new(folder / "in.mrcs", posed.images[:, 0].numpy()) as stack:
        stack.set_image_stack()
    optics = f"data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n_rlnImageSize\n1 2.0 {n}\n\n"
    names = ["ImageName", "OpticsGroup", "AnglePsi", "OriginXAngst", "OriginYAngst"]
    rows = [f"{i + 1}@in.mrcs 1 77.0 {-2 * x[i]} {-2 * y[i]}" for i in range(len(x))]
    lines = ["data_particles", "", "loop_", *(f"_rln{name}" for name in names), *rows, ""]
    star = folder / "in.star"
    star.write_text(optics + "\n".join(lines))
    out = folder / "out.star"
    export_particles(out, table=read(star).table, source=star, kind="star", angle_deg=angle_deg)
    return out


def average_by_star(star: Path, images: NDArray[np.float32], sign: int) -> NDArray[np.float64]:
    """As RELION takes the poses: x_ref = R(psi) (x_particle + origin); the other `sign` mistakes psi."""
    table, n = starfile.read(star)["particles"], images.shape[-1]
    grid = np.indices((n, n))[::-1].reshape(2, -1) - n // 2
    origins = table[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy() / 2.0
    total = np.zeros(n * n)
    for image, psi, origin in zip(images, table["rlnAnglePsi"], origins, strict=True):
        at = pose.rotation_matrix(-sign * psi) @ grid - origin[:, None]
        total += map_coordinates(image, at[::-1] + n // 2, order=1) / len(images)
    return total


@pytest.mark.parametrize("box_px", [24, 25])
def test_turning_the_input_turns_the_angle_and_not_the_content(box_px: int, tmp_path: Path) -> None:
    batches = posed_phantoms(box_px, 600)
    model = model_of(box_px)
    train(model, batches, 300)
    model.eval()
    fresh = posed_phantoms(box_px, 200)
    encoding = model.encode(fresh.take(torch.arange(200)))
    assert encoding.angle is not None
    off = torch.rad2deg(torch.exp(1j * (encoding.angle - fresh.pose[:, 0])).angle().abs())
    assert off.median() < 20  # absolute: the frame is that of the angles it learned from
    drawn = model.decode(encoding.z)
    target = 3 * phantom(box_px).expand(200, -1, -1, -1)
    assert (drawn - target).square().mean() < 0.1 * target.square().mean()
    exported = exported_poses(tmp_path, fresh, np.rad2deg(encoding.angle.numpy()))
    average, mirrored = (average_by_star(exported, fresh.images[:, 0].numpy(), sign) for sign in (1, -1))
    kept, mistaken = (view.var() / float(fresh.images.var()) for view in (average, mirrored))
    assert kept > 0.8 and mistaken < 0.7  # a good part of the phantom is round
    turn = torch.full((200,), 1.0)
    turned = model.encode(Batch(place(fresh.images, turn, mode="bicubic"), None, torch.arange(200)))
    difference = torch.exp(1j * (turned.angle - encoding.angle - 1.0)).angle().abs()
    assert torch.rad2deg(difference).median() < 15


def test_without_angles_turns_are_undone_relative_to_how_the_particles_lie() -> None:
    lies = 0.4 * torch.rand(400) - 0.2
    images = place(3 * phantom(24), lies, mode="bicubic")
    model = model_of(turn_range_deg=90)
    train(model, Posed(images, None), 200)
    model.eval()
    turn = torch.linspace(-1.4, 1.4, 100)
    _, direction = model.infer(place(images[:100], turn, mode="bicubic"))
    angle = torch.atan2(direction[:, 1], direction[:, 0])
    assert torch.corrcoef(torch.stack([angle, turn]))[0, 1] > 0.9
