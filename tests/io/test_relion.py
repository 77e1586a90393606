"""RELION particle files in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from particle_explorer.files import UserError
from particle_explorer.io.mrc import write_stack
from particle_explorer.io.reading import read
from particle_explorer.io.writing import export_particles
from particle_explorer.preprocess import fourier_crop

IMAGES = np.arange(6.0)[:, None, None] + np.random.default_rng(0).normal(size=(6, 8, 8)) * 0.1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with one stack of six images whose means are 0 … 5."""
    (tmp_path / "Extract" / "job003").mkdir(parents=True)
    write_stack(tmp_path / "Extract" / "job003" / "s.mrcs", IMAGES, 1.5)
    return tmp_path


def star(folder: Path, text: str, name: str = "particles.star") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def one_block(rows: str, labels: str = "rlnImageName", name: str = "") -> str:
    return f"data_{name}\nloop_\n" + "".join(f"_{label}\n" for label in labels.split()) + rows


OPTICS = (
    "data_optics\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n_rlnVoltage\n_rlnCtfDataAreCtfPremultiplied\n"
)
S = "Extract/job003/s.mrcs"
GROUPED = "rlnImageName rlnOpticsGroup"


@pytest.mark.parametrize("dialect", ["3.0", "3.1"])
@pytest.mark.parametrize("box", [32, 33])
@pytest.mark.parametrize("binned", [None, 24, 25])
def test_poses_read_give_the_phantom_back(
    render: Any, helpers: Any, dialect: str, box: int, binned: int | None
) -> None:
    """Also after Fourier cropping, with shifts scaled as the box."""
    rendered = render(box=box)
    particles = read(rendered.star("p.star", dialect))
    table = particles.table
    images, scale = particles.images.read(range(len(particles))), 1.0
    if binned:
        images, scale = fourier_crop(images, binned), binned / box
    shift = table[["shift_y_px", "shift_x_px"]].to_numpy() * scale
    average = helpers.by_placement(images[:, 0], table["angle_deg"].to_numpy(), shift)
    wanted = fourier_crop(helpers.phantom_image(box)[None], images.shape[-1])[0]
    assert helpers.correlation(average, wanted) > 0.99
    wrong = helpers.by_placement(images[:, 0], -table["angle_deg"].to_numpy(), shift)
    assert helpers.correlation(wrong, wanted) < 0.9
    np.testing.assert_allclose(table["pixel_size_A"], 2.5)


def test_two_optics_groups_of_different_pixel_size(folder: Path) -> None:
    rows = one_block(
        f"1@{S} 2 10 3 -6 1e4\n2@{S} 1 10 3 -6 1e4\n",
        "rlnImageName rlnOpticsGroup rlnAnglePsi rlnOriginXAngst rlnOriginYAngst rlnDefocusU",
        "particles",
    )
    table = read(star(folder, OPTICS + "1 1.5 300 0\n2 3.0 200 1\n" + rows)).table
    assert table["pixel_size_A"].tolist() == [3.0, 1.5]
    assert table["shift_x_px"].tolist() == [-1.0, -2.0] and table["shift_y_px"].tolist() == [2.0, 4.0]
    assert table["voltage_kV"].tolist() == [200, 300]
    assert table["ctf_state"].tolist() == ["premultiplied", "raw"]
    assert table["optics_group"].tolist() == [2, 1]


def test_the_particle_s_own_value_counts_over_its_optics_group(folder: Path) -> None:
    rows = f"data_particles\nloop_\n_rlnImageName\n_rlnVoltage\n_rlnDefocusU\n1@{S} 120 1e4\n"
    particles = read(star(folder, rows + OPTICS + "1 1.5 300 0\n"))  # the particles come first, too
    assert particles.table["voltage_kV"].tolist() == [120]
    assert any("only one" in note for note in particles.notes)


@pytest.mark.parametrize("name", ["", "images", "model_class_1", "particles", "anything"])
def test_any_block_name(folder: Path, name: str) -> None:
    particles = read(star(folder, one_block(f"2@{S}\n6@{S}\n", name=name)))
    assert particles.table["stack_index"].tolist() == [1, 5]
    np.testing.assert_allclose(particles.images.read([0, 1]).mean(axis=(1, 2, 3)), [1, 5], atol=0.1)
    assert particles.table["ctf_state"].tolist() == ["none", "none"]
    assert "angle_deg" not in particles.table


