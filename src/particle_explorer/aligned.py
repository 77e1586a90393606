"""Particles turned and shifted in the pixels themselves, for programs that know no poses.

Poses in a star file lose nothing; this does: every image is interpolated once, and a CTF with beam tilt or
higher aberrations is no longer right. Astigmatism turns with the image: an image moved back by psi carries
its CTF with the angle of its defocus plus psi.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from particle_explorer.class_sets import StoredClasses
from particle_explorer.files import Stopped, UserError
from particle_explorer.io.mrc import write_stack_in_batches
from particle_explorer.io.writing import export_particles
from particle_explorer.session import Session
from particle_explorer.spectra import align, outside_circle
from particle_explorer.summing.work import Event

BLOCK = 32
WARNING = (
    "images were interpolated; exported poses without turned images lose nothing, so use these only where a "
    "program knows no poses"
)


def export_aligned(
    out: Path,
    session: Session,
    stored: StoredClasses,
    class_id: NDArray[np.int64],
    *,
    overwrite: bool = False,
    progress: Callable[[float], None] | None = None,
    stop: Event | None = None,
) -> list[str]:
    """Write the members of a class set as `out` (.star) and a stack beside it, moved back by their poses.

    Parameters
    ----------
    class_id
        `(k,)` number from 1 of every average. A particle of several is in that in which it counts most.

    Grey values keep their sign and background; angles and origins in the file are 0, classes are those of the
    set. Returns notes.
    """
    out = out.absolute()
    if out.suffix.lower() != ".star":
        raise UserError(
            f"{out} does not end in .star; aligned particles are a star file with a stack beside it"
        )
    stack_file = out.with_suffix(".mrcs")
    for path in (out, stack_file):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already; choose another name or allow overwriting (--overwrite)")
    if str(stack_file) in session.originals().paths:
        raise UserError(f"{stack_file} holds original images; choose another name")
    members = stored.members.iloc[np.argsort(-stored.members["weight"].to_numpy(float), kind="stable")]
    members = members[~members.index.duplicated()]
    rows = session.table.index.get_indexer(members.index)
    if (rows < 0).any():
        raise UserError("the averages were made of particles that this session does not have")
    members, rows = members.iloc[np.argsort(rows)], np.sort(rows)
    table = session.table.iloc[rows].copy()
    table = table.iloc[np.argsort(table["source_row"].to_numpy(), kind="stable")]
    members = members.loc[table.index]
    rows = session.table.index.get_indexer(table.index)
    boxes = np.unique(table["box_px"])
    if len(boxes) > 1 or session.scale is not None:
        raise UserError("aligned images of one stack have one box and pixel size; these have several")
    angle = members["angle_deg"].to_numpy(float)
    shift = members[["shift_y_px", "shift_x_px"]].to_numpy(float)
    outside = outside_circle(int(boxes[0]))
    originals = session.originals()
    if originals.n_channels > 1:
        raise UserError("images of several channels are not exported as an aligned stack")

    def moved() -> Iterator[NDArray[np.float32]]:
        for start in range(0, len(rows), BLOCK):
            if stop is not None and stop.is_set():
                raise Stopped("stopped; nothing was written")
            part = slice(start, start + BLOCK)
            images = originals.read(rows[part])
            level = images[..., outside].mean(-1)[..., None, None]
            yield (align(images - level, angle[part], shift[part]) + level)[:, 0]
            if progress is not None:
                progress(min(1.0, (start + BLOCK) / len(rows)))

    size = float(np.median(table["pixel_size_A"]))
    is_new = not stack_file.exists()
    write_stack_in_batches(stack_file, moved(), len(rows), int(boxes[0]), size, overwrite=overwrite)
    table["stack_path"], table["stack_index"] = str(stack_file), np.arange(len(table))
    table["source_row"] = np.arange(len(table))
    if "defocus_angle_deg" in table:
        table["defocus_angle_deg"] = (table["defocus_angle_deg"] - angle) % 180.0  # psi is -angle
    try:
        notes = export_particles(
            out,
            table=table,
            source=None,
            kind="mrc",
            class_id=class_id[members["average"].to_numpy(np.int64)],
            angle_deg=np.zeros(len(table)),
            shift_yx_px=np.zeros((len(table), 2)),
            overwrite=overwrite,
        )
    except BaseException:
        if is_new:  # a stack without its star file is half an export
            stack_file.unlink(missing_ok=True)
        raise
    return [WARNING, *notes]
