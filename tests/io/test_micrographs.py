"""Where particles lie on their micrographs, and micrographs as pictures."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest

from particle_explorer.files import UserError
from particle_explorer.io.micrographs import MOST_PX, Locations, find, read


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path) as file:
        file.set_data(pixels)
    return path


def table(**columns: object) -> pd.DataFrame:
    base = {
        "pixel_size_A": [2.0, 2.0, 2.0],
        "box_px": [64, 64, 64],
        "micrograph": ["b.mrc", "a.mrc", "b.mrc"],
    }
    return pd.DataFrame({**base, **columns})


def test_places_of_both_programs_are_the_same() -> None:
    xy = np.array([[100.0, 40.0], [5.0, 6.0], [640.0, 320.0]])
    star = table(rlnCoordinateX=xy[:, 0], rlnCoordinateY=xy[:, 1], rlnMicrographPixelSize=[1.0] * 3)
    cs = table(
        **{
            "location/center_x_frac": xy[:, 0] / 800,
            "location/center_y_frac": xy[:, 1] / 400,
            "location/micrograph_shape[0]": [400] * 3,
            "location/micrograph_shape[1]": [800] * 3,
            "location/micrograph_psize_A": [1.0] * 3,
        }
    )
    for found in (Locations.of(star, "one.star"), Locations.of(cs, "one.cs")):
        assert found.names == ("b.mrc", "a.mrc") and found.micrograph.tolist() == [0, 1, 0]
        np.testing.assert_allclose(found.xy_px, xy)
        np.testing.assert_allclose(found.size_px, 128, err_msg="64 px of 2 Å are 128 px of 1 Å")
        assert found.counts(np.array([True, False, True])).tolist() == [2, 0]


def test_what_a_file_does_not_say_is_said() -> None:
    with pytest.raises(UserError, match=r"one\.star does not say which micrographs"):
        Locations.of(table().drop(columns="micrograph"), "one.star")
    with pytest.raises(UserError, match=r"one\.star does not say where"):
        Locations.of(table(), "one.star")


def test_a_micrograph_need_not_be_square_and_large_ones_are_averaged_down(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = rng.normal(size=(60, 90)).astype(np.float32)
    picture = read(write(tmp_path / "small.mrc", small))
    np.testing.assert_array_equal(picture.pixels, small)
    assert picture.binning == 1 and small.min() <= picture.limits[0] < picture.limits[1] <= small.max()
    large = np.zeros((40, 2 * MOST_PX + 2), np.int16)
    large[9:12, 300:303] = 90
    picture = read(write(tmp_path / "large.mrc", large))
    assert picture.binning == 3 and picture.pixels.shape == (13, (2 * MOST_PX + 2) // 3)
    assert picture.pixels[3, 100] == 90 and picture.pixels.sum() == 90
    (tmp_path / "one.jpg").touch()
    with pytest.raises(UserError, match="not an MRC file"):
        read(tmp_path / "one.jpg")


def test_micrographs_are_found_from_the_project_or_from_the_stacks(tmp_path: Path) -> None:
    there = write(tmp_path / "project" / "MotionCorr" / "one.mrc", np.zeros((4, 6), np.float32))
    star = tmp_path / "project" / "Extract" / "job7" / "particles.star"
    elsewhere = tmp_path / "mail" / "particles.star"
    stack = tmp_path / "project" / "Extract" / "job7" / "one.mrcs"
    assert find("MotionCorr/one.mrc", star, Path("/")) == there
    assert find("MotionCorr/one.mrc", elsewhere, stack) == there
    assert find("MotionCorr/two.mrc", star, stack) is None
