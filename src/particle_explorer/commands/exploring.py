"""Commands that lay out and group particles, and hold a part of the picture still."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from pydantic_settings import CliPositionalArg

from particle_explorer.commands.command import JobCommand, settings_of
from particle_explorer.commands.options import numbers, whole_numbers
from particle_explorer.commands.runs import grouped, latents_of, open_run
from particle_explorer.configs import ClusterConfig, EmbedConfig
from particle_explorer.files import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from particle_explorer.session import Run


class Embed(EmbedConfig, JobCommand):
    """Lay the particles of a run out in two dimensions; a result to colour and select by."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""

    def execute(self) -> None:
        """Embed, and print the name of the result."""
        import pandas as pd

        from particle_explorer.latents import embed

        with self.job(f"{self.method} of the latent coordinates") as job:
            run = open_run(self.run)
            latents = latents_of(run)
            tell = job.tell_share(f"{self.method} of the latent coordinates")
            xy = job.wait(lambda: embed(latents.z, self, tell))
            index = pd.Index(latents.uid, name="uid")
            table = pd.DataFrame({f"{self.method}_{i}": xy[:, i] for i in range(2)}, index=index)
            job.result(run.write_column(self.method, table, settings_of(self, EmbedConfig)))


class Cluster(ClusterConfig, JobCommand):
    """Group the particles of a run by their latent coordinates; a result to average and export by."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    on: str = ""
    """Group the places in this layout, such as umap, instead of the latent coordinates"""

    def execute(self) -> None:
        """Cluster, and print the name of the result."""
        import pandas as pd

        from particle_explorer.latents import cluster

        with self.job("clustering the latent coordinates") as job:
            run = open_run(self.run)
            latents = latents_of(run)
            name = f"cluster-{self.method}"
            found: dict[str, Any] = {}
            z = _coordinates(run, self.on) if self.on else latents.z
            tell = job.tell_share("clustering")
            number = job.wait(lambda: cluster(z, self, tell, found))
            table = pd.DataFrame({name: number}, index=pd.Index(latents.uid, name="uid"))
            if "bic" in found:
                job.note(f"least BIC with {found['n_clusters']} Gaussians")
            job.result(
                run.write_column(name, table, {**settings_of(self, ClusterConfig), "on": self.on, **found})
            )


class Regroup(JobCommand):
    """Merge, split or name the groups of a clustering; the result is a clustering beside it."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    by: str = ""
    """The clustering; by default the newest"""
    merge: str = ""
    """Numbers of groups to make one, as 1,2"""
    split: int = Field(0, ge=0)
    """Number of a group to split by k-means"""
    n_parts: int = Field(2, ge=2, le=100)
    """With --split: into how many"""
    names: str = ""
    """Names of groups, as "1=open, 2=closed"; the clustering is then one of names"""

    def execute(self) -> None:
        """Make the new clustering, and print its name."""
        import numpy as np

        from particle_explorer.latents import merged, split

        if bool(self.merge) + bool(self.split) + bool(self.names) != 1:
            raise UserError("say what to do by one of --merge 1,2, --split 3 and --names '1=open, 2=closed'")
        with self.job("regrouping") as job:
            run = open_run(self.run)
            latents = latents_of(run)
            by = self.by or run.newest_column("cluster") or ""
            if by not in run.columns():
                there = ", ".join(name for name in run.columns() if name.startswith("cluster"))
                raise UserError(f"run {run.name} has no clustering {by!r}; there are: {there or 'none'}")
            column = run.column(by).reindex(latents.uid).iloc[:, 0]
            numbers, known = grouped(column, by)
            label = np.where(numbers < 0, 0, numbers + (known is not None))
            names = {} if known is None else {i + 1: name for i, name in enumerate(known)}
            if self.merge:
                wanted = whole_numbers(self.merge, "--merge")
                label = merged(label, wanted)
                names = {}
            elif self.split:
                label = split(label, self.split, latents.z, self.n_parts)
                names = {}
            else:
                names |= _named(self.names, label)
            table = _named_groups(label, names, latents.uid)
            how = {"of": by, "merge": self.merge, "split": self.split, "names": self.names}
            job.result(run.write_column("cluster-named" if names else "cluster-regrouped", table, how))


