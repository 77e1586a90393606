"""Sessions made to be looked at: small ones that are trained, and large ones whose images are a hole."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from particle_explorer import jobs
from particle_explorer.configs import ClassMapConfig, PreprocessConfig, RunConfig, SimulateConfig, TrainConfig
from particle_explorer.files import write_text
from particle_explorer.latents import Latents

if TYPE_CHECKING:
    from particle_explorer.session import Session


def small_session(path: Path, n: int, box_px: int, nodes_per_dim: int) -> Session:
    """`n` particles with a class map; 0 nodes along a dimension are as many as the map takes by itself."""
    session = _simulated(path, n, box_px)
    _fitted(session, training_words(session, nodes_per_dim))
    return session


def model_session(path: Path, kind: str, n: int, box_px: int) -> Session:
    """A few particles with a run of one kind; how well it learned does not change how long it draws."""
    session = _simulated(path, n, box_px)
    few = ["--model.nodes-per-dim", "4"] if kind == "class-map" else []
    few += ["--train.n-epochs", "1", "--device", "cpu"]
    _fitted(session, ["train", str(session.path), "--model.kind", kind, *few])
    return session


def _simulated(path: Path, n: int, box_px: int) -> Session:
    from particle_explorer.io.reading import read
    from particle_explorer.session import Session
    from particle_explorer.simulate import write

    config = SimulateConfig(n=n, box_px=box_px, pixel_size_A=256 / box_px, snr=0.3, seed=1)
    write(path / "stack", config)
    particles = read(next((path / "stack").glob("*.star")))
    return Session.create(path / "session", particles, PreprocessConfig(box_px=box_px))


def _fitted(session: Session, arguments: list[str]) -> None:
    folder = jobs.start(arguments, session.new_job("train"))
    while not (status := jobs.read_status(folder)).is_over:
        time.sleep(0.2)
    if status.state != "finished":
        raise RuntimeError(f"training ended as {status.state}: {status.error}\n{jobs.read_log(folder)}")


def training_words(session: Session, nodes_per_dim: int) -> list[str]:
    """The command that fits a class map for one epoch."""
    return [
        *("train", str(session.path), "--model.kind", "class-map", "--model.latent-dim", "2"),
        *("--model.nodes-per-dim", str(nodes_per_dim), "--train.n-epochs", "1", "--device", "cpu"),
    ]


def large_session(path: Path, small: Session, n: int, n_dims: int = 8) -> Session:
    """A session of `n` particles with latents: a table made longer, and an image cache that is a hole."""
    from particle_explorer.session import Session, SessionInfo

    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    table = small.table.iloc[np.arange(n) % small.n_particles].copy()
    table.index = pd.Index(rng.permutation(n).astype(np.uint64), name="uid")
    table["defocus_u_A"] = rng.uniform(8000, 25_000, n)
    table.to_parquet(path / "particles.parquet")
    info = SessionInfo(**{**small.info.model_dump(), "n": n})
    write_text(path / "session.json", info.model_dump_json())
    session = Session.open(path)
    shape = (n, *small.images.shape[1:])
    with (path / "images.npy").open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * int(np.prod(shape)))
    write_text(path / "images.json", json.dumps({"key": session.cache_key}))
    run = session.new_run(RunConfig(model=ClassMapConfig(), train=TrainConfig(), data=session.data_spec()))
    centres = rng.normal(size=(6, n_dims)) * 2
    z = (centres[rng.integers(0, 6, n)] + rng.normal(size=(n, n_dims))).astype(np.float32)
    run.save_latents(
        Latents(
            session.uid,
            z,
            angle_deg=rng.uniform(-180, 180, n).astype(np.float32),
            shift_yx_px=rng.normal(size=(n, 2)).astype(np.float32),
            extras={"log_likelihood": rng.normal(size=n).astype(np.float32)},
        )
    )
    clusters = pd.DataFrame({"cluster-kmeans": rng.integers(1, 11, n).astype(np.int32)}, index=table.index)
    run.write_column("cluster-kmeans", clusters, {})
    return session
