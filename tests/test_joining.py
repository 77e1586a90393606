"""Joining star files, and moving what was found between extractions; the phantom tells what is right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import starfile
from numpy.typing import NDArray
from scipy import ndimage

from particle_explorer.cli import main
from particle_explorer.configs import PreprocessConfig
from particle_explorer.exporting import choose, export, recentred, transfer
from particle_explorer.files import Stopped, UserError
from particle_explorer.io import joining
from particle_explorer.io.joining import merge_stars
from particle_explorer.io.mrc import write_stack
from particle_explorer.io.reading import read
from particle_explorer.io.star import quoted
from particle_explorer.session import Session

K = 10
MICROGRAPH_A = 1.25
"""Pixel size of the micrographs."""
RNG = np.random.default_rng(8)
PSI_DEG = RNG.uniform(-180, 180, K)
AWAY_XY = RNG.uniform(-7, 7, (K, 2))
"""Where each particle really is, in micrograph pixels from its coordinate."""
COORDINATE_XY = RNG.integers(200, 3000, (K, 2)).astype(float)
BLOBS = np.random.default_rng(4).uniform(-11, 11, (14, 2)), np.random.default_rng(5).uniform(0.5, 1.5, 14)


def turned(psi_deg: float) -> NDArray[np.float64]:
    c, s = np.cos(np.deg2rad(psi_deg)), np.sin(np.deg2rad(psi_deg))
    return np.array([[c, -s], [s, c]])


def draw(n: int, bin_: float, psi_deg: float = 0.0, away_xy: Any = (0.0, 0.0)) -> NDArray[np.float32]:
    """The phantom in a box of n px of `bin_` micrograph pixels: x_particle = R(-psi) x_ref + away."""
    points, weights = BLOBS
    y, x = np.indices((n, n)) - n // 2
    image = np.zeros((n, n))
    for (px, py), weight in zip((points @ turned(-psi_deg).T + away_xy) / bin_, weights, strict=True):
        image += weight * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (2.4 / bin_) ** 2))
    return image.astype(np.float32)


def extract(
    folder: Path, name: str, n: int, bin_: float, coordinate: Any, group: str = "opticsGroup1"
) -> Path:
    """What RELION extracts at these coordinates, and its star file; it knows no pose."""
    away = COORDINATE_XY + AWAY_XY - coordinate
    images = np.stack([draw(n, bin_, psi, at) for psi, at in zip(PSI_DEG, away, strict=True)])
    size = MICROGRAPH_A * bin_
    write_stack(folder / f"{name}.mrcs", images, size)
    rows = "".join(
        f"{i + 1:06d}@{name}.mrcs mics/m{i % 2}.mrc {x:.6f} {y:.6f} 1 keep-{i:03d}\n"
        for i, (x, y) in enumerate(np.asarray(coordinate))
    )
    (folder / f"{name}.star").write_text(
        "\n# version 30001\n\ndata_optics\n\nloop_\n_rlnOpticsGroup #1\n_rlnOpticsGroupName #2\n"
        "_rlnImagePixelSize #3\n_rlnImageSize #4\n_rlnVoltage #5\n_rlnSphericalAberration #6\n"
        f"_rlnMicrographOriginalPixelSize #7\n1 {group} {size} {n} 300.0 2.7 {MICROGRAPH_A}\n\n"
        "# version 30001\n\ndata_particles\n\nloop_\n_rlnImageName #1\n_rlnMicrographName #2\n"
        f"_rlnCoordinateX #3\n_rlnCoordinateY #4\n_rlnOpticsGroup #5\n_rlnGroupName #6\n{rows}\n"
    )
    return folder / f"{name}.star"


def average_by(star: Path) -> NDArray[np.float64]:
    """Average by the star alone, as RELION does it: x_particle = R(-psi) x_ref - o."""
    blocks = starfile.read(star, always_dict=True)
    size = blocks["optics"]["rlnImagePixelSize"].iloc[0]
    rows = blocks["particles"]
    particles = read(star)
    images = particles.images.read(np.arange(len(particles)))[:, 0]
    n = images.shape[-1]
    y, x = np.indices((n, n)) - n // 2
    total = np.zeros((n, n))
    origins = rows[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy() / size
    for image, psi, origin in zip(images, rows["rlnAnglePsi"], origins, strict=True):
        xy = turned(-psi) @ np.stack([x.ravel(), y.ravel()]) - origin[:, None]
        total += ndimage.map_coordinates(image, (xy[::-1] + n // 2).reshape(2, n, n), order=3)
    return total


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def found(star: Path, folder: Path, bin_: float) -> Any:
    """A session of an extraction, with the truth as its poses, as a model would find it."""
    session = Session.create(folder, read(star), PreprocessConfig())
    return choose(
        session,
        np.ones(K, bool),
        class_id=np.arange(K) % 3 + 1,
        angle_deg=-PSI_DEG,
        shift_yx_px=AWAY_XY[:, ::-1] / bin_,
    )


@pytest.mark.parametrize("boxes", [(32, 64), (33, 65), (32, 65)])
def test_what_was_found_binned_holds_unbinned(tmp_path: Path, boxes: tuple[int, int]) -> None:
    chosen = found(extract(tmp_path, "binned", boxes[0], 2.0, COORDINATE_XY), tmp_path / "s", 2.0)
    other = extract(tmp_path, "full", boxes[1], 1.0, COORDINATE_XY[::-1][::-1])
    lines = other.read_text().splitlines()
    rows = [line for line in lines if "@" in line]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(K)][:8]  # two were not extracted again
    other.write_text("\n".join([line for line in lines if "@" not in line and line] + shuffled) + "\n")
    out = tmp_path / "out.star"
    notes = transfer(out, chosen, read(other))
    assert notes[0].startswith("8 of 10 particles found")
    table = starfile.read(out, always_dict=True)["particles"]
    assert table["rlnGroupName"].tolist() == [row.split()[-1] for row in shuffled]  # their rows, their order
    number = [int(name[-3:]) for name in table["rlnGroupName"]]
    assert table["rlnClassNumber"].tolist() == [i % 3 + 1 for i in number]
    assert correlation(average_by(out), draw(boxes[1], 1.0)) > 0.99


def test_particles_extracted_a_little_aside_are_found_and_corrected(tmp_path: Path) -> None:
    chosen = found(extract(tmp_path, "binned", 32, 2.0, COORDINATE_XY), tmp_path / "s", 2.0)
    aside = COORDINATE_XY + np.array([3.0, -4.0])
    other = read(extract(tmp_path, "full", 64, 1.0, aside))
    with pytest.raises(UserError, match=r"no particle .* lies within 2 px"):
        transfer(tmp_path / "out.star", chosen, other)
    transfer(tmp_path / "out.star", chosen, other, tolerance_px=6)
    assert correlation(average_by(tmp_path / "out.star"), draw(64, 1.0)) > 0.99


def test_recentred_coordinates_are_where_the_particles_are(tmp_path: Path) -> None:
    star = extract(tmp_path, "binned", 32, 2.0, COORDINATE_XY)
    chosen, coordinates = recentred(found(star, tmp_path / "s", 2.0))
    out = tmp_path / "recentred.star"
    export(out, chosen, coordinates_xy_px=coordinates)
    rows = starfile.read(out, always_dict=True)["particles"]
    at = rows[["rlnCoordinateX", "rlnCoordinateY"]].to_numpy()
    assert np.abs(at - COORDINATE_XY - AWAY_XY).max() <= 0.5
    np.testing.assert_array_equal(at, np.round(at))
    # extracted there again, with the origins that were left, unbinned: the phantom
    again = extract(tmp_path, "again", 64, 1.0, at)
    optics = starfile.read(again, always_dict=True)
    for label in ("rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"):
        optics["particles"][label] = rows[label]
    starfile.write(optics, tmp_path / "posed.star")
    assert correlation(average_by(tmp_path / "posed.star"), draw(64, 1.0)) > 0.99


def test_star_files_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two optics groups of one name and different pixel size; a particle that is in both."""
    one = extract(tmp_path, "one", 32, 2.0, COORDINATE_XY)
    (tmp_path / "deeper").mkdir()
    two = extract(tmp_path / "deeper", "two", 48, 1.5, COORDINATE_XY)
    text = two.read_text().replace("_rlnGroupName #6", "_rlnGroupName #6\n_rlnExtra #7")
    two.write_text("\n".join(line + (" 7" if "@" in line else "") for line in text.splitlines()) + "\n")
    out = tmp_path / "merged.star"
    assert main(["merge", str(one), str(two), str(one), "--out", str(out)]) == 0
    told = capsys.readouterr().err
    assert "rlnExtra" in told and "10 particles are in more than one file" in told and "absolute" in told
    blocks = starfile.read(out, always_dict=True)
    assert blocks["optics"]["rlnOpticsGroup"].tolist() == [1, 2]
    assert blocks["optics"]["rlnOpticsGroupName"].is_unique
    assert blocks["particles"]["rlnOpticsGroup"].tolist() == [1] * K + [2] * K
    merged = read(out)
    assert merged.table["pixel_size_A"].tolist() == [2.5] * K + [1.875] * K
    for first, star in ((0, one), (K, two)):
        np.testing.assert_array_equal(
            merged.images.read(np.arange(first, first + K)), read(star).images.read(np.arange(K))
        )
    # cells that are neither group nor a moved name are as they were
    lines = [line.split() for line in out.read_text().splitlines() if "@" in line]
    before = [line.split() for star in (one, two) for line in star.read_text().splitlines() if "@" in line]
    for new, old in zip(lines, before, strict=True):
        assert new[1:4] + new[5:] == old[1:4] + old[5:6]
    assert main(["import", str(out), "--session", str(tmp_path / "s")]) == 0
    with pytest.raises(UserError, match="never overwritten"):
        merge_stars([one, two], one, overwrite=True)
    with pytest.raises(UserError, match="two star files or more"):
        merge_stars([one], tmp_path / "x.star")
    old_form = tmp_path / "old.star"
    old_form.write_text("data_\nloop_\n_rlnImageName\n1@one.mrcs\n")
    with pytest.raises(UserError, match=r"form of RELION 3\.0"):
        merge_stars([one, old_form], tmp_path / "x.star")


