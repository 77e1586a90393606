"""cryoSPARC groups out: what nobody set keeps its bytes, what was set is what cryoSPARC will read."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from particle_explorer.files import Stopped, UserError, replacing_all
from particle_explorer.io import cryosparc, cs_writing
from particle_explorer.io.mrc import write_stack
from particle_explorer.io.reading import read
from particle_explorer.io.writing import export_particles
from particle_explorer.particles import Particles
from particle_explorer.session import Session

UID = np.array([2**63 + 5, 17, 3, 2**53 + 1, 9, 12], np.uint64)
PSIZE_A, ALIGNED_A = 1.5, 3.0


def made(columns: dict[str, Any]) -> np.ndarray:
    records = np.empty(
        len(UID), [(name, np.asarray(v).dtype, np.asarray(v).shape[1:]) for name, v in columns.items()]
    )
    for name, values in columns.items():
        records[name] = values
    return records


def save(path: Path, records: np.ndarray) -> Path:
    with path.open("wb") as file:
        np.save(file, records)
    return path


def alignments(psize_A: float = ALIGNED_A) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "alignments2D/shift": rng.normal(size=(6, 2)).astype("f4"),
        "alignments2D/pose": rng.uniform(0, 6.28, 6).astype("f4"),
        "alignments2D/psize_A": np.full(6, psize_A, "f4"),
        "alignments2D/error": rng.normal(size=6).astype("f4"),
        "alignments2D/class": np.arange(6, dtype="u4") % 2,
    }


CSG = """created: 2024-01-01 00:00:00.000000
group:
  description: All particles that were processed
  name: particles
  title: All particles
  type: particle
results:
  blob:
    metafile: '>cryosparc_P1_J7_020_particles.cs'
    num_items: 6
    type: particle.blob
  ctf:
    metafile: '>cryosparc_P1_J7_passthrough_particles.cs'
    num_items: 6
    type: particle.ctf
