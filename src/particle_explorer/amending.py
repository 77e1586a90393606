"""Class sets changed by hand: members left out, classes joined, divided and renamed.

A change makes a new set beside the old one. Classes that it leaves alone are copied; the others are averaged
anew from the originals, at the poses that their members were averaged at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

from particle_explorer.averaging import ClassAverage, average_members
from particle_explorer.class_sets import StoredClasses
from particle_explorer.configs import AverageConfig
from particle_explorer.files import UserError
from particle_explorer.session import Session
from particle_explorer.summing.work import Event, Members, Progress

Floats = NDArray[np.float64]


class Change(NamedTuple):
    """Classes by their place in the set, from 0."""

    leave_out: NDArray[np.uint64]
    """Particles that are in no class any more"""
    join: tuple[tuple[int, ...], ...] = ()
    """Each becomes one class, at the place of its first"""
    divide: Mapping[int, int] = {}
    """Class → in how many parts, by the positions of its members on the map"""
    rename: Mapping[int, str] = {}
    remove: tuple[int, ...] = ()


def amended(stored: StoredClasses, change: Change, z: pd.DataFrame | None) -> tuple[pd.DataFrame, list[str]]:
    """Members `(uid; average, weight, poses)` and labels after a change; `z` are positions by uid.

    A class nobody is left in is gone.
    """
    k = len(stored.classes)
    labels = [str(one["label"]) for one in stored.classes]
    _check(stored.name, k, change)
    members = stored.members[~stored.members.index.isin(change.leave_out)].copy()
    number = members["average"].to_numpy(np.int64).copy()
    if change.join and stored.how.get("poses") == "independent":
        raise UserError("averages of independent halves have a frame each; they cannot be joined")
    names: dict[int, str] = dict(enumerate(labels)) | dict(change.rename)
    order = {i: (i, 0) for i in range(k)}
    for group in change.join:
        number[np.isin(number, group)] = group[0]
        if group[0] not in change.rename:
            names[group[0]] = "+".join(labels[i] for i in group)
    next_free = k
    for i, parts in change.divide.items():
        if z is None:
            raise UserError("the run of these averages has no positions on a map; classes cannot be divided")
        own = np.flatnonzero(number == i)
        place = z.reindex(members.index[own]).to_numpy(float)
        part = _divided(place, parts, names[i])
        for p in range(1, parts):
            number[own[part == p]] = next_free
            names[next_free], order[next_free] = f"{names[i]}.{p + 1}", (i, p)
            next_free += 1
        names[i] = f"{names[i]}.1"
    kept = np.isin(number, change.remove, invert=True)
    members, number = members[kept], number[kept]
    present = sorted(np.unique(number).tolist(), key=lambda i: order[i])
    if not present:
        raise UserError("nothing would be left of these averages")
    found = [names[i] for i in present]
    if len(set(found)) < len(found):
        double = next(name for name in found if found.count(name) > 1)
        raise UserError(f"two classes would be called {double!r}; choose another name")
    place = {old: new for new, old in enumerate(present)}
    members["average"] = np.array([place[i] for i in number.tolist()], np.int64)
    # a particle that was in two classes that are one now, where it counted most
    members = members.sort_values("weight", ascending=False, kind="stable")
    doubled = pd.MultiIndex.from_arrays([members.index, members["average"]]).duplicated()
    return members[~doubled].sort_values("average", kind="stable"), found


def _check(name: str, k: int, change: Change) -> None:
    used = [*change.divide, *change.rename, *change.remove, *(i for group in change.join for i in group)]
    for i in used:
        if not 0 <= i < k:
            raise UserError(f"{name} has no average number {i + 1}; it has {k}")
    joined = [i for group in change.join for i in group]
    if len(set(joined)) < len(joined) or any(len(group) < 2 for group in change.join):
        raise UserError("joining takes two classes or more, each once")
    if set(joined) & set(change.divide):
        raise UserError("a class cannot be joined and divided at once")


def _divided(place: Floats, parts: int, name: str) -> NDArray[np.int64]:
    """`(m,)` part of every member, in the order of the first direction in which they spread."""
    good = np.isfinite(place).all(1)
    if parts < 2 or good.sum() < 2 * parts:
        raise UserError(f"class {name} has {len(place)} members; they cannot make {parts} parts")
    centres, found = kmeans2(place[good], parts, minit="++", seed=0, missing="warn")
    if len(np.unique(found)) < parts:
        raise UserError(f"the members of class {name} do not fall into {parts} parts on the map")
    spread = place[good] - place[good].mean(0)
    axis = np.linalg.svd(spread, full_matrices=False)[2][0]
    axis = axis * np.sign(axis[np.argmax(np.abs(axis))])
    rank = np.empty(parts, np.int64)
    rank[np.argsort(centres @ axis)] = np.arange(parts)
    part = np.zeros(len(place), np.int64)
    part[good] = rank[found]
    return part


def amend(
    session: Session,
    name: str,
    change: Change,
    *,
    device: str = "auto",
    progress: Progress | None = None,
    stop: Event | None = None,
) -> str:
    """Make the changed set; returns its name, NAME-2 …"""
    stored = session.classes.read(name)
    if not {"angle_deg", "shift_y_px", "shift_x_px", "weight"} <= set(stored.members):
        raise UserError("these averages were made by an older version, without poses; average again")
    members, labels = amended(stored, change, _positions(session, stored))
    before = {
        tuple(np.sort(own.index.to_numpy()).tolist()): int(i) for i, own in stored.members.groupby("average")
    }
    copies: dict[int, int] = {}
    for i, own in members.groupby("average"):
        old = before.get(tuple(np.sort(own.index.to_numpy()).tolist()))
        if old is not None:
            copies[int(i)] = old
    anew = [i for i in range(len(labels)) if i not in copies]
    made = _averaged(session, stored, members, anew, device, progress, stop) if anew else []
    averages = dict(zip(anew, made, strict=True))
    how = {**stored.how, "from": name, "changed": described(stored, change)}
    return session.classes.save_changed(stored, members, labels, averages, copies, how)


def _positions(session: Session, stored: StoredClasses) -> pd.DataFrame | None:
    run = str(stored.how.get("run", ""))
    if run not in [one.name for one in session.runs()]:
        return None
    latents = session.run(run).latents()
    if latents is None:
        return None
    return pd.DataFrame(latents.z, index=pd.Index(latents.uid, name="uid"))


def _averaged(
    session: Session,
    stored: StoredClasses,
    members: pd.DataFrame,
    which: Sequence[int],
    device: str,
    progress: Progress | None,
    stop: Event | None,
) -> list[ClassAverage]:
    own = members[members["average"].isin(which)]
    rows = pd.Index(session.uid).get_indexer(own.index)
    n = session.n_particles
    angle, shift = np.full(n, np.nan), np.full((n, 2), np.nan)
    angle[rows] = own["angle_deg"].to_numpy(float)
    shift[rows] = own[["shift_y_px", "shift_x_px"]].to_numpy(float)
    place = {old: new for new, old in enumerate(which)}
    config = AverageConfig(**stored.how["config"]) if stored.how.get("config") else AverageConfig()
    return average_members(
        session,
        Members(rows, np.array([place[i] for i in own["average"]]), own["weight"].to_numpy(float)),
        [str(i) for i in which],
        angle,
        shift,
        config,
        device=device,
        progress=progress,
        stop=stop,
    )


def described(stored: StoredClasses, change: Change) -> dict[str, Any]:
    """What was changed, by the captions of the set before."""
    labels = [str(one["label"]) for one in stored.classes]
    return {
        "left_out": [str(uid) for uid in change.leave_out.tolist()],
        "joined": [[labels[i] for i in group] for group in change.join],
        "divided": {labels[i]: parts for i, parts in change.divide.items()},
        "renamed": {labels[i]: name for i, name in change.rename.items()},
        "removed": [labels[i] for i in change.remove],
    }
