"""Dimensions chosen by particles that were not fitted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from particle_explorer import choosing
from particle_explorer.choosing import choose
from particle_explorer.cli import main
from particle_explorer.configs import ClassMapConfig, PreprocessConfig, TrainConfig
from particle_explorer.files import Stopped, UserError
from particle_explorer.io.reading import read_array
from particle_explorer.models.build import build_model
from particle_explorer.session import Run, Session
from particle_explorer.transforms import place

Floats = NDArray[np.float64]
SMALL = ClassMapConfig(latent_dim=0, nodes_per_dim=3, angle_step_deg=30, junk=False)


def swinging(swings: Tensor) -> Tensor:
    """`(b, 20, 20)` a body with an arm for each column of `swings` (rad), of 0.3 of noise, at any angle."""
    random = torch.Generator().manual_seed(2)
    n = 20
    y, x = torch.meshgrid(torch.arange(n) - n // 2, torch.arange(n) - n // 2, indexing="ij")
    image = 1.2 * torch.exp(-(y**2 + x**2) / 8).expand(len(swings), n, n)
    for i, towards in enumerate((0.0, 2.6)[: swings.shape[1]]):
        angle = towards + swings[:, i, None, None]
        for reach in (3.5, 6.0):
            away = (y - reach * angle.sin()) ** 2 + (x - reach * angle.cos()) ** 2
            image = image + (1 - 0.3 * i) * torch.exp(-away / 3)
    angle = torch.rand(len(swings), generator=random) * 2 * math.pi
    images = place(image, angle, mode="fourier")
    return images + 0.3 * torch.randn(images.shape, generator=random)


def session_of(images: Tensor, path: Path) -> Session:
    particles = read_array(images.numpy().astype(np.float32), "swinging")
    return Session.create(path, particles, PreprocessConfig(contrast="keep"))


@pytest.mark.parametrize(
    ("gains", "side", "expected"),
    [
        # by dimensions and nodes per dimension: nats that a map explains more than a line of 24 classes
        ({(1, 24): 0.0, (1, 36): 0.1, (2, 12): 5.0, (2, 18): 5.1, (3, 7): 5.2}, 0, (2, 0)),
        ({(1, 24): 0.0, (1, 36): 4.0, (2, 12): 4.1, (3, 7): 3.0}, 0, (1, 36)),
        ({(1, 24): 0.0, (1, 36): 0.0, (2, 12): 9.0, (2, 18): 9.0, (3, 7): 30.0, (3, 10): 40.0}, 0, (3, 10)),
        ({(1, 5): 0.0, (2, 5): 3.0, (3, 5): 2.0}, 5, (2, 5)),
    ],
)
def test_a_larger_map_must_explain_more_than_by_chance(
    gains: dict[tuple[int, int], float],
    side: int,
    expected: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = np.random.default_rng(0)
    easy = random.normal(0, 30, 100)  # some particles are easier than others under every map
    asked: list[tuple[int, int]] = []

    def density(trial: choosing._Trial, config: ClassMapConfig) -> tuple[Floats, float, int]:
        assert len(trial.fitted) == 200 and len(trial.held_out) == 100 and trial.data.n_particles == 200
        nodes = config.nodes_per_dim or {1: 24, 2: 12, 3: 7}[config.latent_dim]
        asked.append((config.latent_dim, nodes))
        return easy + gains[asked[-1]] + random.normal(0, 1, 100), 50.0, nodes

    monkeypatch.setattr(choosing._Trial, "density", density)
    session = session_of(swinging(torch.zeros(300, 1)), tmp_path / "session")
    choice = choose(session, SMALL.model_copy(update={"nodes_per_dim": side}), TrainConfig())
    assert (choice.model.latent_dim, choice.model.nodes_per_dim) == expected
    assert asked == list(gains) == [(one.latent_dim, one.nodes_per_dim) for one in choice.candidates]
    for one in choice.candidates[1:]:
        assert one.gain_se == pytest.approx(0.14, rel=0.3)  # of differences: what is easy is so for all
        assert one.taken == (one.gain > 0.5)
    found = choice.to_json()
    assert json.loads(json.dumps(found)) == found and len(choice.lines()) == 1 + len(gains)


def test_the_command_line_chooses_and_the_run_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_of(swinging(torch.zeros(210, 1)), tmp_path / "session")
    words = "--model.latent-dim 0 --model.nodes-per-dim 2 --model.angle-step-deg 30 --train.n-epochs 1"
    assert main(["train", str(session.path), *words.split(), "--device", "cpu"]) == 0
    out, said = capsys.readouterr()
    run = Run.open(Path(out.split()[-1]))
    choice = json.loads((run.path / "choice.json").read_text())
    assert run.config.model.latent_dim == choice["latent_dim"] in (1, 2, 3)
    assert run.latents().z.shape == (210, choice["latent_dim"])
    assert "log density of 70 particles that were not among the 140 fitted" in said
    assert len(choice["candidates"]) == 3 and choice["candidates"][0]["gain"] == 0
    assert not list((session.path / "jobs").glob("*")) and run.state == "finished"


def test_few_particles_and_a_stop_are_refused(tmp_path: Path) -> None:
    session = session_of(swinging(torch.zeros(210, 1)), tmp_path / "session")
    with pytest.raises(UserError, match=r"latent-dim 0: 9 particles are too few .* at least 200"):
        choose(session, SMALL, TrainConfig(), where="source_row < 9")

    def stop(what: str, fraction: float) -> None:
        if what.startswith("trying"):
            raise Stopped("stopped; nothing was written")

    with pytest.raises(Stopped):
        choose(session, SMALL, TrainConfig(), tell=stop)
    with pytest.raises(UserError, match="latent-dim 0 leaves the dimensions to be chosen"):
        build_model(SMALL, session.data_spec())