def test_unknown_columns_are_kept(folder: Path) -> None:
    table = read(star(folder, one_block(f"2@{S} 7 abc\n", "rlnImageName mine wordy"))).table
    assert table["mine"].tolist() == [7] and table["wordy"].tolist() == ["abc"]


@pytest.mark.parametrize(
    ("labels", "row", "size"),
    [
        ("rlnMagnification rlnDetectorPixelSize", "50000 7", 1.4),
        ("rlnImagePixelSize", "1.2", 1.2),
        ("rlnImagePixelSize rlnMagnification rlnDetectorPixelSize", "0 50000 7", 1.4),
        ("rlnMagnification rlnDetectorPixelSize", "0 7", 1.5),
        ("rlnDefocusU", "1e4", 1.5),
    ],
)
def test_pixel_size_ladder(folder: Path, labels: str, row: str, size: float) -> None:
    particles = read(star(folder, one_block(f"2@{S} {row}\n", f"rlnImageName {labels}")))
    assert particles.table["pixel_size_A"].tolist() == pytest.approx([size])
    assert any("header" in note for note in particles.notes) == (size != 1.5)


def test_shifts_in_angstrom_without_a_pixel_size(folder: Path) -> None:
    write_stack(folder / "u.mrcs", IMAGES, np.nan)
    labels = "rlnImageName rlnAnglePsi rlnOriginXAngst rlnOriginYAngst"
    zero = read(star(folder, one_block("1@u.mrcs 5 0 0\n", labels)))
    assert zero.table["shift_x_px"].tolist() == [0.0]
    known = read(star(folder, one_block("1@u.mrcs 5 2 0\n", labels)))
    assert "shift_x_px" not in known.table and known.table["angle_deg"].tolist() == [-5.0]
    assert any("shifts are not used" in note for note in known.notes)


def test_defocus_0_everywhere_means_no_ctf(folder: Path) -> None:
    particles = read(
        star(folder, one_block(f"1@{S} 0 300 90\n", "rlnImageName rlnDefocusU rlnVoltage rlnPhaseShift"))
    )
    assert particles.table["ctf_state"].tolist() == ["none"]
    assert any("defocus is 0" in note for note in particles.notes)


@pytest.mark.parametrize(
    "where",
    ["particles.star", "Class2D/job008/run_it025_data.star", "Extract/job003/particles.star"],
)
def test_stacks_are_found_from_the_project_root(folder: Path, where: str) -> None:
    assert len(read(star(folder, one_block(f"1@{S}\n"), where))) == 1


def test_stacks_are_found_by_absolute_name_dots_and_given_folder(folder: Path, tmp_path_factory: Any) -> None:
    away = tmp_path_factory.mktemp("away")
    assert len(read(star(away, one_block(f"1@{folder / S}\n")))) == 1
    assert len(read(star(folder / "deep", one_block(f"1@../{S}\n")))) == 1
    lost = star(away, one_block(f"1@{S}\n"))
    for given_folder in (folder, folder / "Extract", folder / "Extract" / "job003"):
        assert len(read(lost, project_dir=given_folder)) == 1
    gone = star(away, one_block("1@/gone/project/Extract/job003/s.mrcs\n"))
    assert len(read(gone, project_dir=folder)) == 1


def test_relion_s_type_suffix_is_understood(folder: Path) -> None:
    assert len(read(star(folder, one_block(f"1@{S}:mrcs\n")))) == 1


def test_reading_tells_how_far_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("particle_explorer.io.star._CHUNK_ROWS", 2)
    shares: list[float] = []
    path = star(folder, one_block("".join(f"{i + 1}@{S}\n" for i in range(6))))
    assert len(read(path, progress=shares.append)) == 6
    assert shares == pytest.approx([0.7 / 3, 1.4 / 3, 0.7, 1.0])


def test_stacks_are_found_above_what_a_link_leads_to(tmp_path: Path) -> None:
    """A link to a star file in another project, named from that project's root."""
    folder = tmp_path / "project" / "Extract" / "job001"
    folder.mkdir(parents=True)
    write_stack(folder / "s.mrcs", IMAGES, 1.5)
    source = star(folder, one_block("1@Extract/job001/s.mrcs\n2@Extract/job001/s.mrcs\n"))
    (tmp_path / "mine").mkdir()
    link = tmp_path / "mine" / "p.star"
    link.symlink_to(source)
    particles = read(link)
    assert len(particles) == 2 and particles.source == link
    (note,) = export_particles(tmp_path / "mine" / "o.star", table=particles.table, source=link, kind="star")
    assert f"run RELION in {tmp_path / 'project'}" in note


