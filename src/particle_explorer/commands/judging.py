"""Commands that judge class averages, change them, compare them and report on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic_settings import CliPositionalArg

from particle_explorer.commands.command import Job, JobCommand
from particle_explorer.commands.runs import averages_of, labels_of, latents_of, open_run
from particle_explorer.files import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from particle_explorer.amending import Change
    from particle_explorer.class_sets import StoredClasses
    from particle_explorer.session import Session


class Examine(JobCommand):
    """Compare the members of class averages with their averages.

    How well each fits, where they differ from each other, what the model does not draw, mirror partners and
    symmetries."""

    session: CliPositionalArg[Path]
    """Folder of the session"""
    averages: str = ""
    """Name of the averages; by default the newest"""

    def execute(self) -> None:
        """Examine, and print the path of the members' table."""
        import pandas as pd

        from particle_explorer.examining import MIRRORED, examine
        from particle_explorer.session import Session

        with self.job("examining the averages") as job:
            session = Session.open(self.session)
            stored = averages_of(session, self.averages)
            z, drawn = _middle_pictures(session, stored, job)
            found = examine(
                session,
                stored.members,
                len(stored.classes),
                z,
                drawn,
                progress=job.tell_share("examining the averages"),
                stop=job.stop,
            )
            labels = [str(one["label"]) for one in stored.classes]
            words: list[dict[str, Any]] = [
                {
                    "mirror": {"of": labels[partner], "correlation": round(mirrored, 4)},
                    "symmetry": {"fold": fold, "correlation": round(turned, 4)},
                    "residual_of": "model" if drawn is not None else "halves",
                }
                for (partner, mirrored), (fold, turned) in zip(found.mirror, found.symmetry, strict=True)
            ]
            field = stored.pixel_size_A * stored.images.shape[-1]
            size = field / found.variance.shape[-1]
            columns = pd.DataFrame(found.members, index=stored.members.index)
            pictures = {"variance": found.variance, "residual": found.residual}
            session.classes.save_examined(stored.name, columns, words, pictures, size)
            for label, one in zip(labels, words, strict=True):
                partner, r = one["mirror"]["of"], one["mirror"]["correlation"]
                mirrored = f"its mirror image resembles {partner}" if r > MIRRORED else "no mirror partner"
                fold = one["symmetry"]["fold"]
                job.note(f"{label}: {mirrored} (r {r:.3f}); " + (f"C{fold}" if fold > 1 else "no symmetry"))
            job.result(session.path / "classes" / f"{stored.name}.parquet")


def _middle_pictures(
    session: Session, stored: StoredClasses, job: Job
) -> tuple[NDArray[np.float64] | None, NDArray[np.float32] | None]:
    """Positions of all rows, and what the model draws at the mean position of each class; None where the run
    has none, or where the classes are not in its frame."""
    import numpy as np

    from particle_explorer.latents import latent_columns

    how = stored.how
    if str(how.get("run", "")) not in [run.name for run in session.runs()]:
        return None, None
    run = session.run(str(how["run"]))
    if not run.is_encoded:
        return None, None
    table = latents_of(run).table.reindex(session.table.index)
    z = table[latent_columns(table)].to_numpy(np.float64)
    if not run.has_weights or how.get("poses", "run") not in ("run", "held"):
        return z, None
    from particle_explorer.encoding import Drawer

    job.tell("drawing")
    rows = session.table.index.get_indexer(stored.members.index)
    average = stored.members["average"].to_numpy(np.int64)
    middles = np.stack([np.nanmean(z[rows[average == i]], axis=0) for i in range(len(stored.classes))])
    drawn = Drawer(run).draw(middles.astype(np.float32), None, None, how.get("poses") == "held")
    return z, drawn.mean(1)


