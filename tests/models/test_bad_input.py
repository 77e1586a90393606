"""What no model can be fitted to, or loaded from, is said in one clear sentence, whatever the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from particle_explorer.configs import ModelConfig, PreprocessConfig, RunConfig, TrainConfig
from particle_explorer.encoding import encode_stack, load_model
from particle_explorer.files import UserError
from particle_explorer.io.reading import read_array
from particle_explorer.session import Run, Session
from particle_explorer.training import fit

SMALL: dict[str, dict[str, object]] = {
    "class-map": {"latent_dim": 1, "nodes_per_dim": 3, "angle_step_deg": 30},
    "vae": {"hidden": 16},
    "hybrid": {"latent_dim": 4, "nodes_per_dim": 2, "angle_step_deg": 30},
    "spatial-vae": {"hidden": 16},
    "target-vae": {"channels": 4, "kernel_functions": 8, "features": 16, "hidden": 8, "rotations": "P4"},
    "codae": {"width": 2},
    "rotation-ae": {"latent_dim": 2},
}
CONFIGS = {config.model_fields["kind"].default: config for config in get_args(get_args(ModelConfig)[0])}
CONFIGS["hybrid"] = CONFIGS["class-map"]  # which is another model from four dimensions on
KINDS = list(SMALL)
NEXT = dict(zip(KINDS, [*KINDS[1:], KINDS[0]], strict=True))
"""Another kind for each"""


def noise(n: int, box_px: int = 24) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(n, box_px, box_px)).astype(np.float32)


def session_of(folder: Path, images: NDArray[np.float32], **settings: Any) -> Session:
    return Session.create(folder, read_array(images, "layer"), PreprocessConfig(**settings))


def new_run(session: Session, kind: str, *, device: str = "cpu", **settings: object) -> Run:
    model = CONFIGS[kind].model_validate({**SMALL[kind], **settings})
    train = TrainConfig(n_epochs=1, batch_size=6)
    return session.new_run(RunConfig(model=model, train=train, data=session.data_spec(), device=device))


def said(act: Callable[[], object]) -> str:
    """The sentence that `act` is refused with."""
    with pytest.raises(UserError) as refused:
        act()
    text = str(refused.value)
    assert 20 < len(text) < 400 and "\n" not in text and "Error" not in text, text
    return text


def refused_fit(run: Run, **options: Any) -> str:
    """The sentence that a fit is refused with: raised, and told to whoever watches the run."""
    text = said(lambda: list(fit(run, **options)))
    assert run.state == "failed" and text in run.status.error
    return text


def test_all_kinds_are_here() -> None:
    assert set(KINDS) == set(CONFIGS)


@pytest.fixture(scope="module")
def fitted_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each kind on 19 noise images that were 21: one was broken, one blank. Copy, do not change."""
    images = noise(21)
    images[3, 2, 2], images[7] = np.nan, 3.0
    session = session_of(tmp_path_factory.mktemp("fitted") / "s", images)
    runs = {kind: new_run(session, kind) for kind in KINDS}
    for run in runs.values():
        list(fit(run))  # the last batch is one particle
    return runs