def test_every_missing_stack_is_listed_at_once(folder: Path) -> None:
    rows = "".join(f"1@{name}\n" for name in (S, "gone/a.mrcs", "gone/b.mrcs", "gone/a.mrcs"))
    with pytest.raises(
        UserError, match=r"3 image stacks, and 2 cannot be found: gone/a.mrcs, gone/b.mrcs"
    ) as caught:
        read(star(folder, one_block(rows)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (one_block(f"1@{S}\n7@{S}\n"), "row 2.*image 7, but .*s.mrcs holds 6"),
        (one_block(f"0@{S}\n"), "counted from 1"),
        (one_block(f"x@{S}\n"), "counted from 1"),
        (one_block("1@\n"), "counted from 1"),
        (one_block(""), "lists no particles"),
        (one_block(f"1@{S} x\n", "rlnImageName rlnDefocusU"), 'row 1: rlnDefocusU is "x"'),
        (one_block(f"1@{S} 1.5\n", "rlnImageName rlnClassNumber"), "not a whole number"),
        (one_block(f"1@{S} nan\n", "rlnImageName rlnClassNumber"), "not a whole number"),
        (one_block(f"1@{S} inf\n", "rlnImageName rlnAnglePsi"), "row 1: rlnAnglePsi is infinite"),
        (OPTICS + "1 1.5 300 0\n" + one_block(f"1@{S} 4\n", GROUPED), "row 1: optics group 4"),
        (OPTICS + "1 1.5 300 0\n2 1 300 0\n" + one_block(f"1@{S}\n"), "do not say which"),
        (OPTICS + "1 1.5 300 0\n1 1 300 0\n" + one_block(f"1@{S} 1\n", GROUPED), "twice"),
        (f"data_particles\n_rlnImageName 1@{S}\n_rlnOpticsGroup 1\n", "one particle as labels with a value"),
        (one_block("m.mrc\n", "rlnMicrographName"), "lists micrographs"),
        (one_block("1 2 m.mrc\n", "rlnCoordinateX rlnCoordinateY rlnMicrographName"), "lists coordinates"),
        (one_block("1@c.mrcs\n", "rlnReferenceImage"), "describes a model"),
        (one_block("1\n", "rlnVoltage"), "no block has the column _rlnImageName"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_right_sentence(folder: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read(star(folder, text))
    assert "\n" not in str(caught.value)


CELL = st.text(st.sampled_from("0123456789.-+e@/sabn'\"# "), min_size=0, max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=4))
def test_any_rows_are_read_or_refused(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    text = "".join(f"{a}@{S} {b} {c}\n" for a, b, c in rows)
    try:
        particles = read(star(folder, one_block(text, "rlnImageName rlnDefocusU rlnAnglePsi")))
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert particles.images.read(range(len(particles))).shape == (len(particles), 1, 8, 8)
    assert particles.table["angle_deg"].dtype == float


def test_stacks_far_below_the_given_folder_are_found_where_one_has_the_name(tmp_path: Path) -> None:
    project = tmp_path / "copied"
    for place in ("x/deep/a.mrcs", "y/b.mrcs", "z/b.mrcs", "z/c.mrcs"):
        (project / place).parent.mkdir(parents=True, exist_ok=True)
        write_stack(project / place, np.zeros((2, 4, 4)), 1.5)
    star = tmp_path / "p.star"

    def paths(*names: str) -> list[str]:
        rows = "".join(f"1@{name}\n" for name in names)
        star.write_text(f"data_\n\nloop_\n_rlnImageName\n{rows}")
        found = read(star, project_dir=project).table["stack_path"]
        return [Path(path).relative_to(project).as_posix() for path in found]

    assert paths("Extract/job3/a.mrcs", "J4/000012345678901234567_c.mrcs") == ["x/deep/a.mrcs", "z/c.mrcs"]
    for names in (["Extract/b.mrcs"], ["one/a.mrcs", "two/a.mrcs"]):
        with pytest.raises(UserError, match="cannot be found"):
            paths(*names)
