"""Several processes that train one model: they agree, and their curve is that of one process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from particle_explorer import team as team_module
from particle_explorer import training
from particle_explorer.configs import (
    ClassMapConfig,
    CODAEConfig,
    RotationAEConfig,
    RunConfig,
    SpatialVAEConfig,
    TrainConfig,
)
from particle_explorer.files import UserError
from particle_explorer.session import Run, Session
from particle_explorer.team import Place, Team, device_of, place_among_several
from particle_explorer.training import fit

MODELS: dict[str, Any] = {
    "codae": CODAEConfig(width=2),
    "rotation-ae": RotationAEConfig(latent_dim=3, critic_every=2, poses="self"),
    "class-map": ClassMapConfig(latent_dim=1, nodes_per_dim=4, angle_step_deg=30),
    "mirrored, wide shifts": ClassMapConfig(
        latent_dim=1, nodes_per_dim=3, angle_step_deg=30, mirror=True, shift_range_px=8
    ),
    "classes": ClassMapConfig(latent_dim=2, nodes_per_dim=3, angle_step_deg=30, varies="classes"),
    "hybrid": ClassMapConfig(latent_dim=4, nodes_per_dim=2, angle_step_deg=30),
    "spatial-vae": SpatialVAEConfig(hidden=16),
}


def new_run(session: Session, model: Any, **train: Any) -> Run:
    # 120 particles in batches of 50: the last is smaller, and odd shares are uneven
    train = {"n_epochs": 2, "batch_size": 50, "precision": "float32", **train}
    data = session.data_spec()
    return session.new_run(RunConfig(model=model, train=TrainConfig(**train), data=data, device="cpu"))


@pytest.fixture(autouse=True)
def _every_step(monkeypatch) -> None:
    monkeypatch.setattr(training, "LOG_S", 0.0)


def curve(run: Run) -> np.ndarray:
    """The losses of every step."""
    return run.metrics().drop(columns=["seconds", "images_per_second"]).to_numpy()


def assert_same_weights(one: Run, two: Run) -> None:
    first, second = (safetensors.torch.load_file(run.path / "model.safetensors") for run in (one, two))
    for name, value in first.items():
        if name == "gauge":
            continue  # registers frames of a map that is hardly fitted: rounding moves it
        torch.testing.assert_close(second[name].float(), value.float(), rtol=2e-2, atol=2e-3, msg=name)


@pytest.mark.parametrize("kind", ["codae", "class-map", "mirrored, wide shifts", "classes", "spatial-vae"])
def test_two_processes_train_as_one(tiny_session: Session, kind: str) -> None:
    one, two = (new_run(tiny_session, MODELS[kind], devices=n) for n in (1, 2))
    before = torch.get_num_threads()
    for run in (one, two):
        told = list(fit(run))
        assert told[-1].fraction == 1 and run.state == "finished"
    assert run.status.device.startswith("2 × CPU") and torch.get_num_threads() == before
    # that the two agree with each other was checked after every epoch: `Team.check_agreement`
    np.testing.assert_allclose(curve(two), curve(one), rtol=2e-3, atol=1e-5)
    assert_same_weights(one, two)
    assert not [path.name for path in two.path.iterdir() if path.name.startswith(".helper")]


@pytest.mark.parametrize("kind", ["codae", "hybrid"])
def test_processes_that_take_a_batch_in_parts_train_as_one_that_takes_it_whole(
    tiny_session: Session, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The parts are what fits into the memory of the process that has the least."""
    one, two = (new_run(tiny_session, MODELS[kind], devices=n) for n in (1, 2))
    list(fit(one))
    monkeypatch.setattr(training, "images_at_once", lambda *_: 16)  # in this process alone
    list(fit(two))
    np.testing.assert_allclose(curve(two), curve(one), rtol=2e-3, atol=1e-5)
    assert_same_weights(one, two)


