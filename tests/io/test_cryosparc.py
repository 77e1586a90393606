"""cryoSPARC datasets in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from particle_explorer.files import UserError
from particle_explorer.io import cryosparc
from particle_explorer.io.mrc import write_stack
from particle_explorer.io.reading import read
from particle_explorer.io.writing import export_particles
from particle_explorer.session import Session

UID = np.array([2**63 + 5, 17, 3, 2**53 + 1], np.uint64)


def records(n: int = 4, path: bytes = b"J3/extract/s.mrc", **fields: np.ndarray) -> np.ndarray:
    columns = {
        "uid": UID[:n],
        "blob/path": np.array([path] * n),
        "blob/idx": np.arange(n, dtype="u4"),
        "blob/shape": np.full((n, 2), 8, "u4"),
        "blob/psize_A": np.full(n, 1.5, "f4"),
        "blob/sign": np.full(n, -1, "f4"),
        **{name.replace("__", "/"): values for name, values in fields.items()},
    }
    made = np.empty(n, [(name, values.dtype, values.shape[1:]) for name, values in columns.items()])
    for name, values in columns.items():
        made[name] = values
    return made


def save(path: Path, data: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, data)
    return path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A cryoSPARC project folder with one stack of four images whose means are 0 … 3."""
    (tmp_path / "J3" / "extract").mkdir(parents=True)
    images = np.arange(4.0)[:, None, None] + np.random.default_rng(0).normal(size=(4, 8, 8)) * 0.1
    write_stack(tmp_path / "J3" / "extract" / "s.mrc", images, 1.5)
    return tmp_path


def test_fields_become_our_words(project: Path) -> None:
    data = records(
        ctf__df1_A=np.full(4, 2e4, "f4"), ctf__df2_A=np.full(4, 1e4, "f4"),
        ctf__df_angle_rad=np.full(4, np.pi / 2, "f4"), ctf__accel_kv=np.full(4, 200, "f4"),
        ctf__cs_mm=np.full(4, 2.7, "f4"), ctf__amp_contrast=np.full(4, 0.1, "f4"),
        ctf__phase_shift_rad=np.full(4, np.pi, "f4"), ctf__exp_group_id=np.full(4, 23, "u4"),
        location__micrograph_path=np.array([b"J1/m.mrc"] * 4),
        alignments2D__class=np.arange(4, dtype="u4"),
    )  # fmt: skip
    particles = read(save(project / "J5" / "particles.cs", data))
    table = particles.table
    assert table.index.tolist() == UID.tolist() and table.index.dtype == np.uint64
    assert table["contrast_sign"].tolist() == [-1] * 4
    assert table["stack_index"].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(particles.images.read([3, 1]).mean(axis=(1, 2, 3)), [3, 1], atol=0.1)
    first = table.iloc[0]
    assert (first["ctf_state"], first["micrograph"], first["optics_group"]) == ("raw", "J1/m.mrc", 23)
    assert (first["defocus_u_A"], first["defocus_v_A"], first["voltage_kV"]) == (2e4, 1e4, 200)
    assert first["defocus_angle_deg"] == pytest.approx(90, abs=1e-4)
    assert first["phase_shift_deg"] == pytest.approx(180, abs=1e-4)
    assert table["class_id"].tolist() == [1, 2, 3, 4]
    assert first["blob/shape[1]"] == 8 and first["blob/path"] == "J3/extract/s.mrc"
    assert "uid" not in table


@pytest.mark.parametrize("box", [32, 33])
def test_alignments_give_the_phantom_back(render: Any, helpers: Any, box: int) -> None:
    """Signs as pyem's, in pixels of the alignment, which are twice as large as those of the images here."""
    rendered = render(box=box, pixel_size_A=2.0)
    data = records(4)
    many = np.concatenate([data] * 6)
    many["uid"], many["blob/idx"], many["blob/path"] = np.arange(24), np.arange(24), b"stack.mrcs"
    more = [("alignments2D/pose", "f4"), ("alignments2D/shift", "f4", (2,)), ("alignments2D/psize_A", "f4")]
    full = np.empty(24, many.dtype.descr + more)
    for name in many.dtype.names or ():
        full[name] = many[name]
    full["blob/psize_A"] = 2.0
    full["alignments2D/pose"] = np.deg2rad(rendered.psi_deg)
    full["alignments2D/shift"] = rendered.origin_xy_px / 2
    full["alignments2D/psize_A"] = 4.0
    particles = read(save(rendered.folder / "p.cs", full))
    table = particles.table
    average = helpers.by_placement(
        particles.images.read(range(24))[:, 0],
        table["angle_deg"],
        table[["shift_y_px", "shift_x_px"]].to_numpy(),
    )
    assert helpers.correlation(average, helpers.phantom_image(box)) > 0.99


