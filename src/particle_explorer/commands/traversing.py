"""Commands that walk through the map."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg

from particle_explorer.commands.command import Job, JobCommand, settings_of
from particle_explorer.commands.options import path_or_none
from particle_explorer.commands.runs import latents_of, open_run, run_poses
from particle_explorer.configs import TraverseConfig
from particle_explorer.files import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from particle_explorer.session import Run, Session


class Traverse(TraverseConfig, JobCommand):
    """Walk through the map of a run: a stack of pictures, the same way averaged from particles, a film."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    start: str = ""
    """Uid of the particle where `straight` and `particles` begin; by default at one end of the map"""
    end: str = ""
    """Uid of the particle where they end"""
    positions: str = ""
    """With `curve`: a .npy file of positions (m, d) on the way"""
    held: bool = False
    """Show everything with a part held still (hold-still)"""
    out: str = ""
    """Begin the names of the files with this; by default SESSION/paths/NAME"""
    formats: str = "mrcs"
    """Files to write: mrcs, gif, mp4, png (a contact sheet), separated by commas"""
    pictures_per_second: float = Field(8.0, gt=0, le=60)
    """Speed of films"""
    overwrite: bool = False
    """Replace the files if they are there"""

    def execute(self) -> None:
        """Walk, and print the paths of the files."""
        import json

        import numpy as np

        from particle_explorer.encoding import Drawer
        from particle_explorer.files import write_text
        from particle_explorer.io.writing import export_averages
        from particle_explorer.spectra import frc
        from particle_explorer.traversals import members

        formats = _formats(self.formats)
        with self.job("loading the model") as job:
            run = open_run(self.run, needs="weights")
            session, latents = run.session, latents_of(run)
            positions = _positions(self, run, latents.z)
            out = path_or_none(self.out) or _free_name(
                session.path / "paths", f"{run.name}-{self.along}", "mrcs"
            )
            if formats & {"gif", "mp4", "png"} and positions.shape[0] > 400:
                raise UserError(f"{len(positions)} pictures are too many for a film; at most 400")
            drawer = Drawer(run)
            job.tell("drawing")
            at_once = 64
            parts = []
            for first in range(0, len(positions), at_once):
                z = positions[first : first + at_once].astype(np.float32)
                parts.append(drawer.draw(z, None, None, self.held))
                job.tell_share("drawing")(min(1.0, (first + at_once) / len(positions)))
            stacks = [np.concatenate(parts).mean(1)]
            label = members(latents.z, positions, self.n_each)
            counts = np.bincount(label[label >= 0], minlength=len(positions))
            angle, shift = run_poses(run, self.held)
            if counts.any():
                stacks.append(_averages_of_cached(session, label, len(positions), angle, shift, job))
            agreement = []
            for drawn, real in zip(stacks[0], stacks[-1], strict=True):
                known = len(stacks) > 1 and np.isfinite(real).all()
                agreement.append(frc(drawn, real).round(4).tolist() if known else None)
            pixel_size_A = session.plan.cached_pixel_size_A
            written = []
            for kind in sorted(formats):
                if kind == "mrcs":
                    for name, stack in zip(("", "-particles"), stacks, strict=False):
                        path = out.parent / f"{out.name}{name}.mrcs"
                        path.parent.mkdir(parents=True, exist_ok=True)
                        export_averages(path, np.nan_to_num(stack), pixel_size_A, overwrite=self.overwrite)
                        written.append(path)
                else:
                    path = out.parent / f"{out.name}.{kind}"
                    _write_film(path, stacks, self.pictures_per_second, self.overwrite)
                    written.append(path)
            record = {
                "run": run.name,
                "config": settings_of(self, TraverseConfig),
                "held": self.held,
                "positions": np.round(positions, 6).tolist(),
                "n_particles": counts.tolist(),
                "uid": [
                    session.table.index[label == i].tolist() if count else []
                    for i, count in enumerate(counts)
                ],
                "frc": agreement,
            }
            path = out.parent / f"{out.name}.json"
            if path.exists() and not self.overwrite:
                raise UserError(
                    f"{path} exists already; choose another name or allow overwriting (--overwrite)"
                )
            write_text(path, json.dumps(record, indent=1) + "\n")
            job.result("\n".join(map(str, written)))


class Film(JobCommand):
    """Make a film, or a contact sheet, of an image stack such as traverse writes."""

    stack: CliPositionalArg[Path]
    """An image stack (.mrcs)"""
    beside: str = ""
    """A second stack, shown beside the first"""
    out: str
    """The file to write; its ending says what: .gif, .mp4, .png (a contact sheet) or .mrcs"""
    pictures_per_second: float = Field(8.0, gt=0, le=60)
    """Speed of films"""
    overwrite: bool = False
    """Replace the file if it is there"""

    def execute(self) -> None:
        """Write, and print the path of the file."""
        import numpy as np

        from particle_explorer.io.mrc import MrcFile
        from particle_explorer.io.writing import export_averages

        out = Path(self.out).absolute()
        kind = out.suffix[1:].lower()
        _formats(kind or "none")
        with self.job("writing the film") as job:
            stacks = []
            for path in (self.stack, *([Path(self.beside)] if self.beside else [])):
                file = MrcFile(path)
                stacks.append(file.read(np.arange(file.n_images))[:, 0])
            if len({stack.shape for stack in stacks}) > 1:
                shapes = " and ".join(str(stack.shape) for stack in stacks)
                raise UserError(f"the stacks have shapes {shapes}; a film shows equal ones beside each other")
            if kind == "mrcs":
                export_averages(out, stacks[0], MrcFile(self.stack).pixel_size_A, overwrite=self.overwrite)
            else:
                job.wait(lambda: _write_film(out, stacks, self.pictures_per_second, self.overwrite))
            job.result(out)


