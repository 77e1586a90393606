"""Exports: what nobody changed stays to the letter, what changed is what RELION will read."""

from __future__ import annotations

import gzip
import os
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from particle_explorer.files import Stopped, UserError
from particle_explorer.io import relion
from particle_explorer.io.inspecting import summarise
from particle_explorer.io.mrc import write_stack
from particle_explorer.io.reading import read, read_array
from particle_explorer.io.writing import export_averages, export_particles, project_root
from particle_explorer.particles import Particles


def export(out: Path, particles: Particles, **changes: Any) -> list[str]:
    return export_particles(
        out, table=particles.table, source=particles.source, kind=particles.kind, **changes
    )


def rows_of(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if "@" in line]


@pytest.mark.parametrize("dialect", ["3.0", "3.1"])
def test_an_unchanged_export_is_the_same_file(render: Any, dialect: str) -> None:
    source = render().star("a.star", dialect)
    assert export(source.with_name("b.star"), read(source)) == []
    assert source.with_name("b.star").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("dialect", ["3.0", "3.1"])
def test_a_selection_keeps_its_lines_in_the_order_of_the_source(render: Any, dialect: str) -> None:
    source = render().star("a.star", dialect)
    chosen = [17, 2, 9, 3]
    export(source.with_name("b.star"), read(source)[np.array(chosen)])
    lines = rows_of(source)
    assert rows_of(source.with_name("b.star")) == [lines[row] for row in sorted(chosen)]
    head = source.read_text().split(lines[0])[0]
    assert source.with_name("b.star").read_text().startswith(head)


@pytest.mark.parametrize("dialect", ["3.0", "3.1"])
@pytest.mark.parametrize("box", [32, 33])
def test_exported_poses_are_relion_s(render: Any, helpers: Any, dialect: str, box: int) -> None:
    """Poses found anew (here: the truth, in our convention) replace those of the file; RELION's recipe on the
    exported file gives the phantom back."""
    rendered = render(box=box)
    truth = read(rendered.star("truth.star", dialect)).table
    wrong = rendered.star("wrong.star", dialect)
    text = re.sub(r"^ *-?\d+\.\d{6}  ", "  11.000000  ", wrong.read_text(), flags=re.MULTILINE)
    wrong.write_text(text)
    particles = read(wrong)
    assert (particles.table["angle_deg"] == -11).all()
    out = rendered.folder / "out.star"
    notes = export(
        out,
        particles,
        angle_deg=truth["angle_deg"].to_numpy(),
        shift_yx_px=truth[["shift_y_px", "shift_x_px"]].to_numpy(),
        class_id=np.arange(24) % 4 + 1,
    )
    assert notes == []
    table = starfile.read(out, always_dict=True)["images" if dialect == "3.0" else "particles"]
    unit, suffix = (1.0, "") if dialect == "3.0" else (2.5, "Angst")
    origin = table[[f"rlnOriginX{suffix}", f"rlnOriginY{suffix}"]].to_numpy() / unit
    average = helpers.by_relion(rendered.images, table["rlnAnglePsi"].to_numpy(), origin)
    assert helpers.correlation(average, helpers.phantom_image(box)) > 0.99
    assert table["rlnClassNumber"].tolist() == (np.arange(24) % 4 + 1).tolist()
    # and every cell that is neither class nor pose is as it was
    for before, after in zip(rows_of(wrong), rows_of(out), strict=True):
        kept = [1, *range(5, len(before.split()))]
        assert [before.split()[i] for i in kept] == [after.split()[i] for i in kept]


SOURCE = """
# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnImagePixelSize #2
1 2.0

# version 30001

data_particles

loop_ \t
_rlnAngleTilt #1
_rlnImageName #2 (the image)
_rlnOriginXPriorAngst #3
_rlnMicrographName #4
_rlnOpticsGroup #5
_rlnAnglePsiPrior #6
 45.000000\t 000002@s.mrcs  1.0 'a mic.mrc'   1\t3.0   # first
 46.000000\t 000001@s.mrcs  1.0 "b's mic"   1\t3.0
1.5e-03  000003@s.mrcs  1 c.mrc   1\t3.25
"""