def test_passthrough_is_joined_on_uid_in_any_order(project: Path) -> None:
    primary = save(project / "J7" / "cryosparc_P1_J7_020_particles.cs", records())
    other = np.empty(4, [("uid", "<u8"), ("ctf/df1_A", "<f4"), ("blob/psize_A", "<f4")])
    other["uid"], other["ctf/df1_A"], other["blob/psize_A"] = UID[::-1], [4, 3, 2, 1], 99
    save(project / "J7" / "cryosparc_P1_J7_passthrough_particles.cs", other)
    save(project / "J7" / "cryosparc_P1_J8_passthrough_particles.cs", other[:2])
    particles = read(primary)
    assert particles.table["defocus_u_A"].tolist() == [1, 2, 3, 4]
    assert particles.table["pixel_size_A"].tolist() == [1.5] * 4  # the primary file counts
    assert any("joined" in note for note in particles.notes)


def _passed(uid: np.ndarray = UID) -> np.ndarray:
    """What a job passes on: here the images."""
    found = records(len(uid))
    found["uid"] = uid
    return found


def _alignments() -> np.ndarray:
    found = np.zeros(4, [("uid", "<u8"), ("alignments2D/class", "<u4")])
    found["uid"], found["alignments2D/class"] = UID, [3, 2, 1, 0]
    return found


@pytest.mark.parametrize(
    ("primary", "passthrough"),
    [
        ("particles_selected.cs", "J47_passthrough_particles_selected.cs"),
        ("particles_selected.cs", "P6_J47_passthrough_particles_selected.cs"),
        ("particles_selected.cs", "passthrough_particles_selected.cs"),
        ("J47_particles_selected.cs", "J47_passthrough_particles_selected.cs"),
        ("cryosparc_P62_J262_005_particles.cs", "P62_J262_passthrough_particles.cs"),
        ("cryosparc_P1_J7_020_particles.cs", "cryosparc_P1_J7_passthrough_particles.cs"),
        ("J262_005_particles.cs", "J262_passthrough_particles.cs"),
        ("split_0.cs", "J8_passthrough_split_0.cs"),
        ("extracted_particles.cs", "J10_passthrough_particles.cs"),
        ("J88_particles_exported.cs", "J88_passthrough_particles_exported.cs"),
        ("good.cs", "good_passthrough.cs"),
    ],
)
def test_passthrough_files_are_found_under_their_usual_names(
    project: Path, primary: str, passthrough: str
) -> None:
    folder = project / "J5"
    source = save(folder / primary, _alignments())
    save(folder / passthrough, _passed())
    # others of the same job, which hold other particles
    save(folder / "J5_passthrough_particles_excluded.cs", _passed(UID[:2]))
    (folder / "J5_passthrough_exposures.cs").write_bytes(b"damaged")
    particles = read(source)
    assert f"joined with {passthrough}" in particles.notes
    assert particles.table["class_id"].tolist() == [4, 3, 2, 1] and len(particles.images) == 4
    # and they go into a session and out of it again
    session = Session.create(project / "session", particles)
    assert session.source_path is not None
    assert cryosparc.passthrough_of(session.source_path) == session.source_path.with_name(passthrough)
    out = folder / "out.cs"
    export_particles(out, table=session.table.iloc[:2], source=session.source_path, kind="cs")
    assert cryosparc.load(folder / "out_passthrough.cs")["uid"].tolist() == UID[:2].tolist()
    # and what was written is read with its own, though others hold the same particles
    again = read(out)
    assert "joined with out_passthrough.cs" in again.notes and again.table["class_id"].tolist() == [4, 3]


def test_where_no_passthrough_fits_the_sentence_names_them(project: Path) -> None:
    source = save(project / "J5" / "particles.cs", _alignments())
    with pytest.raises(UserError, match=r"with its passthrough file beside it$"):
        read(source)
    save(project / "J5" / "J5_passthrough_particles.cs", _passed(UID[:3]))
    said = r"J5_passthrough_particles\.cs does not hold every particle of particles\.cs$"
    with pytest.raises(UserError, match=said):
        read(source)
    for name in ("a", "b"):
        save(project / "J5" / f"J5_passthrough_{name}.cs", _passed())
    with pytest.raises(UserError, match=r"several .*\(J5_passthrough_a\.cs, J5_passthrough_b\.cs\)"):
        read(source)


def test_the_passthrough_of_another_file_is_left_alone(project: Path) -> None:
    source = save(project / "J5" / "all.cs", records())
    save(project / "J5" / "good.cs", _alignments())
    save(project / "J5" / "good_passthrough.cs", _passed())
    assert read(source).notes == ()


