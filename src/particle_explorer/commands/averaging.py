"""Commands that average particles and refine their poses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from particle_explorer.commands.command import Job, JobCommand
from particle_explorer.commands.runs import PoseSource, labels_of, latents_of, open_run, poses_of
from particle_explorer.configs import AverageConfig, RefineConfig
from particle_explorer.files import Stopped, UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from particle_explorer.session import Run
    from particle_explorer.summing.work import Members


class Average(JobCommand):
    """Average the original full-size images by class, aligned with the poses of a run."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    by: str = ""
    """Column that gives the classes (a result such as cluster-kmeans, or a column of the file), `grid` for
    the cells of a grid over the map, or `near` for the particles nearest to --positions; by default the
    newest clustering"""
    selection: str = ""
    """Average only the particles of this named selection; without --by as one class"""
    cells: int = Field(6, ge=1, le=100)
    """With --by grid: cells along each of the first two dimensions of the map"""
    positions: str = ""
    """With --by near: a .npy file of positions (k, d), or the .json that `traverse` writes"""
    n_near: int = Field(50, ge=1, le=1_000_000)
    """With --by near: particles averaged at each position"""
    weights: Literal["hard", "distance", "posterior"] = "hard"
    """`hard` counts every member once; `distance` less the farther it lies from the middle of its average;
    `posterior` shares a particle between averages by the spread of its own position"""
    held: bool = False
    """Take the poses that hold a part still (hold-still) instead of the run's own; as --poses held"""
    poses: PoseSource = "run"
    """Whose poses move the images back: the run's, `held` with a part held still, `refined` by `refine`, or
    those that the file carried from RELION or cryoSPARC"""
    noise_control: bool = False
    """Also put noise through the same inference of poses and the same averaging: what the alignment alone
    puts into an average. Takes about as long again"""
    device: str = "auto"
    """What averages: auto, cpu, mps or cuda:N; auto takes a CUDA device where the images are many"""
    average: AverageConfig = AverageConfig()

    def execute(self) -> None:
        """Average, and print the path of the averages."""
        import numpy as np

        from particle_explorer.summing import where
        from particle_explorer.summing.work import Members

        with self.job("averaging") as job:
            where.check(self.device)
            run = open_run(self.run, needs="weights" if self.noise_control else "")
            session = run.session
            members, names, name, positions = members_of(self, run)
            source = "held" if self.held else self.poses
            averages = average_members_of(run, members, names, source, self.average, job, self.device)
            if self.noise_control:
                from particle_explorer.controls import noise_control
                from particle_explorer.devices import stand_back

                if self.status:
                    stand_back()
                present = np.array([names.index(average.label) for average in averages])
                kept = np.isin(members.average, present)
                which = np.searchsorted(present, members.average[kept])
                same = Members(members.row[kept], which, members.weight[kept])
                averages = noise_control(
                    run, same, averages, self.average, device=self.device, tell=job.tell, stop=job.stop
                )
            if positions is not None:  # a cell whose particles all count elsewhere has no average
                positions = positions[[names.index(average.label) for average in averages]]
            how: dict[str, Any] = {
                "run": run.name,
                "by": name if not self.selection or self.by else "",
                "selection": self.selection,
                "held": source == "held",
                "poses": source,
                "weights": self.weights,
                "positions": None if positions is None else positions.round(6).tolist(),
                "config": self.average.model_dump(),
            }
            other: PoseSource = "run" if source == "file" else "file"
            classes = np.full(len(session.table), -1)
            classes[members.row] = members.average
            apart = poses_apart(run, poses_of(run, source), other, classes)
            if apart is not None:
                how["apart"] = {"from": other, **apart}
                job.note(apart_words(other, apart))
            used = session.classes.save(name, averages, [average.label for average in averages], how)
            job.result(session.path / "classes" / f"{used}.mrcs")


def poses_apart(
    run: Run,
    poses: tuple[NDArray[np.float64] | None, NDArray[np.float64] | None],
    other: PoseSource,
    classes: NDArray[np.integer[Any]],
) -> dict[str, float] | None:
    """How far poses are from those of another source, frames joined class by class, shifts in pixels of the
    largest; None where either are unknown."""
    import numpy as np

    from particle_explorer.refining import compare

    session = run.session
    if other == "file" and not {"angle_deg", "shift_y_px", "shift_x_px"} <= set(session.table.columns):
        return None
    theirs = poses_of(run, other)
    if poses[0] is None or poses[1] is None or theirs[0] is None or theirs[1] is None:
        return None
    size = session.table["pixel_size_A"].to_numpy(float)
    unit = (size / size.max() if np.isfinite(size).all() else np.ones(len(size)))[:, None]
    try:
        found = compare(theirs[0], theirs[1] * unit, poses[0], poses[1] * unit, classes)
    except UserError:
        return None
    return found._asdict()