class Amend(JobCommand):
    """Change class averages: leave members out, join, divide, rename and remove classes. Makes a new set."""

    session: CliPositionalArg[Path]
    """Folder of the session"""
    averages: str = ""
    """Name of the averages; by default the newest"""
    leave_out: str = ""
    """A text file with a uid on each line: particles to leave out"""
    join: str = ""
    """Classes that become one, by their captions: 2,5 or, for more than one, 2,5;7,8"""
    divide: str = ""
    """Class and number of parts, by where its members lie on the map: 3=2,4=3"""
    rename: str = ""
    """Class and its new caption: 3=open,4=closed"""
    remove: str = ""
    """Classes to leave out, by their captions: 4,7"""
    device: str = "auto"
    """What averages: auto, cpu, mps or cuda:N; auto takes a CUDA device where the images are many"""

    def execute(self) -> None:
        """Average what changed anew, and print the path of the new averages."""
        from particle_explorer.amending import amend
        from particle_explorer.session import Session
        from particle_explorer.summing import where

        with self.job("changing the averages") as job:
            where.check(self.device)
            session = Session.open(self.session)
            stored = averages_of(session, self.averages)
            change = self._change([str(one["label"]) for one in stored.classes])
            used = amend(
                session,
                stored.name,
                change,
                device=self.device,
                progress=job.tell_share("averaging"),
                stop=job.stop,
            )
            job.result(session.path / "classes" / f"{used}.mrcs")

    def _change(self, labels: list[str]) -> Change:
        import numpy as np

        from particle_explorer.amending import Change

        def place(label: str, option: str) -> int:
            if label.strip() not in labels:
                known = ", ".join(labels)
                raise UserError(f"{option}: there is no class {label.strip()!r}; there are {known}")
            return labels.index(label.strip())

        def pair(text: str, option: str) -> tuple[int, str]:
            label, equals, value = text.rpartition("=")
            if not equals or not value.strip():
                raise UserError(f"{option} {text}: write CLASS=VALUE")
            return place(label, option), value.strip()

        divide = {}
        for text in _parts(self.divide):
            i, parts = pair(text, "--divide")
            if not parts.isdecimal() or not 2 <= int(parts) <= 100:
                raise UserError(f"--divide {text}: parts are a whole number from 2 to 100")
            divide[i] = int(parts)
        uids = np.zeros(0, np.uint64)
        if self.leave_out:
            try:
                words = Path(self.leave_out).read_text(encoding="utf-8").split()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{self.leave_out} cannot be read as a list of uids: {error}") from error
            wrong = next((word for word in words if not word.isdecimal()), None)
            if wrong is not None:
                raise UserError(f"{self.leave_out} holds {wrong!r}; uids of particles are whole numbers")
            uids = np.array([int(word) for word in words], np.uint64)
        return Change(
            leave_out=uids,
            join=tuple(
                tuple(place(label, "--join") for label in _parts(group)) for group in _parts(self.join, ";")
            ),
            divide=divide,
            rename=dict(pair(text, "--rename") for text in _parts(self.rename)),
            remove=tuple(place(label, "--remove") for label in _parts(self.remove)),
        )


def _parts(text: str, between: str = ",") -> list[str]:
    return [part.strip() for part in text.split(between) if part.strip()]


class ReportClasses(JobCommand):
    """Write class averages as one HTML page: pictures, curves, counts, and settings to make them again."""

    session: CliPositionalArg[Path]
    """Folder of the session"""
    averages: str = ""
    """Name of the averages; by default the newest"""
    out: str
    """The .html file to write"""
    overwrite: bool = False
    """Replace the file if it is there"""

    def execute(self) -> None:
        """Write, and print the path of the page."""
        from particle_explorer.class_report import report
        from particle_explorer.files import replacing
        from particle_explorer.session import Session

        out = Path(self.out).absolute()
        if out.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"{out} does not end in .html")
        with self.job("writing the report") as job:
            session = Session.open(self.session)
            stored = averages_of(session, self.averages)
            with replacing(out, overwrite=self.overwrite) as temporary:
                temporary.write_text(report(session, stored), encoding="utf-8")
            job.result(out)


class ExportAligned(JobCommand):
    """Write the members of class averages turned and shifted in their pixels, as a star file and a stack.

    Exported poses lose nothing; this interpolates. It is for programs that know no poses."""

    session: CliPositionalArg[Path]
    """Folder of the session"""
    averages: str = ""
    """Name of the averages; by default the newest"""
    out: str
    """The .star file to write; the stack goes beside it"""
    overwrite: bool = False
    """Replace the files if they are there"""

    def execute(self) -> None:
        """Write, and print the path of the star file."""
        from particle_explorer.aligned import export_aligned
        from particle_explorer.io.class_files import class_numbers
        from particle_explorer.session import Session

        with self.job("turning the particles") as job:
            session = Session.open(self.session)
            stored = averages_of(session, self.averages)
            numbers = class_numbers([str(one["label"]) for one in stored.classes])
            notes = export_aligned(
                Path(self.out),
                session,
                stored,
                numbers,
                overwrite=self.overwrite,
                progress=job.tell_share("turning the particles"),
                stop=job.stop,
            )
            for note in notes:
                job.note(note)
            job.result(Path(self.out).absolute())


