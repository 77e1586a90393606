"""What commands read of a run: latents, poses, groups and columns, with a sentence where one is missing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from particle_explorer.commands.command import PROGRAM
from particle_explorer.files import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from particle_explorer.class_sets import StoredClasses
    from particle_explorer.latents import Latents
    from particle_explorer.session import Run, Session


PoseSource = Literal["run", "held", "refined", "file"]


def open_run(path: Path, needs: Literal["", "weights"] = "") -> Run:
    """A run folder, or the newest finished run of a session folder."""
    from particle_explorer.session import Run, Session

    if Session.is_session(path):
        newest = Session.open(path).newest_finished_run()
        if newest is None:
            raise UserError(f"{path} has no finished run yet; train one with {PROGRAM} train {path}")
        return newest
    run = Run.open(path)
    if needs == "weights" and run.config.model.kind == "imported":
        raise UserError(f"run {run.name} has coordinates from a file and no model, so nothing can be drawn")
    if needs == "weights" and not run.has_weights:
        raise UserError(f"run {run.name} has no weights yet; its state is {run.state!r}")
    return run


def averages_of(session: Session, name: str) -> StoredClasses:
    """The averages of that name, or the newest."""
    name = name or session.classes.newest()
    if not name:
        raise UserError(f"{session.path} has no class averages yet; make some with {PROGRAM} average")
    return session.classes.read(name)


def latents_of(run: Run) -> Latents:
    """Latent coordinates and poses of a run that has come so far."""
    latents = run.latents()
    if latents is None:
        raise UserError(f"run {run.name} has no latents yet; its state is {run.state!r}")
    return latents


def run_poses(run: Run, held: bool) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Angle `(N,)` (°) and shift `(N, 2)` (px of the original) of all rows, or None where there are none."""
    if held:
        if "pose-held" not in run.columns():
            raise UserError(
                f"run {run.name} holds nothing still yet; run {PROGRAM} hold-still {run.path} --auto"
            )
        table = run.column("pose-held")
    else:
        table = latents_of(run).table
    table = table.reindex(run.session.table.index)
    angle = table["angle_deg"].to_numpy(float) if "angle_deg" in table else None
    has_shift = "shift_y_px" in table and "shift_x_px" in table
    return angle, table[["shift_y_px", "shift_x_px"]].to_numpy(float) if has_shift else None


def poses_of(run: Run, source: PoseSource) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Angle and shift of all rows from a source, see `Average.poses`."""
    if source in ("run", "held"):
        return run_poses(run, source == "held")
    columns = ["angle_deg", "shift_y_px", "shift_x_px"]
    if source == "refined":
        if "pose-refined" not in run.columns():
            raise UserError(f"run {run.name} has no refined poses yet; run {PROGRAM} refine {run.path}")
        table = run.column("pose-refined").reindex(run.session.table.index)
    else:
        table = run.session.table
        if any(name not in table for name in columns):
            raise UserError("the particle file carries no angles and shifts; choose the poses of the run")
    return table["angle_deg"].to_numpy(float), table[columns[1:]].to_numpy(float)


def labels_of(run: Run, by: str, selection: str) -> tuple[NDArray[np.int64], list[str] | None, str]:
    """Class of every row (-1: none), names of the classes, name of the grouping."""
    import numpy as np

    session = run.session
    mask = session.mask_of(selection)
    if selection and not by:
        if not mask.any():
            raise UserError(f"selection {selection!r} is empty; there is nothing to average")
        return np.where(mask, 0, -1), [selection], selection
    by = by or run.newest_column("cluster") or ""
    if not by:
        raise UserError("say what to average by --by COLUMN or --selection NAME, or cluster the run first")
    numbers, names = grouped(column_of(session, run, by), by)
    numbers = np.where(mask, numbers, -1)
    present = np.unique(numbers[numbers >= 0])
    return numbers, None if names is None else [names[i] for i in present], by


def column_of(session: Session, run: Run | None, name: str) -> pd.Series:
    """A column of a run's results or of the session's table."""
    features = run.features() if run is not None else session.table.iloc[:, :0]
    if name in features:
        return features[name]
    if name in session.table:
        return session.table[name]
    results = ", ".join(run.columns()) if run is not None else ""
    raise UserError(
        f"there is no column {name!r}; results of the run: {results or 'none'}; columns of the file:"
        f" {', '.join(map(str, session.table.columns))}"
    )


def grouped(column: pd.Series, name: str) -> tuple[NDArray[np.int64], list[str] | None]:
    """Whole numbers as they are, text numbered from 0; -1 where there is none."""
    import numpy as np
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column):
        values = column.to_numpy(float)
        known = np.isfinite(values)
        if not np.array_equal(values[known], np.round(values[known])):
            raise UserError(
                f"column {name!r} holds {values[known][0]:g} and other fractions; classes are whole numbers"
            )
        if known.any() and values[known].min() < 0:
            raise UserError(
                f"column {name!r} holds {values[known].min():g}; classes are numbered from 0 or 1"
            )
        return np.where(known, np.nan_to_num(values), -1).astype(np.int64), None
    codes, names = pd.factorize(column, sort=True)
    return codes.astype(np.int64), [str(value) for value in names]