version: v4.4.1
"""


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """A cryoSPARC job folder: particles, passthrough (in another order) and result group."""

    def make(aligned: str = "", passthrough: bool = True) -> Path:
        folder = tmp_path / "J7"
        (folder / "extract").mkdir(parents=True)
        write_stack(folder / "extract" / "s.mrc", np.random.default_rng(0).normal(size=(6, 8, 8)), PSIZE_A)
        primary = {
            "uid": UID,
            "blob/path": np.array([b"J7/extract/s.mrc"] * 6),
            "blob/idx": np.arange(6, dtype="u4")[::-1],
            "blob/shape": np.full((6, 2), 8, "u4"),
            "blob/psize_A": np.full(6, PSIZE_A, "f4"),
            "blob/sign": np.full(6, -1, "f4"),
            "odd/text": np.array([b"a", b"bc", b"", b"d e", b"\xc3\xbc", b"f"]),
            **(alignments() if aligned == "primary" else {}),
        }
        other = {
            "uid": UID,
            "ctf/df1_A": np.linspace(1e4, 2e4, 6).astype("f4"),
            "ctf/exp_group_id": np.full(6, 23, "u4"),
            **(alignments() if aligned == "passthrough" else {}),
        }
        source = save(folder / "cryosparc_P1_J7_020_particles.cs", made(primary))
        if passthrough:
            save(folder / "cryosparc_P1_J7_passthrough_particles.cs", made(other)[::-1])
            (folder / "cryosparc_P1_J7_020_particles.csg").write_text(CSG)
        return source

    return make


def export(out: Path, particles: Particles, **changes: Any) -> list[str]:
    group = cs_writing.group_file_of(particles.source) if particles.kind == "cs" else None
    return export_particles(
        out, table=particles.table, source=particles.source, kind=particles.kind, group_file=group, **changes
    )


@pytest.mark.parametrize("aligned", ["", "primary", "passthrough"])
def test_a_session_gives_back_every_byte(job: Any, tmp_path: Path, aligned: str) -> None:
    source = job(aligned)
    session = Session.create(tmp_path / "session", read(source))
    out = source.with_name("again.cs")
    assert session.source_path is not None and session.group_file is not None
    export_particles(
        out, table=session.table, source=session.source_path, kind="cs", group_file=session.group_file
    )
    before, after = cryosparc.load(source), cryosparc.load(out)
    assert after.dtype == before.dtype and after.tobytes() == before.tobytes()
    passed = cryosparc.load(source.with_name("cryosparc_P1_J7_passthrough_particles.cs"))
    again = cryosparc.load(source.with_name("again_passthrough.cs"))
    assert again.dtype == passed.dtype and again.tobytes() == passed.tobytes()
    assert (tmp_path / "J7" / "again.csg").read_text() == CSG.replace(
        "cryosparc_P1_J7_020_particles.cs", "again.cs"
    ).replace("cryosparc_P1_J7_passthrough_particles.cs", "again_passthrough.cs")


@pytest.mark.parametrize("aligned", ["", "primary", "passthrough"])
def test_a_selection_with_poses_changes_nothing_else(job: Any, aligned: str) -> None:
    source = job(aligned)
    rows = np.array([4, 0, 3])
    particles = read(source)[rows]
    out = source.with_name("good.cs")
    angle, shift = np.array([10.0, -170.0, 95.0]), np.array([[1.0, -2.0], [0.5, 3.0], [-4.0, 0.0]])
    notes = export(out, particles, class_id=[3, 1, 2], angle_deg=angle, shift_yx_px=shift)
    assert any("good.csg" in note for note in notes)
    order = np.argsort(rows)
    written, passed = cryosparc.load(out), cryosparc.load(source.with_name("good_passthrough.cs"))
    assert written["uid"].tolist() == UID[rows[order]].tolist()
    assert passed["uid"].tolist() == UID[rows[order]][::-1].tolist()
    changed = {f"alignments2D/{name}" for name in ("pose", "shift", "class")}
    for file, name in ((written, source.name), (passed, "cryosparc_P1_J7_passthrough_particles.cs")):
        before = cryosparc.load(source.with_name(name))
        before = before[np.isin(before["uid"], file["uid"])]
        for field in set(before.dtype.names) - changed:
            assert file[field].tobytes() == before[field].tobytes(), field
    home = passed[::-1] if aligned == "passthrough" else written
    unit = ALIGNED_A if aligned else PSIZE_A
    # by the definition: x_ref = R(pose) (x_particle + shift), shift in pixels of alignments2D/psize_A
    np.testing.assert_allclose(home["alignments2D/pose"], np.deg2rad(-angle[order]), atol=1e-6)
    np.testing.assert_allclose(home["alignments2D/shift"], -shift[order][:, ::-1] * PSIZE_A / unit, atol=1e-6)
    assert home["alignments2D/psize_A"].tolist() == [unit] * 3
    assert home["alignments2D/class"].tolist() == [0, 1, 2]  # from 0 there
    # and our reader, which finds the passthrough beside it, agrees
    again = read(out).table
    np.testing.assert_allclose(again["angle_deg"], angle[order], atol=1e-4)
    np.testing.assert_allclose(again[["shift_y_px", "shift_x_px"]], shift[order], atol=1e-5)
    assert again["class_id"].tolist() == [1, 2, 3]
    text = source.with_name("good.csg").read_text()
    assert text.count("num_items: 3") == text.count("metafile:") and "num_items: 6" not in text
    assert ("particle.alignments2D" in text) and ">good_passthrough.cs'" in text


@pytest.mark.parametrize("said", [PSIZE_A, 0.0])
@pytest.mark.parametrize("aligned", ["primary", "passthrough"])
def test_a_pixel_size_given_at_import_leaves_shifts_as_they_are(job: Any, aligned: str, said: float) -> None:
    """Only the ratio of the file's own sizes counts (or that to the size in the stack's header)."""
    source = job(aligned)
    records = cryosparc.load(source).copy()
    records["blob/psize_A"] = said
    save(source, records)
    particles = read(source)
    truth = particles.table[["angle_deg", "shift_y_px", "shift_x_px"]].copy()
    particles.table["pixel_size_A"] = 2.25
    out = source.with_name("o.cs")
    seen: list[Any] = []
    notes = export(
        out, particles, angle_deg=truth["angle_deg"],
        shift_yx_px=truth[["shift_y_px", "shift_x_px"]].to_numpy(), check=seen.append,
    )  # fmt: skip
    name = {"primary": "o.cs", "passthrough": "o_passthrough.cs"}[aligned]
    before = {"primary": source.name, "passthrough": "cryosparc_P1_J7_passthrough_particles.cs"}[aligned]
    for field in ("alignments2D/shift", "alignments2D/psize_A"):
        np.testing.assert_allclose(
            cryosparc.load(source.with_name(name))[field],
            cryosparc.load(source.with_name(before))[field], atol=1e-5,
        )  # fmt: skip
    np.testing.assert_allclose(seen[0][list(truth)], truth, atol=1e-4)
    np.testing.assert_allclose(read(out).table[list(truth)], truth, atol=1e-4)
    assert any("keeps its own pixel size, 1.5 Å" in note and "2.25 Å" in note for note in notes)


def test_the_check_of_poses_knows_nothing_of_a_size_given_at_import(
    job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shifts written by the size of the session are found out, as they are by any other program."""
    source = job("primary", passthrough=False)
    particles = read(source)
    meant = particles.table[["shift_y_px", "shift_x_px"]].to_numpy().copy()
    particles.table["pixel_size_A"] = 2.25
    with_poses = cs_writing.with_poses

    def wrong(group: Any, **words: Any) -> Any:
        return with_poses(group, **{**words, "own_A": words["given_A"]})

    monkeypatch.setattr(cs_writing, "with_poses", wrong)
    seen: list[Any] = []
    export(source.with_name("o.cs"), particles, angle_deg=np.zeros(6), shift_yx_px=meant, check=seen.append)
    np.testing.assert_allclose(seen[0][["shift_y_px", "shift_x_px"]], meant * 1.5, rtol=1e-5)