def test_transfer_and_recentre_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    star = extract(tmp_path, "binned", 32, 2.0, COORDINATE_XY)
    full = extract(tmp_path, "full", 64, 1.0, COORDINATE_XY)
    session = Session.create(tmp_path / "s", read(star), PreprocessConfig())
    session.selections.save("some", np.arange(K) < 4)
    words = ["transfer", str(session.path), "--to", str(full), "--out", str(tmp_path / "o.star")]
    assert main([*words, "--selection", "some"]) == 0
    assert "4 of 4 particles found" in capsys.readouterr().err
    assert [
        row.split("@")[1][:9] for row in (tmp_path / "o.star").read_text().splitlines() if "@" in row
    ] == ["full.mrcs"] * 4
    assert main(["export", str(session.path), "--out", str(tmp_path / "r.star"), "--recentre"]) == 2
    assert "no shifts to recentre" in capsys.readouterr().err


def test_import_takes_several_star_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = extract(tmp_path, "a", 32, 2.0, COORDINATE_XY)
    b = extract(tmp_path, "b", 32, 2.0, COORDINATE_XY, group="other")
    assert main(["import", str(a), str(b)]) == 0
    session = Session.open(tmp_path / "a_joined_explorer")
    assert session.n_particles == 2 * K and f"{2 * K} particles of 2 files" in session.info.notes
    names = [f"{i + 1:06d}@{name}.mrcs" for name in "ab" for i in range(K)]
    assert session.table["rlnImageName"].tolist() == names
    images = np.concatenate([read(star).images.read(np.arange(K)) for star in (a, b)])
    np.testing.assert_array_equal(session.originals().read(np.arange(2 * K)), images)
    # the same again is the same file; another one is never written over
    assert main(["import", str(a), str(b), "--session", str(tmp_path / "again")]) == 0
    assert main(["import", str(b), str(a), "--session", str(tmp_path / "a" / "b")]) == 0
    (tmp_path / "b_joined.star").write_text("mine")
    assert main(["import", str(b), str(a), "--session", str(tmp_path / "turned")]) == 0
    assert (tmp_path / "b_joined.star").read_text() == "mine"
    joined = sorted(path.name for path in tmp_path.glob("*_joined*.star"))
    assert joined == ["a_joined.star", "b_joined-2.star", "b_joined.star"]
    # what fails leaves no file
    capsys.readouterr()
    assert (
        main(["import", str(a), str(b), "--session", str(tmp_path / "no"), "--where", "rlnCoordinateX < 0"])
        == 2
    )
    assert main(["import", str(a), str(tmp_path / "a.mrcs"), "--session", str(tmp_path / "no")]) == 2
    assert "is no star file; of several files opened together all must be" in capsys.readouterr().err
    assert main(["import", str(b), str(a), "--session", str(tmp_path / "turned")]) == 2
    assert sorted(path.name for path in tmp_path.glob("*_joined*.star")) == joined