class CompareClasses(JobCommand):
    """Compare two sets of class averages: which class became which, and which particles stayed together."""

    session: CliPositionalArg[Path]
    """Folder of the session"""
    averages: str
    """Name of the first averages"""
    beside: str
    """Name of the second averages"""

    def execute(self) -> None:
        """Print a table, a line per class of the first set."""
        from particle_explorer.membership import labels_of_members, matched, together
        from particle_explorer.session import Session

        with self.job("comparing the averages") as job:
            session = Session.open(self.session)
            sets = [session.classes.read(name) for name in (self.averages, self.beside)]
            labels = [labels_of_members(session.table.index, one.members) for one in sets]
            captions = [[str(one["label"]) for one in stored.classes] for stored in sets]
            both = together(labels[0], labels[1])
            lines = [f"{self.averages:24} {self.beside:24} in both, of the first"]
            for one, other, count, share in matched(labels[0], labels[1]):
                lines.append(f"{captions[0][one]:24} {captions[1][other]:24} {count} ({share:.0%})")
            lines.append(
                f"of two particles that share a class of {self.averages}, {both['both']:.0%} share one of "
                f"{self.beside}; adjusted Rand index {both['rand']:.3f}, over {both['n']:.0f} particles"
            )
            job.result("\n".join(lines))


class Reproduce(JobCommand):
    """Train a run again from other seeds, group again, and say how often two particles stay together."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    by: str = ""
    """The grouping to be reproduced; by default the newest clustering"""
    seeds: int = Field(2, ge=1, le=20)
    """How many more trainings, with the seeds after that of the run"""

    def execute(self) -> None:
        """Train, group, write the column `reproduced`, and print its path."""
        import numpy as np
        import pandas as pd

        from particle_explorer import latents
        from particle_explorer.configs import ClusterConfig
        from particle_explorer.devices import stand_back
        from particle_explorer.files import Stopped
        from particle_explorer.membership import staying, together
        from particle_explorer.training import fit

        with self.job("training from other seeds") as job:
            run = open_run(self.run, needs="weights")
            session = run.session
            if self.status:
                stand_back()
            label, _, name = labels_of(run, self.by, "")
            kept = label >= 0
            k = len(np.unique(label[kept]))
            total, counts, found = np.zeros(len(label)), np.zeros(len(label)), []
            for number in range(1, self.seeds + 1):
                train = run.config.train.model_copy(update={"seed": run.config.train.seed + number})
                again = session.new_run(run.config.model_copy(update={"train": train, "parent": run.name}))
                for progress in fit(again, job.stop):
                    job.tell(f"training from seed {train.seed}", progress.fraction)
                if job.stop.is_set():
                    raise Stopped("stopped; nothing was written")
                table = latents_of(again).table.reindex(session.table.index)
                z = table[latents.latent_columns(table)].to_numpy(np.float32)
                good = kept & np.isfinite(z).all(1)
                other = np.full(len(label), -1)
                other[good] = latents.cluster(z[good], ClusterConfig(n_clusters=k))
                pairs = together(np.where(good, label, -1), other)
                found.append({"run": again.name, "seed": train.seed, **pairs})
                job.note(
                    f"{again.name}: of two particles in one class, {pairs['both']:.0%} share one again; "
                    f"adjusted Rand index {pairs['rand']:.3f}"
                )
                share = staying(label, other)
                total[good] += share[good]
                counts[good] += 1
            column = np.divide(total, counts, out=np.full(len(label), np.nan), where=counts > 0)
            table = pd.DataFrame({"stays-together": column.astype(np.float32)}, index=session.table.index)
            record = {"by": name, "n_clusters": k, "found": found}
            job.result(run.write_column("stays-together", table, record, replace=True))