@pytest.mark.parametrize(
    "kept", [("shift", "pose", "class"), ("class",), ("shift", "pose"), ("pose", "psize_A")]
)
def test_older_files_with_some_of_the_alignments(job: Any, kept: tuple[str, ...]) -> None:
    source = job("primary", passthrough=False)
    fields = cryosparc.load(source).dtype.names or ()
    whole = cryosparc.load(source)
    names = [n for n in fields if not n.startswith("alignments2D/") or n.partition("/")[2] in kept]
    save(source, made({name: whole[name] for name in names}))
    particles = read(source)
    seen: list[Any] = []
    export(source.with_name("same.cs"), particles, check=seen.append)
    assert cryosparc.load(source.with_name("same.cs")).tobytes() == cryosparc.load(source).tobytes()
    for name in {"angle_deg", "shift_x_px", "class_id"} & set(seen[0]):
        np.testing.assert_allclose(seen[0][name], particles.table[name], atol=1e-4)
    assert ("shift_x_px" in seen[0]) == ("shift_x_px" in particles.table)
    # a class alone invents no pose
    export(source.with_name("class.cs"), particles, class_id=np.arange(6) + 1, check=seen.append)
    assert set(cryosparc.load(source.with_name("class.cs")).dtype.names) == {*names, "alignments2D/class"}
    shift = np.arange(12.0).reshape(6, 2)
    export(source.with_name("new.cs"), particles, angle_deg=np.arange(6.0), shift_yx_px=shift)
    again = read(source.with_name("new.cs")).table
    np.testing.assert_allclose(again[["shift_y_px", "shift_x_px"]], shift, atol=1e-5)
    np.testing.assert_allclose(again["angle_deg"], np.arange(6.0), atol=1e-4)


def test_a_file_without_alignments_gets_the_whole_slot(job: Any) -> None:
    source = job(passthrough=False)
    out = source.with_name("posed.cs")
    export(out, read(source), angle_deg=np.arange(6.0), shift_yx_px=np.zeros((6, 2)))
    written = cryosparc.load(out)
    wanted = [f"alignments2D/{name}" for name, _, _ in cs_writing.ALIGNMENTS]
    assert [name for name in written.dtype.names if name.startswith("alignments2D/")] == wanted
    assert (written["alignments2D/weight"] == 1).all() and (written["alignments2D/error"] == 0).all()
    assert not source.with_name("posed_passthrough.cs").exists()
    groups = re.findall(r"^  (\w+):$", out.with_suffix(".csg").read_text(), re.MULTILINE)
    assert {"alignments2D", "blob", "odd"} <= set(groups)


def test_latents_are_fields_of_their_own(job: Any) -> None:
    source = job(passthrough=False)
    export(source.with_name("z.cs"), read(source)[np.arange(4)], further={"z_0": np.arange(4) * 0.5})
    written = cryosparc.load(source.with_name("z.cs"))
    assert written["explorer/z_0"].tolist() == [0, 0.5, 1, 1.5]
    assert "particle.explorer" not in source.with_name("z.csg").read_text()
    # and can be set anew in what was made of such an export
    again = read(source.with_name("z.cs"))
    export(source.with_name("y.cs"), again, further={"z_0": np.arange(4) * 2.0})
    assert cryosparc.load(source.with_name("y.cs"))["explorer/z_0"].tolist() == [0, 2, 4, 6]
    assert "alignments2D" not in source.with_name("y.csg").read_text()


def test_a_star_file_becomes_a_small_group(render: Any) -> None:
    rendered = render()
    particles = read(rendered.star("a.star", "3.1"))
    out = rendered.folder / "exports" / "p.cs"
    angle = particles.table["angle_deg"].to_numpy()
    shift = particles.table[["shift_y_px", "shift_x_px"]].to_numpy()
    notes = export(out, particles, angle_deg=angle, shift_yx_px=shift)
    assert any("CTF is not known" in note for note in notes)
    records = cryosparc.load(out)
    assert set(records["blob/path"]) == {b">../stack.mrcs"} and records["blob/idx"].tolist() == list(
        range(24)
    )
    np.testing.assert_allclose(records["alignments2D/pose"], np.deg2rad(rendered.psi_deg), atol=1e-5)
    np.testing.assert_allclose(records["alignments2D/shift"], rendered.origin_xy_px, atol=1e-4)
    again = read(out)
    np.testing.assert_array_equal(again.images.read([5])[0, 0], rendered.images[5])
    np.testing.assert_allclose(again.table["angle_deg"], angle, atol=1e-4)