@pytest.mark.parametrize("path", [b">J3/extract/s.mrc", b"J3/extract/012345678901234567890_s.mrc"])
def test_names_of_exported_groups(project: Path, path: bytes) -> None:
    assert len(read(save(project / "J9" / "p.cs", records(path=path)))) == 4


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (records(path=b"J3/extract/gone.mrc"), "cannot be found: J3/extract/gone.mrc"),
        (records(blob__idx=np.array([0, 1, 2, 4], "u4")), r"row 4: image 4 \(counted from 0\).* holds 4"),
        (records(uid=np.array([1, 2, 2, 3], "u8")), "not unique"),
        (records()[["uid", "blob/psize_A"]], "names no particle images"),
        (records(0), "lists no particles"),
        (np.zeros(4), "no cryoSPARC dataset"),
    ],
)
def test_what_is_wrong_is_one_right_sentence(project: Path, data: np.ndarray, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        read(save(project / "J5" / "p.cs", data))
    assert "\n" not in str(caught.value)


STREAM = (
    b'\x95CSDAT\xa4\0\0\0{"length": 5, "dtype": [["uid", "<u8"], ["a/text", "|O"], ["b/vec", "<f4", [2]], '
    b'["c", "<i2"]], "compression": "lz4", "compressed_fields": ["a/text", "b/vec", "c"]}'
    + (b"\x28\0\0\0" + np.arange(5, dtype="<u8").tobytes())
    + b"\x18\0\0\0\x13\x00\x01\x00\x13\x01\x08\x00\x13\x03\x08\x00\x04\x10\x00\x80\x06\0\0\0\0\0\0\0"
    b"\x28\0\0\0\x11\x00\x01\x00\xf0\x13\x80?\0\0\0@\0\0@@\0\0\x80@\0\0\xa0@\0\0\xc0@\0\0\xe0@\0\0\0A\0\0\x10A"
    b"\x0b\0\0\0\xa0\x00\x00\x01\x00\x02\x00\x03\x00\x04\x00"
    b"\0x\0\xc3\xbc\0long text\0"
)
"""As cryosparc-tools 5.0.3 wrote it: five rows with text, vectors and whole numbers."""


def test_the_compressed_form_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.cs").write_bytes(STREAM)
    found = cryosparc.load(tmp_path / "p.cs")
    assert found["uid"].tolist() == [0, 1, 2, 3, 4] and found["c"].tolist() == [0, 1, 2, 3, 4]
    assert [text.decode() for text in found["a/text"]] == ["", "x", "ü", "x", "long text"]
    assert found["b/vec"].tolist() == np.arange(10.0).reshape(5, 2).tolist()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:300], "ends within its field"),
        (lambda data: data.replace(b'"length": 5', b'"length": 6'), "40 bytes instead of 48"),
        (lambda data: data.replace(b'"length": 5', b'"length":-5'), "neither its length"),
        (lambda data: data.replace(b'"|O"', b'"|V"'), r"of type \|V"),
        (lambda data: data.replace(b"\x13\x00\x01\x00", b"\x13\x00\xff\xff"), "cannot be unpacked"),
        (lambda data: data[:-9], "leads outside its texts"),
        (lambda data: data.replace(b'"b/vec"', b'"uid"  '), "damaged"),
        (lambda data: data[:20], "damaged"),
    ],
)
def test_a_damaged_compressed_form_is_refused(tmp_path: Path, damage: Any, said: str) -> None:
    (tmp_path / "p.cs").write_bytes(damage(STREAM))
    with pytest.raises(UserError, match=said) as caught:
        cryosparc.load(tmp_path / "p.cs")
    assert "\n" not in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(st.lists(st.tuples(st.integers(0, len(STREAM)), st.integers(0, 255)), max_size=5))
def test_any_damage_of_the_compressed_form_is_read_or_refused(
    tmp_path: Path, edits: list[tuple[int, int]]
) -> None:
    content = bytearray(STREAM)
    for offset, value in edits:
        content[offset : offset + 1] = bytes([value])
    (tmp_path / "p.cs").write_bytes(content)
    try:
        found = cryosparc.load(tmp_path / "p.cs")
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert "uid" in (found.dtype.names or ())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=5), st.integers(0, 1500))
def test_any_damage_is_read_or_refused(project: Path, edits: list[tuple[int, int]], length: int) -> None:
    path = save(project / "J5" / "p.cs", records())
    content = bytearray(path.read_bytes())
    for offset, value in edits:
        if offset < len(content):
            content[offset] = value
    path.write_bytes(content[:length] if length < len(content) else content)
    try:
        particles = read(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    particles.images.read([0])