class HoldStill(JobCommand):
    """Turn and shift the map so that one part of the particle stays where it is; poses follow."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    auto: bool = False
    """Hold the most rigid part: the disc whose content changes least along the map"""
    disc_yxr_px: str = ""
    """Hold the disc Y,X,R: centre from the corner of the decoded image, and radius, in its pixels"""
    mask: str = ""
    """Hold the part where this image (.npy or .mrc, in the box of the decoded image) is not 0"""
    at: str = ""
    """The position on the map, as 0.2,-0.5, on whose picture the part was drawn; by default its middle"""
    undo: bool = False
    """Go back to what was held before, or to nothing"""

    def execute(self) -> None:
        """Fit the gauge, and print the path of the poses."""
        from particle_explorer.gauge import hold_still, undo

        if (self.auto + bool(self.disc_yxr_px) + bool(self.mask) + self.undo) != 1:
            raise UserError(
                "say what to hold still by one of --auto, --disc-yxr-px Y,X,R and --mask FILE, or --undo"
            )
        if self.undo:
            with self.job("going back") as job:
                run = open_run(self.run)
                job.result("nothing" if undo(run) is None else run.path / "columns" / "pose-held.parquet")
            return
        with self.job("holding a part still") as job:
            run = open_run(self.run)
            latents_of(run)
            gauge = hold_still(
                run,
                auto=self.auto,
                disc_yxr_px=_disc(self.disc_yxr_px) if self.disc_yxr_px else None,
                mask=_mask(Path(self.mask)) if self.mask else None,
                at=numbers(self.at, "--at") if self.at else None,
            )
            job.note(f"frames were turned by up to {gauge.largest_turn_deg:.0f}°")
            job.result(run.path / "columns" / "pose-held.parquet")


def _coordinates(run: Run, name: str) -> NDArray[np.float32]:
    """`(N, 2)` of an embedding, in the order of the run's latents."""
    import numpy as np

    if name not in run.columns() or run.column(name).shape[1] < 2:
        there = ", ".join(each for each in run.columns() if run.column(each).shape[1] == 2)
        raise UserError(f"run {run.name} has no embedding {name!r}; there are: {there or 'none'}")
    return run.column(name).reindex(latents_of(run).uid).to_numpy(np.float32)[:, :2]


def _named(text: str, label: NDArray[np.integer]) -> dict[int, str]:
    """ "1=open, 2=closed" as numbers and names."""
    names: dict[int, str] = {}
    for part in text.split(","):
        number, equal, name = (each.strip() for each in part.partition("="))
        if not equal or not number.isdigit() or not name:
            raise UserError(f"--names {text}: give NUMBER=NAME separated by commas, as 1=open, 2=closed")
        if int(number) not in label:
            raise UserError(f"--names {text}: there is no group {number}")
        names[int(number)] = name
    return names


def _named_groups(label: NDArray[np.integer], names: dict[int, str], uid: NDArray[np.uint64]) -> pd.DataFrame:
    """Groups as numbers, or, where some have names, as texts."""
    import pandas as pd

    index = pd.Index(uid, name="uid")
    if not names:
        return pd.DataFrame({"cluster-regrouped": label.astype("int32")}, index=index)
    words = [names.get(int(number), f"group {number}") for number in label]
    return pd.DataFrame({"cluster-named": pd.Categorical(words)}, index=index)


def _disc(text: str) -> tuple[float, float, float]:
    try:
        y, x, radius = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--disc-yxr-px {text}: give three numbers Y,X,R, as 20,31.5,8") from None
    return y, x, radius


def _mask(path: Path) -> NDArray[np.float32]:
    """A single image `(n, n)` of a .npy or .mrc file."""
    from particle_explorer.io.reading import read

    particles = read(path)
    if len(particles) != 1 or particles.images.n_channels != 1:
        raise UserError(f"{path} holds {len(particles)} images; a mask is one grey image")
    return particles.images[0][0]