def test_what_cryosparc_cannot_read_is_said(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.zeros((3, 8, 8), "f4"))
    with pytest.raises(UserError, match="pixel size is not known"):
        export(tmp_path / "o.cs", read(tmp_path / "s.npy"))
    particles = read(tmp_path / "s.npy")
    particles.table["pixel_size_A"] = 2.0
    with pytest.raises(UserError, match=r"not of \.npy"):
        export(tmp_path / "o.cs", particles)
    assert os.listdir(tmp_path) == ["s.npy"]


@pytest.mark.parametrize("form", ["numpy", "stream"])
def test_cryosparc_s_own_library_reads_it_and_is_read(job: Any, form: str) -> None:
    dataset = pytest.importorskip("cryosparc.dataset", reason="cryosparc-tools is not installed")
    Dataset, CSDAT_FORMAT, NUMPY_FORMAT = dataset.Dataset, dataset.CSDAT_FORMAT, dataset.NUMPY_FORMAT
    source = job("primary", passthrough=False)
    plain = Dataset.load(str(source))
    plain.save(str(source), format=CSDAT_FORMAT if form == "stream" else NUMPY_FORMAT)
    before = cryosparc.load(source)
    out = source.with_name("o.cs")
    export(out, read(source)[np.array([1, 4])], class_id=[5, 6])
    loaded = Dataset.load(str(out))
    assert loaded["uid"].tolist() == UID[[1, 4]].tolist()
    assert loaded["alignments2D/class"].tolist() == [4, 5]
    assert [str(text) for text in loaded["odd/text"]] == ["bc", "ü"]
    for name in set(before.dtype.names) - {"alignments2D/class"}:
        assert cryosparc.load(out)[name].tobytes() == before[[1, 4]][name].tobytes()


def test_a_source_that_changed_since_is_noticed(job: Any) -> None:
    source = job(passthrough=False)
    particles = read(source)
    save(source, cryosparc.load(source)[:4])
    with pytest.raises(UserError, match="has changed since"):
        export(source.with_name("o.cs"), particles)


# ------------------------------------------------------------------ nothing is half written


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["o.cs", "o.star"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_leaves_nothing(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int
) -> None:
    particles = read(job("primary"))
    before = left(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=f"cannot write .*{name}: {os.strerror(error)}; nothing of it was kept"
    ):
        export(tmp_path / "J7" / name, particles, angle_deg=np.zeros(6))
    assert left(tmp_path) == before


@pytest.mark.skipif(os.name != "posix", reason="a limit of POSIX")
def test_a_file_that_grows_beyond_what_there_is_room_for(job: Any, tmp_path: Path) -> None:
    """The real thing: the system refuses the bytes, in the middle of a write."""
    import resource
    import signal

    particles = read(job("primary"))
    before = left(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        for name in ("o.cs", "o.star"):
            with pytest.raises(UserError, match="nothing of it was kept"):
                export(tmp_path / "J7" / name, particles, class_id=np.arange(1, 7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert left(tmp_path) == before


@pytest.mark.parametrize("name", ["o.cs", "o.star"])
def test_a_folder_that_must_not_be_written_to(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import tempfile

    particles = read(job("primary"))
    before = left(tmp_path)

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkstemp", denied)
    with pytest.raises(UserError, match=r"cannot write into .*J7: Permission denied"):
        export(tmp_path / "J7" / name, particles)
    assert left(tmp_path) == before


@pytest.mark.parametrize("name", ["o.cs", "o.star"])
def test_an_export_can_be_stopped(job: Any, tmp_path: Path, name: str) -> None:
    import threading

    particles = read(job("primary"))
    before = left(tmp_path)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match="nothing was written"):
        export(tmp_path / "J7" / name, particles, stop=stop)
    assert left(tmp_path) == before


def test_files_that_belong_together_appear_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a.cs", tmp_path / "a.csg"]
    with replacing_all(paths, overwrite=False) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
        assert not any(path.exists() for path in paths)
    assert [path.read_text() for path in paths] == ["new", "new"]
    paths[0].unlink()
    with (
        pytest.raises(UserError, match=r"a\.csg exists already"),
        replacing_all([tmp_path / "a.cs", tmp_path / "a.csg"], overwrite=False),
    ):
        raise AssertionError
    with (
        pytest.raises(UserError, match="exists already"),
        replacing_all(  # one appears meanwhile
            [tmp_path / "b.cs", tmp_path / "b.csg"], overwrite=False
        ),
    ):
        (tmp_path / "b.csg").write_text("theirs")
    assert left(tmp_path) == ["a.csg", "b.csg"] and (tmp_path / "b.csg").read_text() == "theirs"
