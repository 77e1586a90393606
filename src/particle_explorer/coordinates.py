"""Latent coordinates that another program found, as a run that is explored like our own.

There is no model behind them, so nothing can be drawn; poses are those of the particle file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer import __version__
from particle_explorer.configs import ImportedConfig, RunConfig
from particle_explorer.files import UserError
from particle_explorer.io import cryosparc, relion
from particle_explorer.io.star import StarFile
from particle_explorer.io.tables import read_table, uids
from particle_explorer.latents import Latents
from particle_explorer.particles import make_uids
from particle_explorer.session import Run, Session
from particle_explorer.status import StatusWriter

SUFFIXES = (".npy", ".npz", ".csv", ".tsv", ".parquet", ".star", ".cs")
_PICKLES = (".pkl", ".pickle", ".p", ".pt", ".pth")
_NO_COORDINATES = ("uid", "source_row", "class_id", "angle_deg", "shift_y_px", "shift_x_px", "blob/idx")
MOST_DIMENSIONS = 1024


def import_latents(session: Session, path: Path, columns: str = "") -> tuple[Run, list[str]]:
    """A finished run of the coordinates in `path`, and notes.

    `columns` names the ones to take, parted by commas; by default all that are coordinates by their names
    (`z_0`, `explorerZ0`, `explorer/z_0` …), else all that hold numbers. Rows are joined by `uid`, in star
    files by image name, else by order.
    """
    path = Path(path).absolute()
    table = _read(path, session.n_particles)
    names = [name.strip() for name in columns.split(",") if name.strip()] or _coordinates(path, table)
    missing = [name for name in names if name not in table]
    if missing:
        there = ", ".join(map(str, table.columns))
        raise UserError(f"{path} has no column {missing[0]!r}; there are {there}")
    if len(names) > MOST_DIMENSIONS:
        raise UserError(f"{path} holds {len(names)} columns of numbers; name the coordinates by --columns")
    table, how = _joined(table, session, path)
    z = _numbers(table[names], path)
    notes = [f"{z.shape[1]} coordinates ({', '.join(names[:8])}) of {len(z)} particles, joined by {how}"]
    particles = session.table
    angle = shift = None
    if {"angle_deg", "shift_y_px", "shift_x_px"} <= set(particles):
        angle = particles["angle_deg"].to_numpy(np.float32)
        shift = particles[["shift_y_px", "shift_x_px"]].to_numpy(np.float32)
        notes.append("averages take the angles and shifts of the particle file")
    else:
        notes.append("the particle file has no angles and shifts, so averages are of the images as they lie")
    run = session.new_run(
        RunConfig(
            model=ImportedConfig(latent_dim=z.shape[1], file=str(path), columns=tuple(names)),
            data=session.data_spec(),
            version=__version__,
        )
    )
    with StatusWriter(run.path):
        run.save_latents(Latents(session.uid, z, None, angle, shift))
    return run, notes


def _read(path: Path, n: int) -> pd.DataFrame:
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run any program when it is opened, so it is not; save the array "
            f"where you trust it: python -c \"import pickle, numpy; numpy.save('{path.stem}.npy', "
            f"pickle.load(open('{path.name}', 'rb')))\" and import {path.stem}.npy"
        )
    if suffix not in SUFFIXES:
        raise UserError(f"{path} holds no coordinates that are read here; give one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if suffix == ".star":
        star = StarFile(path)
        block = next((each for each in star.blocks if each.is_loop and each.name != "optics"), None)
        if any("rlnImageName" in each.labels for each in star.blocks):
            block = relion.particles_block(star)
        if block is None:
            raise UserError(f"{path} has no table")
        table = star.table(block)
        if "rlnImageName" in table:
            table["uid"] = make_uids(table["rlnImageName"].tolist())
        return table
    if suffix == ".cs":
        records = cryosparc.load(path)
        return cryosparc.flat({name: records[name] for name in records.dtype.names or ()}).assign(
            uid=records["uid"].astype(np.uint64)
        )
    table = read_table(path, n)
    if table.index.name == "uid":
        table = table.reset_index()
    return table


def _coordinates(path: Path, table: pd.DataFrame) -> list[str]:
    """The columns that are coordinates: by their names, else all numbers of a file that is a plain table."""
    names = [str(name) for name in table.columns]
    for prefix in ("z_", "explorerZ", "explorer/z_"):
        found = [name for name in names if name.startswith(prefix) and name[len(prefix) :].isdigit()]
        if found:
            return sorted(found, key=lambda name: int(name[len(prefix) :]))
    if path.suffix.lower() in (".star", ".cs"):
        raise UserError(
            f"say which columns of {path} are coordinates by --columns; there are {', '.join(names)}"
        )
    found = [
        name for name in names if name not in _NO_COORDINATES and pd.api.types.is_numeric_dtype(table[name])
    ]
    if not found:
        raise UserError(f"{path} holds no columns of numbers; it has {', '.join(names)}")
    return found


def _joined(table: pd.DataFrame, session: Session, path: Path) -> tuple[pd.DataFrame, str]:
    """The rows of the session's particles, in their order, and by what they were found."""
    n = session.n_particles
    if "uid" in table:
        uid = pd.Index(uids(table["uid"]))
        if uid.has_duplicates:
            raise UserError(f"{path} names uid {uid[uid.duplicated()][0]} twice")
        place = uid.get_indexer(pd.Index(session.uid))
        by_name = path.suffix.lower() == ".star"
        if (place >= 0).all():
            return table.iloc[place], "image name" if by_name else "uid"
        lost = int((place < 0).sum())
        if not by_name or lost < n:  # a star file of other names may still be in the same order
            raise UserError(
                f"{path} lacks {lost} of the {n} particles, the first of them in row "
                f"{int(np.flatnonzero(place < 0)[0]) + 1} of the session; make a session of those it has"
            )
    if len(table) != n:
        raise UserError(
            f"{path} has {len(table)} rows and the session {n} particles, so they cannot be joined by order; "
            "give a table with a column uid"
        )
    return table, "order"


def _numbers(table: pd.DataFrame, path: Path) -> NDArray[np.float32]:
    for name in table.columns:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise UserError(f"column {name!r} of {path} holds {table[name].iloc[0]!r}, which is not a number")
    z = table.to_numpy(np.float32)
    bad = np.flatnonzero(~np.isfinite(z).all(1))
    if len(bad):
        raise UserError(f"{path}: the coordinates of particle {int(bad[0]) + 1} are not finite numbers")
    return z