def apart_words(other: str, apart: dict[str, float]) -> str:
    """How far poses are from those of another source, in a line."""
    return (
        f"beside the poses of the {other}, frames joined class by class: angles {apart['median_deg']:.1f}° "
        f"apart, {apart['within_10_deg']:.0%} within 10°, shifts {apart['median_px']:.2f} px"
    )


class Independent(JobCommand):
    """Average two halves of the particles by two models that never saw each other's particles: the half-set
    FRC is then a resolution.

    The particles are split at random into the selections independent-a and independent-b, and the model of
    the run is fitted anew to either. Each half is grouped and averaged by its own model; every average of the
    first is then laid onto the one of the second that it resembles. Takes as long as two trainings of half
    the size; what is there already is not made again.
    """

    run: CliPositionalArg[Path]
    """Folder of the run whose settings are taken, or of a session for its newest finished run"""
    classes: int = Field(10, ge=1, le=200)
    """Averages of either half: parts of equal numbers along a map of one dimension, else k-means"""
    seed: int = Field(0, ge=0)
    """Of the split and of k-means"""
    device: str = "auto"
    """What averages: auto, cpu, mps or cuda:N; the models are trained where that of the run was"""
    average: AverageConfig = AverageConfig()

    def execute(self) -> None:
        """Fit what is missing, average, and print the path of the averages."""
        from particle_explorer import halves
        from particle_explorer.devices import stand_back
        from particle_explorer.summing import where

        with self.job("splitting the particles") as job:
            where.check(self.device)
            run = open_run(self.run, needs="weights")
            session = run.session
            if self.status:
                stand_back()
            halves.split(session, self.seed)
            runs = halves.runs_of_halves(run, job.tell, job.stop)
            found = halves.independent_averages(
                runs,
                self.classes,
                self.average,
                seed=self.seed,
                device=self.device,
                tell=job.tell,
                stop=job.stop,
            )
            how = {
                "run": run.name,
                "by": "",
                "selection": "",
                "held": False,
                "poses": "independent",
                "runs": [one.name for one in runs],
                "matches": [[a, b, round(r, 4)] for a, b, r in found.matches],
                "weights": "hard",
                "config": self.average.model_dump(),
            }
            job.note(halves.summary(found.averages))
            labels = [average.label for average in found.averages]
            used = session.classes.save("independent", found.averages, labels, how)
            job.result(session.path / "classes" / f"{used}.mrcs")


class Refine(JobCommand):
    """Refine angle and shift of every particle against its class average, or against what the model draws."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    by: str = ""
    """Column that gives the classes; by default the newest clustering"""
    selection: str = ""
    """Refine only the particles of this named selection; without --by as one class"""
    against: Literal["averages", "decoded"] = "averages"
    """`averages`: of the class, each half against the other; `decoded`: the picture that the model draws at
    the particle's place on the map"""
    poses: PoseSource = "run"
    """Poses to start from, see `average --poses`"""
    refine: RefineConfig = RefineConfig()

    def execute(self) -> None:
        """Refine, say how far poses moved, and print the name of the result."""
        import numpy as np
        import pandas as pd

        from particle_explorer.refining import refine

        with self.job("refining poses") as job:
            run = open_run(self.run, needs="weights" if self.against == "decoded" else "")
            angle, shift = poses_of(run, self.poses)
            if angle is None or shift is None:
                raise UserError(f"run {run.name} infers no poses; start from others with --poses file")
            references = None
            if self.against == "decoded":
                labels, references = _decoded_places(run, self.selection, self.poses == "held")
            else:
                labels, _, _ = labels_of(run, self.by, self.selection)
            found = refine(
                run.session,
                labels,
                angle,
                shift,
                self.refine,
                references=references,
                progress=job.tell_share("refining poses"),
                stop=job.stop,
            )
            classes = np.where(np.isfinite(found.angle_deg), labels, -1)
            table = pd.DataFrame(
                {
                    "angle_deg": found.angle_deg,
                    "shift_y_px": found.shift_yx_px[:, 0],
                    "shift_x_px": found.shift_yx_px[:, 1],
                    "pose-refined_moved_deg": found.moved_deg,
                    "pose-refined_moved_px": found.moved_px,
                    "pose-refined_correlation": found.correlation,
                },
                index=run.session.table.index,
            )
            record = {
                "by": self.by,
                "selection": self.selection,
                "against": self.against,
                "poses": self.poses,
                "config": self.refine.model_dump(),
                "history": found.history,
            }
            for i, step in enumerate(found.history):
                job.note(
                    f"iteration {i + 1}: angles moved by {step['median_deg']:.2f}° (95 % within "
                    f"{step['p95_deg']:.1f}°), shifts by {step['median_px']:.2f} px "
                    f"({step['p95_px']:.1f}); correlation {step['correlation']:.3f}"
                )
            if self.poses != "file":
                poses = found.angle_deg, found.shift_yx_px
                apart = poses_apart(run, poses, "file", classes)
                if apart is not None:
                    record["from_the_file"] = apart
                    job.note(apart_words("file", apart))
            job.result(run.write_column("pose-refined", table, record, replace=True))


