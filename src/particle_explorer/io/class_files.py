"""Class averages as the files of a RELION 2D classification, and as templates of cryoSPARC.

RELION's class display opens `run_it000_model.star`, numbers the classes by the order of its rows and looks
for `run_it000_data.star` beside it (`displayer.cpp`); `_optimiser.star` names both.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.io import cryosparc, cs_writing
from particle_explorer.io.mrc import MrcFile, write_stack
from particle_explorer.io.star import StarFile, format_block, quoted
from particle_explorer.particles import make_uids

ROOT = "run_it000"
STACK = f"{ROOT}_classes.mrcs"
NOT_ESTIMATED = 999.0
"""What RELION writes for an accuracy or resolution that it has not estimated."""


@dataclass(frozen=True)
class ClassSet:
    """Averages by class number; row `i` is class `i + 1`, empty ones included."""

    images: NDArray[np.float32]
    """`(k, n, n)`"""
    counts: NDArray[np.int64]
    """`(k,)` particles of each class; 0 for one that is empty"""
    resolution_A: NDArray[np.float64]
    """`(k,)`, not finite where it is not known"""
    chosen: NDArray[np.bool_]
    """`(k,)` classes to go on with; an empty one never is"""
    pixel_size_A: float
    """NaN where it is not known"""


def write_relion(folder: Path, classes: ClassSet, shown: str) -> None:
    """Averages, model, optimiser, chosen averages and selection into `folder`; `shown` is what the names in
    the files put before the names of the files: the folder as seen from the project, with a slash."""
    images, n = classes.images, classes.images.shape[-1]
    write_stack(folder / STACK, images, classes.pixel_size_A)
    table = pd.DataFrame(
        {
            "rlnReferenceImage": [f"{i:06d}@{shown}{STACK}" for i in range(1, len(images) + 1)],
            "rlnClassDistribution": classes.counts / max(1, classes.counts.sum()),
            "rlnAccuracyRotations": NOT_ESTIMATED,
            "rlnAccuracyTranslationsAngst": NOT_ESTIMATED,
            "rlnEstimatedResolution": np.where(
                np.isfinite(classes.resolution_A), classes.resolution_A, NOT_ESTIMATED
            ),
            "rlnOverallFourierCompleteness": np.where(classes.counts > 0, 1.0, 0.0),
            "rlnClassPriorOffsetX": 0.0,
            "rlnClassPriorOffsetY": 0.0,
        }
    )
    known = math.isfinite(classes.pixel_size_A)
    general = {
        "rlnReferenceDimensionality": "2",
        "rlnDataDimensionality": "2",
        "rlnOriginalImageSize": str(n),
        "rlnCurrentImageSize": str(n),
        "rlnPixelSize": f"{classes.pixel_size_A if known else 1.0:.6f}",
        "rlnNrClasses": str(len(images)),
        "rlnNrBodies": "1",
    }
    model = _pairs("model_general", general) + format_block("model_classes", table)
    _write(folder / f"{ROOT}_model.star", model)
    optimiser = {
        "rlnOutputRootName": quoted(f"{shown}run"),
        "rlnModelStarFile": quoted(f"{shown}{ROOT}_model.star"),
        "rlnExperimentalDataStarFile": quoted(f"{shown}{ROOT}_data.star"),
        "rlnCurrentIteration": "0",
        "rlnNumberOfIterations": "0",
    }
    _write(folder / f"{ROOT}_optimiser.star", _pairs("optimiser_general", optimiser))
    _write(folder / "class_averages.star", format_block("", table[classes.chosen]))
    selected = pd.DataFrame({"rlnSelected": classes.chosen.astype(int)})
    _write(folder / "backup_selection.star", format_block("", selected))
    _check_relion(folder, classes, table)


def _check_relion(folder: Path, classes: ClassSet, table: pd.DataFrame) -> None:
    """Read it as RELION does: rows in the order of the classes, images by their number in the stack."""
    back = MrcFile(folder / STACK).read(np.arange(len(classes.images)))[:, 0]
    star = StarFile(folder / f"{ROOT}_model.star")
    block = star.block("model_classes")
    if block is None or not np.array_equal(back, classes.images):
        raise RuntimeError(f"{folder} does not hold the averages that were to be written")
    names = star.table(block)["rlnReferenceImage"].tolist()
    if names != table["rlnReferenceImage"].tolist():
        raise RuntimeError(f"{star.path} does not name the averages in the order of their classes")


def write_templates(folder: Path, classes: ClassSet) -> None:
    """`templates.mrc`, `.cs` and `.csg`: the chosen classes, for *Import Result Group*."""
    filled = np.flatnonzero(classes.chosen)
    images, n = classes.images[filled], classes.images.shape[-1]
    write_stack(folder / "templates.mrc", images, classes.pixel_size_A)
    records = np.zeros(
        len(filled),
        [("uid", "<u8"), ("blob/path", "S14"), ("blob/idx", "<u4"), ("blob/shape", "<u4", (2,)),
         ("blob/psize_A", "<f4")],
    )  # fmt: skip
    records["uid"] = make_uids([f"class {number + 1} of {image.tobytes().hex()[:64]}" for number, image in
                                zip(filled.tolist(), images, strict=True)])  # fmt: skip
    records["blob/path"], records["blob/idx"] = b">templates.mrc", np.arange(len(filled))
    records["blob/shape"], records["blob/psize_A"] = n, classes.pixel_size_A
    with (folder / "templates.cs").open("wb") as file:
        cs_writing.write_records(file, records)
    created = datetime.datetime.now().isoformat(sep=" ", timespec="seconds")
    text = cs_writing.new_group(
        "template", "Class averages of particle explorer", {"templates.cs": ["blob"]}, len(filled), created
    )
    _write(folder / "templates.csg", text)
    if cryosparc.load(folder / "templates.cs").tobytes() != records.tobytes():
        raise RuntimeError(f"{folder} does not hold the templates that were to be written")


def class_numbers(labels: Sequence[str]) -> NDArray[np.int64]:
    """Numbers from 1 of averages by their captions: their own where those are whole numbers (from 0: one
    more), else in order."""
    if all(label.isdecimal() for label in labels):
        numbers = np.array([int(label) for label in labels], np.int64)
        if len(np.unique(numbers)) == len(numbers) and numbers.max() <= 10 * len(numbers) + 100:
            return numbers + (numbers.min() == 0)
    return np.arange(1, len(labels) + 1)


def _pairs(name: str, values: dict[str, str]) -> str:
    lines = ["", "# version 30001", "", f"data_{name}", ""]
    return "\n".join([*lines, *(f"_{label} {value}" for label, value in values.items())]) + "\n\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