def test_an_adversarial_team_that_is_stopped_and_resumed_trains_as_one(tiny_session: Session) -> None:
    whole, parts = (new_run(tiny_session, MODELS["rotation-ae"], devices=n) for n in (1, 2))
    list(fit(whole))
    stop = threading.Event()
    for progress in fit(parts, stop):
        if progress.epoch == 1:
            stop.set()
    assert parts.state == "stopped"
    np.testing.assert_allclose(curve(parts), curve(whole)[:3], rtol=2e-3, atol=1e-5)
    list(fit(parts, resume=True))
    resumed, expected = curve(parts), curve(whole)
    # the critic sits out the first step after resuming, so that it has nothing to tell and add there
    assert np.isnan(resumed[3]).any() and np.isfinite(np.delete(resumed, 3, 0)).all()
    np.testing.assert_allclose(np.delete(resumed, 3, 0), np.delete(expected, 3, 0), rtol=2e-3, atol=1e-5)
    assert_same_weights(whole, parts)


def test_an_adversarial_batch_in_parts_trains_as_one(tiny_session: Session, monkeypatch) -> None:
    runs, seen = [], []
    gradient = training._Fit._gradient

    def watched(fit: Any, index: Any, portions: Any, part: str) -> Any:
        seen.append(len(portions))
        losses = gradient(fit, index, portions, part)
        if len(seen) == 2:  # the first step of the critic does not fit, as is seen at its end
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return losses

    for at_once in (50, 16):
        monkeypatch.setattr(training, "images_at_once", lambda *_, at_once=at_once: at_once)
        if at_once == 16:
            monkeypatch.setattr(training._Fit, "_gradient", watched)
        runs.append(new_run(tiny_session, MODELS["rotation-ae"]))
        list(fit(runs[-1]))
    whole, parts = runs
    assert seen[:4] == [4, 4, 7, 7] and whole.state == parts.state == "finished"
    np.testing.assert_allclose(curve(parts), curve(whole), rtol=2e-3, atol=1e-5)
    assert_same_weights(whole, parts)


def test_content_has_the_range_of_the_batch_in_its_parts_too(tiny_session: Session, monkeypatch) -> None:
    runs = []
    for at_once in (50, 16):
        monkeypatch.setattr(training, "images_at_once", lambda *_, at_once=at_once: at_once)
        runs.append(new_run(tiny_session, MODELS["codae"]))
        list(fit(runs[-1]))
    np.testing.assert_allclose(curve(runs[1]), curve(runs[0]), rtol=2e-3, atol=1e-5)
    assert_same_weights(*runs)


def test_a_helper_that_dies_is_said_in_a_sentence(tiny_session: Session, monkeypatch) -> None:
    run = new_run(tiny_session, MODELS["rotation-ae"], devices=2)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="a process that helps with this training ended: exit status 1"):
        list(fit(run))
    assert run.state == "failed"


def slurm(rank: int) -> dict[str, str]:
    """What `srun` puts into the environment of one of two tasks on one node."""
    return {
        "SLURM_JOB_ID": PORT[-4:],
        "SLURM_JOB_NAME": "train",
        "SLURM_STEP_ID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_NNODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
    }


PORT = str(10000 + os.getpid() % 10000)


