"""Latent coordinates and poses of particles, and what is computed from coordinates alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.configs import ClusterConfig, EmbedConfig
from particle_explorer.files import UserError, replacing

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Latents:
    """What a model says of `n` particles; angles in degrees, shifts in pixels of each particle's original."""

    uid: NDArray[np.uint64]
    """`(n,)`"""
    z: Array
    """`(n, d)`"""
    z_std: Array | None = None
    """`(n, d)` spread of the posterior"""
    angle_deg: Array | None = None
    """`(n,)` placement angle, see `pose`"""
    shift_yx_px: Array | None = None
    """`(n, 2)` placement shift"""
    extras: Mapping[str, Array] = field(default_factory=dict)
    """`(n,)` each: `log_likelihood`, `angle_std_deg`, `shift_std_px`, `pose_entropy`, `junk_probability`"""

    def __len__(self) -> int:
        return len(self.uid)

    @property
    def table(self) -> pd.DataFrame:
        """Indexed by uid: z_0, …, z_std_0, …, angle_deg, shift_y_px, shift_x_px and the extras."""
        columns = {f"z_{i}": self.z[:, i] for i in range(self.z.shape[1])}
        if self.z_std is not None:
            columns |= {f"z_std_{i}": self.z_std[:, i] for i in range(self.z_std.shape[1])}
        if self.angle_deg is not None:
            columns["angle_deg"] = self.angle_deg
        if self.shift_yx_px is not None:
            columns |= {"shift_y_px": self.shift_yx_px[:, 0], "shift_x_px": self.shift_yx_px[:, 1]}
        columns |= dict(self.extras)
        return pd.DataFrame(columns, index=pd.Index(self.uid, dtype=np.uint64, name="uid"))

    def write(self, path: Path, *, overwrite: bool = True) -> None:
        """Write the table as parquet."""
        with replacing(path, overwrite=overwrite) as temporary:
            self.table.to_parquet(temporary, compression="zstd")

    @classmethod
    def from_table(cls, table: pd.DataFrame) -> Latents:
        """Undo `table`."""
        z_names = latent_columns(table)
        std_names = [name.replace("z_", "z_std_") for name in z_names]
        has_std = all(name in table for name in std_names)
        has_angle = "angle_deg" in table
        has_shift = "shift_y_px" in table and "shift_x_px" in table
        taken = {*z_names, *std_names, "angle_deg", "shift_y_px", "shift_x_px"}
        return cls(
            uid=table.index.to_numpy(np.uint64),
            z=table[z_names].to_numpy(np.float32),
            z_std=table[std_names].to_numpy(np.float32) if has_std else None,
            angle_deg=table["angle_deg"].to_numpy(np.float32) if has_angle else None,
            shift_yx_px=table[["shift_y_px", "shift_x_px"]].to_numpy(np.float32) if has_shift else None,
            extras={str(name): table[name].to_numpy(np.float32) for name in table if name not in taken},
        )


def latent_columns(table: pd.DataFrame) -> list[str]:
    """The columns z_0, z_1, … of a table, in order."""
    numbers = [str(name)[2:] for name in table.columns if str(name).startswith("z_")]
    return [f"z_{number}" for number in sorted(int(number) for number in numbers if number.isdigit())]


class PCA(NamedTuple):
    """Principal components of `(n, d)` points."""

    scores: Array
    """`(n, d)` coordinates along the components"""
    components: Array
    """`(d, d)` one unit vector per row, widest first; the largest entry of each is positive"""
    mean: Array
    """`(d,)`"""
    share: Array
    """`(d,)` share of the variance"""


def pca(z: Array) -> PCA:
    """Principal components of `z` `(n, d)`."""
    z64 = np.asarray(z, np.float64)
    mean = z64.mean(0)
    covariance = np.atleast_2d(np.cov(z64, rowvar=False, bias=True))
    variance, vectors = np.linalg.eigh(covariance)
    variance, components = np.maximum(variance[::-1], 0.0), vectors.T[::-1]
    largest = components[np.arange(len(components)), np.abs(components).argmax(1)]
    components = components * np.where(largest < 0, -1.0, 1.0)[:, None]
    scores = (z64 - mean) @ components.T
    share = variance / max(variance.sum(), np.finfo(float).tiny)
    return PCA(*(part.astype(np.float32) for part in (scores, components, mean, share)))


def embed(z: Array, config: EmbedConfig) -> Array:
    """`(n, d)` latent coordinates → `(n, 2)` picture coordinates; the same seed gives the same picture."""
    _check_finite(z)
    if config.method == "pca":
        scores = pca(z).scores[:, :2]
        return np.pad(scores, ((0, 0), (0, 2 - scores.shape[1])))
    if len(z) <= config.n_neighbours:
        raise UserError(
            f"{len(z)} particles are too few for UMAP with {config.n_neighbours} neighbours;"
            f" choose --n-neighbours below {len(z)} or --method pca"
        )
    from umap import UMAP

    # one job: several threads would make the picture differ from one run to the next
    reducer = UMAP(
        n_neighbors=config.n_neighbours, min_dist=config.min_distance, random_state=config.seed, n_jobs=1
    )
    return np.asarray(reducer.fit_transform(np.asarray(z, np.float32)), np.float32)


def cluster(z: Array, config: ClusterConfig) -> NDArray[np.int32]:
    """`(n, d)` → `(n,)` cluster numbers from 1, counted along the widest direction of the cluster centres."""
    _check_finite(z)
    if len(z) < config.n_clusters:
        raise UserError(f"{len(z)} particles cannot make {config.n_clusters} clusters; ask for fewer")
    from sklearn.cluster import KMeans

    fitted = KMeans(config.n_clusters, n_init=4, random_state=config.seed).fit(np.asarray(z, np.float32))
    centres = np.asarray(fitted.cluster_centers_, np.float32)
    order = np.argsort(pca(centres).scores[:, 0], kind="stable")
    number = np.empty(len(order), np.int32)
    number[order] = np.arange(1, len(order) + 1)
    return number[fitted.labels_]


def _check_finite(z: Array) -> None:
    bad = np.flatnonzero(~np.isfinite(z).all(1))
    if bad.size:
        raise UserError(f"the latent coordinates of row {bad[0]} are not numbers; encode the run again")