def _decoded_places(run: Run, selection: str, held: bool) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest of at most 64 places of the map for every row, and what the model draws there."""
    import numpy as np
    from scipy.cluster.vq import kmeans2

    from particle_explorer.encoding import Drawer

    session = run.session
    mask = session.mask_of(selection)
    table = latents_of(run).table.reindex(session.table.index)
    z = table[[str(name) for name in table if re.fullmatch(r"z_\d+", str(name))]].to_numpy(float)
    rows = np.flatnonzero(mask & np.isfinite(z).all(1))
    if not len(rows):
        raise UserError("no particle has a position on the map")
    k = int(min(64, max(1, len(rows) // 20)))
    centres, place = kmeans2(z[rows], k, minit="++", seed=0, missing="warn")
    labels = np.full(len(z), -1, np.int64)
    labels[rows] = place
    pictures = Drawer(run).draw(centres.astype(np.float32), None, None, held)
    return labels, pictures.mean(1)


def members_of(command: Average, run: Run) -> tuple[Members, list[str], str, NDArray[np.float64] | None]:
    """Members, captions, name of the set and positions on the map (where there are any)."""
    import numpy as np

    from particle_explorer import membership

    session = run.session
    mask = session.mask_of(command.selection)
    if not mask.any():
        raise UserError(f"selection {command.selection!r} is empty; there is nothing to average")
    table = latents_of(run).table.reindex(session.table.index)
    z_names = [str(name) for name in table if re.fullmatch(r"z_\d+", str(name))]
    z = np.where(mask[:, None], table[z_names].to_numpy(float), np.nan)
    std_names = [name.replace("z_", "z_std_") for name in z_names]
    z_std = table[std_names].to_numpy(float) if all(name in table for name in std_names) else None
    if command.by == "grid":
        members, names, middles = membership.cells(z, command.cells, z_std, command.weights)
        return members, names, "grid", middles
    if command.by == "near":
        positions = _read_positions(command.positions, len(z_names))
        if command.weights == "posterior":
            raise UserError("--by near knows the weights hard and distance")
        members = membership.near(z, positions, command.n_near, command.weights)
        return members, [f"position {i + 1}" for i in range(len(positions))], "near", positions
    labels, given, name = labels_of(run, command.by, command.selection)
    members, classes = membership.by_class(labels, z, z_std, command.weights)
    return members, given or [str(c) for c in classes], name, None


def _read_positions(path: str, d: int) -> NDArray[np.float64]:
    import json

    import numpy as np

    if not path:
        raise UserError("--by near needs --positions FILE: a .npy file, or the .json that `traverse` writes")
    try:
        if path.endswith(".json"):
            found = np.asarray(json.loads(Path(path).read_text(encoding="utf-8"))["positions"], float)
        else:
            found = np.asarray(np.load(path, allow_pickle=False), float)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as positions on a map: {error}") from error
    if found.ndim != 2 or found.shape[1] != d or not np.isfinite(found).all():
        raise UserError(f"{path} holds {found.shape}; positions of this run are (k, {d}) finite numbers")
    return found


def average_members_of(
    run: Run,
    members: Members,
    names: list[str],
    poses: PoseSource,
    config: AverageConfig,
    job: Job,
    device: str = "auto",
) -> list[Any]:
    """The average of each set of members, from the original images at the poses of a source."""
    from particle_explorer.averaging import average_members

    angle, shift = poses_of(run, poses)
    try:
        return average_members(
            run.session,
            members,
            names,
            angle,
            shift,
            config,
            device=device,
            progress=lambda done: job.tell("averaging", done),
            stop=job.stop,
        )
    except Stopped:
        raise Stopped("stopped; nothing was written") from None