@pytest.fixture
def quoted_source(tmp_path: Path) -> Path:
    write_stack(tmp_path / "s.mrcs", np.random.default_rng(0).normal(size=(3, 8, 8)), 2.0)
    (tmp_path / "a.star").write_text(SOURCE)
    return tmp_path / "a.star"


def test_new_columns_are_appended_priors_dropped_and_tilt_zeroed(quoted_source: Path) -> None:
    particles = read(quoted_source)
    out = quoted_source.with_name("b.star")
    notes = export(
        out, particles[np.array([0, 2])], angle_deg=[10, -20], shift_yx_px=[[1, 2], [3, -4]], class_id=[1, 2]
    )
    assert out.read_text().splitlines() == [
        *SOURCE.splitlines()[:16],
        "_rlnImageName #2 (the image)",
        "_rlnMicrographName #3",
        "_rlnOpticsGroup #4",
        "_rlnClassNumber #5 ",
        "_rlnAnglePsi #6 ",
        "_rlnOriginXAngst #7 ",
        "_rlnOriginYAngst #8 ",
        "  0.000000\t 000002@s.mrcs 'a mic.mrc'   1 1 -10.000000 -4.000000 -2.000000   # first",
        "0.000000  000003@s.mrcs c.mrc   1 2 20.000000 8.000000 -6.000000",
    ]
    assert len(notes) == 2 and "rlnAngleTilt" in notes[1] and "rlnAnglePsiPrior" in notes[0]
    again = read(out).table
    assert again["angle_deg"].tolist() == [10, -20]
    assert again["micrograph"].tolist() == ["a mic.mrc", "c.mrc"]


def test_a_first_or_last_column_can_go(tmp_path: Path) -> None:
    write_stack(tmp_path / "s.mrcs", np.random.default_rng(0).normal(size=(2, 8, 8)), 2.0)
    text = "data_\nloop_\n_rlnAnglePsiPrior #1\n_rlnImageName #2\n_rlnAngleRotPrior #3\n"
    text += "  1.0 1@s.mrcs  2.0 \n1.5 2@s.mrcs 9\n"
    (tmp_path / "a.star").write_text(text)
    export(tmp_path / "b.star", read(tmp_path / "a.star"), angle_deg=[90, 0])
    assert (tmp_path / "b.star").read_text() == (
        "data_\nloop_\n_rlnImageName #1\n_rlnAnglePsi #2 \n  1@s.mrcs -90.000000 \n2@s.mrcs 0.000000\n"
    )


def test_windows_line_ends_become_unix_ones(quoted_source: Path) -> None:
    quoted_source.write_bytes(SOURCE.replace("\n", "\r\n").encode())
    out = quoted_source.with_name("b.star")
    export(out, read(quoted_source), class_id=[1, 2, 3])
    assert b"\r" not in out.read_bytes()
    assert [line.split()[-1] for line in rows_of(out)[1:]] == ["2", "3"]
    assert read(out).table["class_id"].tolist() == [1, 2, 3]


CELLS = st.lists(
    st.tuples(
        st.sampled_from(["1.5", "-0", "007", "x#y", "'a b'", '""', "ü", "1e-3"]),
        st.sampled_from([" ", "\t", "  "]),
    ),
    min_size=3,
    max_size=3,
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(CELLS, st.booleans()), min_size=1, max_size=6).filter(
        lambda rows: any(r[1] for r in rows)
    )
)
def test_untouched_cells_stay_to_the_letter_whatever_they_are(
    tmp_path: Path, rows: list[tuple[list[tuple[str, str]], bool]]
) -> None:
    if not (tmp_path / "s.mrcs").exists():
        write_stack(tmp_path / "s.mrcs", np.random.default_rng(0).normal(size=(6, 8, 8)), 2.0)
    lines = [
        f"{i}@s.mrcs " + "".join(cell + gap for cell, gap in cells) for i, (cells, _) in enumerate(rows, 1)
    ]
    source = tmp_path / "a.star"
    source.write_text("data_\nloop_\n_rlnImageName\n_a\n_b\n_c\n" + "\n".join(lines) + "\n", encoding="utf-8")
    particles = read(source)[np.array([keep for _, keep in rows])]
    out = tmp_path / "b.star"
    export(out, particles, class_id=np.full(len(particles), 7), overwrite=True)
    kept = [line for line, (_, keep) in zip(lines, rows, strict=True) if keep]
    written = [line for line in out.read_text(encoding="utf-8").splitlines() if "@" in line]
    assert written == [line.rstrip() + " 7" + line[len(line.rstrip()) :] for line in kept]