@pytest.mark.parametrize("by", ["torchrun", "srun"])
def test_a_cluster_starts_a_team_from_the_command_line(tiny_session: Session, by: str) -> None:
    command = [sys.executable]
    if by == "torchrun":
        command += ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", PORT]
    command += ["-m", "particle_explorer.cli", "train", str(tiny_session.path), "--model.kind", "rotation-ae"]
    command += [
        "--model.poses",
        "self",
        "--model.latent-dim",
        "2",
        "--train.n-epochs",
        "1",
        "--device",
        "cpu",
    ]
    tasks = [{}] if by == "torchrun" else [slurm(rank) for rank in range(2)]
    processes = [
        subprocess.Popen(command, env={**os.environ, **task}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for task in tasks
    ]
    said = [[text.decode() for text in process.communicate(timeout=120)] for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    (run,) = Session.open(tiny_session.path).runs()
    assert run.state == "finished" and run.config.train.devices == 2
    assert str(run.path) in said[0][0]
    if by == "srun":  # whoever helps has nothing to say
        assert said[1][0].strip() == ""


def test_a_batch_script_that_runs_once_is_no_team(monkeypatch) -> None:
    for name, value in slurm(0).items():
        monkeypatch.setenv(name, value)
    assert place_among_several() == Place(0, 2, 0, 2)
    monkeypatch.delenv("SLURM_STEP_ID")
    assert place_among_several() is None


@pytest.mark.parametrize(
    ("n_nodes", "n_tasks", "told"), [(4, 7, "2(x3),1"), (2, 4, "3,1"), (3, 6, "1,3,2"), (2, 3, "")]
)
def test_nodes_with_more_and_less_tasks_are_refused(
    monkeypatch: pytest.MonkeyPatch, n_nodes: int, n_tasks: int, told: str
) -> None:
    for name, value in slurm(0).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NNODES", str(n_nodes))
    monkeypatch.setenv("SLURM_NTASKS", str(n_tasks))
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", told)
    with pytest.raises(UserError, match=rf"{n_tasks} tasks on {n_nodes} nodes.*--ntasks-per-node") as refused:
        place_among_several()
    assert told in str(refused.value)
    for equal in ("3(x2)", "3,3"):
        monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", equal)
        monkeypatch.setenv("SLURM_NNODES", "2")
        monkeypatch.setenv("SLURM_NTASKS", "6")
        assert place_among_several() == Place(0, 6, 0, 3)


def test_without_fabric_a_sentence_says_what_to_install(tiny_session: Session, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    run = new_run(tiny_session, MODELS["codae"], devices=2)
    with pytest.raises(UserError, match=r"needs Lightning Fabric: pip install .*\[multi\]"):
        list(fit(run))


def test_shares_of_a_batch_are_all_of_it() -> None:
    for size in (1, 2, 3, 5):
        for n in (1, 2, 7, 10):
            portions = [Team(rank, size).portion(torch.arange(n)) for rank in range(size)]
            assert sum(weight for _, _, weight in portions) == pytest.approx(1)
            if size == 1 or n < size:
                assert all(share is None and len(mine) == n for mine, share, _ in portions)
            else:
                assert torch.cat([mine for mine, _, _ in portions]).tolist() == list(range(n))
                for mine, share, weight in portions:
                    assert share is not None and mine[0] == share.first and share.total == n
                    assert weight == pytest.approx(len(mine) / n)


def test_random_numbers_do_not_depend_on_the_number_of_processes() -> None:
    from particle_explorer.models.base import Share
    from particle_explorer.models.rotation_ae import RotationAE

    model = object.__new__(RotationAE)
    torch.nn.Module.__init__(model)
    torch.manual_seed(0)
    whole = model.drawn(torch.randn, 7, 2)
    parts = []
    for first, rows in ((0, 4), (4, 3)):
        torch.manual_seed(0)
        model.share = Share(first, 7)
        parts.append(model.drawn(torch.randn, rows, 2))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_devices_that_are_not_there_are_said_in_a_sentence(monkeypatch) -> None:
    first, second = Place(0, 2, 0, 2), Place(1, 2, 1, 2)
    assert device_of("auto", second) == torch.device("cpu")
    with pytest.raises(UserError, match=r"--train\.devices 2: torch finds no CUDA device here"):
        device_of("cuda", first)
    with pytest.raises(UserError, match="several devices are cuda or cpu"):
        device_of("cuda:1", first)
    monkeypatch.setattr(team_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(team_module.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="torch finds 1 CUDA device here"):
        device_of("auto", first)