@pytest.mark.parametrize("folder", ["my data", "user@lab", "o'clock 1"])
def test_names_with_spaces_and_at_signs_are_joined(tmp_path: Path, folder: str) -> None:
    """From outside of the project the names lead nowhere, so they become absolute, quoted where need be."""
    root = tmp_path / "project"
    (root / folder).mkdir(parents=True)
    stars = [extract(root / folder, name, 32, 2.0, COORDINATE_XY) for name in ("one", "two")]
    for star in stars:
        name = re.compile(rf"\d+@{star.stem}.mrcs")
        written = name.sub(lambda m: quoted(m[0].replace("@", f"@{folder}/")), star.read_text())
        star.write_text(written)
    images = np.concatenate([read(star).images.read(np.arange(K)) for star in stars])
    for out, start in ((root / "merged.star", ""), (tmp_path / "merged.star", f"{root}/")):
        merge_stars(stars, out)
        merged = read(out)
        assert merged.table["rlnImageName"].iloc[K] == f"000001@{start}{folder}/two.mrcs"
        np.testing.assert_array_equal(merged.images.read(np.arange(2 * K)), images)


def test_what_cannot_be_read_again_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my data").mkdir()
    one, two = (extract(tmp_path / "my data", name, 32, 2.0, COORDINATE_XY) for name in ("one", "two"))
    monkeypatch.setattr(joining, "quoted", str)
    with pytest.raises(UserError, match="7 values, but block data_particles has 6 columns"):
        merge_stars([one, two], tmp_path / "merged.star")
    assert not (tmp_path / "merged.star").exists()


def test_an_unknown_optics_group_is_a_sentence(tmp_path: Path) -> None:
    one, two = (extract(tmp_path, name, 32, 2.0, COORDINATE_XY) for name in ("one", "two"))
    two.write_text(two.read_text().replace(" 1 keep-003", " 7 keep-003"))
    said = r"two\.star, row 4: optics group 7 is not in the optics table, which has 1$"
    with pytest.raises(UserError, match=said):
        merge_stars([one, two], tmp_path / "merged.star")
    with pytest.raises(UserError, match=said):
        read(two)


def test_joining_tells_how_far_it_is_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (extract(tmp_path, name, 32, 2.0, COORDINATE_XY) for name in ("one", "two"))
    monkeypatch.setattr(joining, "_WATCHED_ROWS", 3)
    told: list[float] = []
    merge_stars([one, two], tmp_path / "merged.star", progress=told.append)
    assert told == sorted(told) and told[0] == 0 and 0.8 < told[-1] < 1

    def stop(done: float) -> None:
        if done > 0.5:
            raise Stopped("stopped; nothing was written")

    with pytest.raises(Stopped):
        merge_stars([one, two], tmp_path / "new" / "merged.star", progress=stop)
    assert not (tmp_path / "new").exists()