def test_nothing_is_overwritten_unasked_and_originals_never(quoted_source: Path) -> None:
    particles = read(quoted_source)
    folder = quoted_source.parent
    (folder / "copy.star").write_text(SOURCE)
    (folder / "soft.star").symlink_to("a.star")
    os.link(quoted_source, folder / "hard.star")
    (folder / "stack.star").symlink_to("s.mrcs")
    (folder / "mine.star").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        export(folder / "mine.star", particles)
    for name in ("a", "soft", "hard", "stack", "copy"):
        with pytest.raises(UserError, match="never overwritten"):
            export(folder / f"{name}.star", particles, overwrite=True, protected=[folder / "copy.star"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export(folder / "mine.star", particles, overwrite=True)
    assert (folder / "mine.star").read_text() == SOURCE


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"angle_deg": [1.0, np.nan, 2.0]}, UserError, "particle 2 of the export has no angle"),
        ({"class_id": [0, 1, 2]}, ValueError, "from 1"),
        ({"class_id": [1, 2]}, ValueError, "per particle"),
        ({"shift_yx_px": np.zeros((3, 3))}, ValueError, "shape"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(
    quoted_source: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        export(quoted_source.with_name("b.star"), read(quoted_source), **changes)
    assert sorted(os.listdir(quoted_source.parent)) == ["a.star", "s.mrcs"]


def test_a_source_that_changed_since_is_noticed(quoted_source: Path) -> None:
    particles = read(quoted_source)
    quoted_source.write_text(SOURCE.replace("000002@", "000003@"))
    with pytest.raises(UserError, match="has changed since"):
        export(quoted_source.with_name("b.star"), particles)
    quoted_source.write_text("\n".join(SOURCE.splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match="has 2 particles now"):
        export(quoted_source.with_name("b.star"), particles)
    assert sorted(os.listdir(quoted_source.parent)) == ["a.star", "s.mrcs"]


def test_an_export_that_is_not_what_was_meant_gets_no_name(
    quoted_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = relion.edited_star

    def forgetful(*args: Any) -> Any:
        pieces, names, values, notes = edited(*args)
        return list(pieces)[:-1], names, values, notes

    monkeypatch.setattr(relion, "edited_star", forgetful)
    with pytest.raises(RuntimeError, match="does not hold the particles"):
        export(quoted_source.with_name("b.star"), read(quoted_source))
    assert sorted(os.listdir(quoted_source.parent)) == ["a.star", "s.mrcs"]


def test_unknown_pixel_size_and_a_file_in_angstrom(tmp_path: Path) -> None:
    write_stack(tmp_path / "s.mrcs", np.random.default_rng(0).normal(size=(1, 8, 8)), np.nan)
    (tmp_path / "a.star").write_text(
        "data_\nloop_\n_rlnImageName\n_rlnOriginXAngst\n_rlnOriginYAngst\n1@s.mrcs 0 0\n"
    )
    found = read(tmp_path / "a.star")
    with pytest.raises(UserError, match="pixel size is not known"):
        export(tmp_path / "b.star", found, shift_yx_px=[[1, 1]])
    given = replace(found, table=found.table.assign(pixel_size_A=2.5))
    notes = export(tmp_path / "b.star", given, shift_yx_px=[[1, 1]])
    assert any("rlnImagePixelSize 2.5" in note for note in notes)
    assert "-2.500000" in (tmp_path / "b.star").read_text()


# ------------------------------------------------------------------ sources that are not star files


def cs_file(folder: Path, sign: float = -1.0) -> Path:
    """Four particles of two stacks named .mrc, of two exposure groups that differ in voltage."""
    for name in ("a.mrc", "b.mrc"):
        write_stack(folder / name, np.random.default_rng(0).normal(size=(5, 8, 8)), 1.5)
    fields = [
        ("uid", "<u8"), ("blob/path", "S5"), ("blob/idx", "<u4"), ("blob/psize_A", "<f4"),
        ("blob/sign", "<f4"),
        ("ctf/df1_A", "<f4"), ("ctf/df2_A", "<f4"), ("ctf/df_angle_rad", "<f4"), ("ctf/accel_kv", "<f4"),
        ("ctf/cs_mm", "<f4"), ("ctf/amp_contrast", "<f4"), ("ctf/exp_group_id", "<u4"),
    ]  # fmt: skip
    data = np.zeros(4, fields)
    data["uid"], data["blob/path"], data["blob/idx"] = (
        [9, 8, 7, 6],
        [b"b.mrc", b"a.mrc", b"a.mrc", b"b.mrc"],
        [4, 0, 2, 1],
    )
    data["blob/psize_A"], data["blob/sign"] = 1.5, sign
    data["ctf/df1_A"], data["ctf/df2_A"], data["ctf/df_angle_rad"] = [1e4, 2e4, 3e4, 4e4], 1.2e4, np.pi / 4
    data["ctf/accel_kv"], data["ctf/cs_mm"], data["ctf/amp_contrast"] = [300, 200, 200, 300], 2.7, 0.1
    data["ctf/exp_group_id"] = [23, 7, 7, 23]
    np.save(folder / "p.npy", data)
    (folder / "p.npy").rename(folder / "p.cs")
    return folder / "p.cs"


def test_cryosparc_becomes_star_3_1(tmp_path: Path) -> None:
    particles = read(cs_file(tmp_path))
    out = tmp_path / "out" / "particles.star"
    out.parent.mkdir()
    notes = export(
        out, particles, class_id=[1, 2, 2, 1], angle_deg=[10, 20, 30, 40], shift_yx_px=np.full((4, 2), 2.0)
    )
    blocks = starfile.read(out)
    assert list(blocks) == ["optics", "particles"]
    optics, table = blocks["optics"], blocks["particles"]
    assert optics["rlnOpticsGroup"].tolist() == [1, 2]
    assert optics["rlnVoltage"].tolist() == [200, 300] and optics["rlnSphericalAberration"].tolist() == [
        2.7,
        2.7,
    ]
    assert optics["rlnImagePixelSize"].tolist() == [1.5, 1.5] and optics["rlnImageSize"].tolist() == [8, 8]
    assert optics["rlnImageDimensionality"].tolist() == [2, 2]
    assert table["rlnOpticsGroup"].tolist() == [2, 1, 1, 2]
    assert table["rlnAnglePsi"].tolist() == [-10, -20, -30, -40]
    assert table["rlnOriginXAngst"].tolist() == [-3.0] * 4
    assert table["rlnDefocusAngle"].tolist() == pytest.approx([45] * 4, abs=1e-4)
    # images: counted from 1, and through links that RELION takes for stacks
    names = [name.split("@") for name in table["rlnImageName"]]
    assert [int(number) for number, _ in names] == [5, 1, 3, 2]
    for (_, name), path in zip(names, particles.table["stack_path"], strict=True):
        link = out.parent / name
        assert name.endswith(".mrcs") and link.is_symlink() and not os.path.isabs(os.readlink(link))
        assert link.resolve() == Path(path).resolve()
    assert any("link" in note for note in notes) and any("dark" in note for note in notes)
    again = read(out)
    np.testing.assert_array_equal(again.images.read(range(4)), particles.images.read(range(4)))
    for column in (
        "angle_deg",
        "shift_y_px",
        "defocus_u_A",
        "defocus_v_A",
        "voltage_kV",
        "pixel_size_A",
        "class_id",
    ):
        wanted = {"angle_deg": [10, 20, 30, 40], "shift_y_px": [2] * 4, "class_id": [1, 2, 2, 1]}
        np.testing.assert_allclose(
            again.table[column], wanted.get(column, particles.table.get(column)), rtol=1e-5
        )
    # once more: the links are used again
    export(out, particles, overwrite=True)
    assert sorted(path.name for path in (out.parent / "particles_stacks").iterdir()) == ["a.mrcs", "b.mrcs"]


def test_names_with_spaces_go_through_links(tmp_path: Path) -> None:
    folder = tmp_path / "my data"
    folder.mkdir()
    write_stack(folder / "a b.mrcs", np.random.default_rng(0).normal(size=(2, 8, 8)), 2.0)
    out = tmp_path / "o.star"
    notes = export(out, read(folder / "a b.mrcs"))
    assert starfile.read(out)["particles"]["rlnImageName"].tolist() == ["000001@a_b.mrcs", "000002@a_b.mrcs"]
    assert (tmp_path / "a_b.mrcs").resolve() == (folder / "a b.mrcs").resolve()
    assert len(read(out)) == 2 and any("without spaces" in note for note in notes)


def test_a_bare_stack_invents_nothing(tmp_path: Path) -> None:
    write_stack(tmp_path / "s.mrcs", np.random.default_rng(0).normal(size=(3, 8, 8)), 2.0)
    particles = read(tmp_path / "s.mrcs")
    notes = export(
        tmp_path / "o.star", particles[np.array([2, 0])], angle_deg=[1, 2], shift_yx_px=[[0, 1], [0, 0]]
    )
    optics = starfile.read(tmp_path / "o.star")["optics"]
    assert {"rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"}.isdisjoint(optics.columns)
    assert any("rlnVoltage and rlnSphericalAberration left out" in note for note in notes)
    again = read(tmp_path / "o.star")
    assert again.table["stack_index"].tolist() == [0, 2]
    assert again.table["angle_deg"].tolist() == [2, 1]  # each particle keeps its own
    np.testing.assert_allclose(again.table["shift_x_px"], [0, 1])


def test_unknown_pixel_size_gives_the_older_form_in_pixels(tmp_path: Path) -> None:
    write_stack(tmp_path / "s.mrcs", np.random.default_rng(0).normal(size=(3, 8, 8)), np.nan)
    notes = export(
        tmp_path / "o.star", read(tmp_path / "s.mrcs"), angle_deg=[1, 2, 3], shift_yx_px=np.ones((3, 2))
    )
    table = starfile.read(tmp_path / "o.star")
    assert table["rlnOriginX"].tolist() == [-1, -1, -1]
    assert any("pixel size is not known" in note for note in notes)
    assert read(tmp_path / "o.star").table["shift_x_px"].tolist() == [1, 1, 1]


def test_npy_images_are_written_as_a_stack(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(5, 8, 8)).astype("f4")
    np.save(tmp_path / "s.npy", images)
    particles = read(tmp_path / "s.npy")
    notes = export(tmp_path / "o.star", particles[np.array([4, 1])])
    assert any("o_images.mrcs" in note for note in notes)
    np.testing.assert_array_equal(read(tmp_path / "o.star").images.read([0, 1])[:, 0], images[[1, 4]])
    with pytest.raises(UserError, match="memory only"):
        export(tmp_path / "x.star", read_array(images, "layer"))
    assert not (tmp_path / "x.star").exists()


def _as(kind: str, images: np.ndarray, folder: Path) -> Path:
    """The images in a file of a kind that RELION does not read, or not as a stack of particles."""
    path = folder / f"s.{kind}"
    if kind == "tif":
        tifffile.imwrite(path, images)
    elif kind == "npz":
        np.savez(path, images=images)
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            file["a"] = images
    else:
        write_stack(folder / "s.mrcs", images, 2.0)
        path.write_bytes(gzip.compress((folder / "s.mrcs").read_bytes()))
    return path


@pytest.mark.parametrize("kind", ["tif", "npz", "h5", "mrcs.gz"])
def test_images_that_are_in_no_mrc_file_are_written_as_one(tmp_path: Path, kind: str) -> None:
    images = np.random.default_rng(0).normal(size=(5, 8, 8)).astype("f4")
    (tmp_path / "data").mkdir()
    particles = read(_as(kind, images, tmp_path / "data"))
    out = tmp_path / "o.star"
    notes = export(out, particles[np.array([3, 1])])
    assert any("o_images.mrcs" in note and f"(.{kind.split('.')[-1]})" in note for note in notes)
    with mrcfile.open(tmp_path / "o_images.mrcs") as mrc:
        np.testing.assert_array_equal(mrc.data, images[[1, 3]])
    again = read(out)
    np.testing.assert_array_equal(again.images.read([0, 1])[:, 0], images[[1, 3]])
    assert again.notes == () and not (tmp_path / "o_images.mrcs").is_symlink()
    assert summarise(again).lines()[0] == "2 particles in 1 file (star)"


@pytest.mark.parametrize("name", ["o.npy", "o.mrc"])
def test_averages_beside_particles_do_not_take_the_place_of_their_images(tmp_path: Path, name: str) -> None:
    images = np.random.default_rng(0).normal(size=(5, 8, 8)).astype("f4")
    (tmp_path / "in").mkdir()
    if name == "o.npy":
        np.save(tmp_path / "in" / name, images)
    else:
        write_stack(tmp_path / "in" / name, images, 2.0)
    out = tmp_path / "o.star"
    for _ in range(2):
        export(out, read(tmp_path / "in" / name), overwrite=True)
        export_averages(out.with_suffix(".mrcs"), images[:1] * 0, 2.0, overwrite=True)
        np.testing.assert_array_equal(read(out).images.read(np.arange(5))[:, 0], images)
    assert len(list(tmp_path.glob("*.mrcs"))) == 2


def test_writing_the_images_can_be_stopped(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.zeros((3, 8, 8), "f4"))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match="nothing was written"):
        export(tmp_path / "o.star", read(tmp_path / "s.npy"), stop=stop)
    assert os.listdir(tmp_path) == ["s.npy"]


def test_folders_may_have_an_at_sign(tmp_path: Path) -> None:
    root = tmp_path / "project"
    (root / "user@lab").mkdir(parents=True)
    write_stack(root / "user@lab" / "s.mrcs", np.random.default_rng(0).normal(size=(2, 8, 8)), 2.0)
    source = root / "a.star"
    source.write_text("data_\nloop_\n_rlnImageName\n1@user@lab/s.mrcs\n2@user@lab/s.mrcs\n")
    particles = read(source)
    assert export(root / "b.star", particles) == []
    assert project_root(particles.table) == root
    (note,) = export(tmp_path / "b.star", particles)
    assert "(user@lab/s.mrcs)" in note and f"run RELION in {root}" in note


def test_averages_are_an_image_stack(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(3, 9, 9))
    assert export_averages(tmp_path / "a.mrcs", images, 1.7) == []
    with mrcfile.open(tmp_path / "a.mrcs") as mrc:
        assert mrc.is_image_stack() and mrc.data.dtype == np.float32
        np.testing.assert_array_equal(mrc.data, images.astype("f4"))
    with pytest.raises(UserError, match="exists already"):
        export_averages(tmp_path / "a.mrcs", images, 1.7)
    with pytest.raises(UserError, match=r"\.mrcs"):
        export_averages(tmp_path / "a.png", images, 1.7)


def test_the_empty_selection_is_refused(quoted_source: Path) -> None:
    particles = read(quoted_source)
    with pytest.raises(UserError, match="selection is empty"):
        export(quoted_source.with_name("b.star"), particles[np.zeros(3, bool)])
    with pytest.raises(UserError, match="does not end in"):
        export(quoted_source.with_name("b.txt"), particles)


def test_a_table_that_went_through_parquet_exports_the_same(render: Any) -> None:
    source = render().star("a.star", "3.1")
    particles = read(source)
    particles.table.to_parquet(source.with_name("t.parquet"))
    table = pd.read_parquet(source.with_name("t.parquet"))
    export_particles(source.with_name("b.star"), table=table, source=source, kind="star")
    assert source.with_name("b.star").read_bytes() == source.read_bytes()