def _row_of(run: Run, uid: str, option: str) -> int:
    """The row of a particle in the latents of a run."""
    import numpy as np

    if not uid.isdigit():
        raise UserError(f"{option} {uid}: give the uid of a particle, a whole number")
    rows = np.flatnonzero(latents_of(run).uid == np.uint64(uid))
    if not rows.size:
        raise UserError(f"{option} {uid}: run {run.name} has no particle of that uid")
    return int(rows[0])


def _positions(command: Traverse, run: Run, z: NDArray[np.float32]) -> NDArray[np.float64]:
    """`(n, d)` positions of the way that a command asks for."""
    import numpy as np

    from particle_explorer import traversals

    n, kind = command.n_frames, command.along
    if kind == "curve":
        path = path_or_none(command.positions)
        if path is None:
            raise UserError("--along curve needs --positions FILE.npy with positions on the way")
        try:
            points = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a .npy file of positions: {error}") from error
        if points.ndim != 2 or points.shape[1] != z.shape[1] or not np.isfinite(points).all():
            raise UserError(
                f"{path} holds {points.shape}; positions of this run are (m, {z.shape[1]}) numbers"
            )
        return traversals.along_curve(points, n)
    good = z[np.isfinite(z).all(1)]
    middle = np.median(good, axis=0)
    if kind == "dimension":
        return traversals.along_dimension(good, command.number, middle, n)
    if kind == "component":
        return traversals.along_component(good, command.number, middle, n)
    prior = traversals.prior_of(run.config.model.kind, run.config.model.latent_dim)
    if kind == "grid":
        return traversals.grid(good, max(2, round(n**0.5)), prior)
    if kind == "prior":
        return traversals.samples(good, n, prior, command.seed)
    if bool(command.start) != bool(command.end):
        raise UserError(f"--along {kind} needs both --start UID and --end UID, or neither")
    if command.start:
        first, last = _row_of(run, command.start, "--start"), _row_of(run, command.end, "--end")
    else:
        line = traversals.along_component(good, 1, middle, 2)
        first, last = (int(np.nanargmin(((z - end) ** 2).sum(1))) for end in line)
    if kind == "straight":
        return traversals.straight(z[first], z[last], n)
    rows = np.flatnonzero(np.isfinite(z).all(1))
    ends = np.searchsorted(rows, [first, last])
    return traversals.along_graph(z[rows], int(ends[0]), int(ends[1]), n)[0]


def _averages_of_cached(
    session: Session,
    label: NDArray[np.int64],
    k: int,
    angle: NDArray[np.float64] | None,
    shift: NDArray[np.float64] | None,
    job: Job,
) -> NDArray[np.float32]:
    """`(k, m, m)` means of the cached images with each label, moved back by their poses; NaN for none."""
    import numpy as np

    from particle_explorer.preprocess import original_pixels
    from particle_explorer.spectra import align

    rows = np.flatnonzero(label >= 0)
    m = session.images.shape[-1]
    total, count = np.zeros((k, m, m)), np.zeros(k)
    scale = 1 / original_pixels(session.table, session.plan)
    tell = job.tell_share("averaging the particles along the way")
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        images = session.images.read(part)
        if angle is not None and shift is not None:
            images = align(images, angle[part], shift[part] * scale[part, None])
        np.add.at(total, label[part], images.mean(1))
        np.add.at(count, label[part], 1)
        tell((start + len(part)) / len(rows))
    with np.errstate(invalid="ignore"):
        return np.asarray(total / count[:, None, None], np.float32)


def _formats(text: str) -> set[str]:
    known = {"mrcs", "gif", "mp4", "png"}
    wanted = {part.strip() for part in text.split(",") if part.strip()}
    if not wanted or wanted - known:
        raise UserError(f"--formats {text}: choose from {', '.join(sorted(known))}, separated by commas")
    return wanted


def _write_film(path: Path, stacks: list[NDArray[np.float32]], per_second: float, overwrite: bool) -> None:
    """A film of stacks side by side, or a contact sheet; the ending says which."""
    from particle_explorer import movies
    from particle_explorer.files import replacing
    from particle_explorer.report import png_file

    if path.suffix == ".png":
        with replacing(path, overwrite=overwrite) as temporary:
            temporary.write_bytes(png_file(movies.contact_sheet(stacks), low=0, high=255))
        return
    write = movies.write_gif if path.suffix == ".gif" else movies.write_mp4
    write(path, movies.enlarged(movies.side_by_side(stacks)), per_second, overwrite=overwrite)


def _free_name(folder: Path, stem: str, suffix: str) -> Path:
    """FOLDER/STEM, or STEM-2, …: the first whose `.suffix` is not there."""
    names = [stem, *(f"{stem}-{i}" for i in range(2, 10_000))]
    return next(folder / name for name in names if not (folder / f"{name}.{suffix}").exists())