@pytest.fixture
def fitted(fitted_runs: dict[str, Run], tmp_path: Path) -> Callable[[str], Run]:
    """A copy of the run of a kind."""
    first = next(iter(fitted_runs.values()))
    folder = tmp_path / "copy"
    shutil.copytree(first.session.path, folder)
    session = Session.open(folder)
    return lambda kind: session.run(fitted_runs[kind].name)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_and_blank_images_are_left_out_and_named(fitted_runs: dict[str, Run], kind: str) -> None:
    run = fitted_runs[kind]
    assert any("2 images (rows 4, 8 of the file) are blank or broken" in n for n in run.session.info.notes)
    latents = run.latents()
    assert latents is not None and len(latents.z) == 19 and np.isfinite(latents.z).all()
    assert all(value.isfinite().all() for value in load_model(run).state_dict().values())
    for value, words in ((np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (None, "is blank")):
        others = noise(5)
        others[2] = 1.0 if value is None else others[2]
        others[2, 4, 4] = others[2, 4, 4] if value is None else value
        stack = read_array(others, "others")
        text = said(lambda stack=stack: list(encode_stack(load_model(run), run.session, stack)))
        assert "row 3" in text and words in text and "leave it out" in text


@pytest.mark.parametrize("value", [3.0, np.nan])
def test_nothing_but_constant_or_broken_images_is_refused(tmp_path: Path, value: float) -> None:
    images = np.full((12, 24, 24), value, np.float32)
    text = said(lambda: session_of(tmp_path / "s", images))
    assert "none of the 12 images can be used" in text and not (tmp_path / "s").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_one_particle_is_refused(tmp_path: Path, kind: str) -> None:
    run = new_run(session_of(tmp_path / "s", noise(1)), kind)
    assert "has 1 particle to learn from" in refused_fit(run) and not run.has_weights
    two = new_run(session_of(tmp_path / "t", noise(2)), kind)
    list(fit(two))
    assert two.state == "finished"


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_too_small_is_refused_and_the_smallest_is_fitted(tmp_path: Path, kind: str) -> None:
    text = said(lambda: session_of(tmp_path / "s", noise(4, 7)))
    assert "too small to see anything in; 8 px or more" in text
    run = new_run(session_of(tmp_path / "t", noise(4, 8)), kind)
    list(fit(run))
    assert run.state == "finished"


@pytest.mark.parametrize(
    ("kind", "setting", "value", "right"),
    [
        ("target-vae", "kernel_px", 25, "at most 24 px"),
        ("target-vae", "shift_range_px", 13, "up to 12 px"),
        ("class-map", "shift_range_px", 13, "up to 12 px"),
        ("hybrid", "shift_range_px", 13, "up to 12 px"),
    ],
)
def test_a_kernel_or_search_wider_than_the_box_is_refused(
    tmp_path: Path, kind: str, setting: str, value: int, right: str
) -> None:
    session = session_of(tmp_path / "s", noise(4))
    text = refused_fit(new_run(session, kind, **{setting: value}))
    assert f"--model.{setting.replace('_', '-')} {value}" in text and "24 px" in text and right in text


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_checkpoints_of_another_model_are_refused(
    fitted: Callable[[str], Run], kind: str
) -> None:
    run, other = fitted(kind), fitted(NEXT[kind])
    called, theirs = (each.config.model.kind for each in (run, other))
    for name in ("model.safetensors", "resume.pt"):
        shutil.copy(other.path / name, run.path / name)
    text = said(lambda: load_model(run))
    assert str(run.path / "model.safetensors") in text and f"weights of this run's {called}" in text
    text = refused_fit(run, resume=True)
    assert str(run.path / "resume.pt") in text and "start a new run" in text
    assert f"of the model {theirs}, this run's is {called}" in text
    # written before checkpoints told their kind
    state = torch.load(run.path / "resume.pt", weights_only=True)
    del state["kind"]
    torch.save(state, run.path / "resume.pt")
    assert "cannot be resumed from" in refused_fit(run, resume=True)


@pytest.mark.parametrize(("kind", "other"), [("class-map", "hybrid"), ("hybrid", "class-map")])
def test_maps_of_few_and_of_many_dimensions_do_not_take_each_others_weights(
    fitted: Callable[[str], Run], kind: str, other: str
) -> None:
    run = fitted(kind)
    for name in ("model.safetensors", "resume.pt"):
        shutil.copy(fitted(other).path / name, run.path / name)
    assert str(run.path / "model.safetensors") in said(lambda: load_model(run))
    text = refused_fit(run, resume=True)
    assert str(run.path / "resume.pt") in text and "start a new run" in text


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_size_are_refused(fitted: Callable[[str], Run], kind: str) -> None:
    run = fitted(kind)
    config = json.loads((run.path / "config.json").read_text())
    dims = run.config.model.latent_dim
    config["model"]["latent_dim"] = dims + 1 if kind == "hybrid" else dims % 2 + 1
    (run.path / "config.json").write_text(json.dumps(config))
    changed = Session.open(run.session.path).run(run.name)
    assert "has the shape" in said(lambda: load_model(changed))
    assert "has the shape" in refused_fit(changed, resume=True)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_and_checkpoints_of_a_newer_version_are_refused(fitted: Callable[[str], Run], kind: str) -> None:
    run = fitted(kind)
    state = torch.load(run.path / "resume.pt", weights_only=True)
    torch.save({**state, "format_version": 2}, run.path / "resume.pt")
    text = refused_fit(run, resume=True)
    assert "format version 2, this program reads up to 1; install a newer" in text
    config = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps({**config, "format_version": 2}))
    newer = Session.open(run.session.path).run(run.name)
    assert "format version 2" in said(lambda: load_model(newer))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", [1, 2], {"format_version": 1}, {"epoch": 3}])
def test_what_is_no_checkpoint_is_refused(fitted: Callable[[str], Run], content: object) -> None:
    run = fitted("vae")
    if isinstance(content, bytes):
        (run.path / "resume.pt").write_bytes(content)
    else:
        torch.save(content, run.path / "resume.pt")
    assert "it is damaged, or no checkpoint" in refused_fit(run, resume=True)
    (run.path / "model.safetensors").write_bytes(b"no weights at all")
    assert "is damaged" in said(lambda: load_model(run))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_no_gpu_where_one_was_asked_for_is_said(tmp_path: Path, kind: str) -> None:
    session = session_of(tmp_path / "s", noise(4))
    for device in ("cuda", "cuda:1"):
        text = refused_fit(new_run(session, kind, device=device))
        assert text == f"--device {device}: torch finds no CUDA device here; choose --device auto or cpu"
