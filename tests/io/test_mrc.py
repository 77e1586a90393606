"""MRC stacks: mrcfile is the reference, damaged files are one sentence."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from particle_explorer.files import UserError
from particle_explorer.io import descriptors
from particle_explorer.io.descriptors import DescriptorPool
from particle_explorer.io.mrc import MrcFile, write_stack, write_stack_in_batches

NOISE = np.random.default_rng(0).normal(scale=20, size=(5, 9, 9))


def written_by_mrcfile(path: Path, data: np.ndarray, pixel_size: float = 1.7, **header: object) -> Path:
    with mrcfile.new(path, data=data) as mrc:
        if data.ndim == 3:
            mrc.set_image_stack()
        mrc.voxel_size = pixel_size
        for name, value in header.items():
            mrc.header[name] = value
    return path


def patched(path: Path, offset: int, data: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", ["i1", "i2", "f4", "u2", "f2"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_mode_in_both_byte_orders(tmp_path: Path, dtype: str, order: str) -> None:
    data = np.abs(NOISE).astype(np.dtype(order + dtype))
    mrc = MrcFile(written_by_mrcfile(tmp_path / "a.mrcs", data))
    assert (mrc.n_images, mrc.shape, mrc.notes) == (5, (1, 9, 9), ())
    assert mrc.pixel_size_A == pytest.approx(1.7, abs=1e-5)
    np.testing.assert_array_equal(
        mrc.read(np.array([4, 0, 2, 2]))[:, 0], data[[4, 0, 2, 2]].astype(np.float32)
    )


def test_extended_header(tmp_path: Path) -> None:
    with mrcfile.new(tmp_path / "a.mrcs", data=NOISE.astype(np.float32)) as mrc:
        mrc.set_extended_header(np.zeros(300, "u1"))
    read = MrcFile(tmp_path / "a.mrcs").read(np.arange(5))[:, 0]
    np.testing.assert_array_equal(read, NOISE.astype(np.float32))


def test_a_single_image_is_a_stack_of_one(tmp_path: Path) -> None:
    image = NOISE[0].astype(np.float32)
    mrc = MrcFile(written_by_mrcfile(tmp_path / "a.mrc", image))
    assert mrc.n_images == 1
    np.testing.assert_array_equal(mrc.read(np.array([0]))[0, 0], image)


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_pixel_sizes_0_and_1_mean_unknown(tmp_path: Path, size: float) -> None:
    assert np.isnan(MrcFile(written_by_mrcfile(tmp_path / "a.mrcs", NOISE.astype("f4"), size)).pixel_size_A)


@pytest.mark.parametrize(("offset", "data"), [(208, bytes(4)), (212, bytes(4)), (208, bytes(8))])
@pytest.mark.parametrize("order", ["<", ">"])
def test_missing_stamps_are_tolerated(tmp_path: Path, offset: int, data: bytes, order: str) -> None:
    path = patched(written_by_mrcfile(tmp_path / "a.mrcs", NOISE.astype(order + "f4")), offset, data)
    mrc = MrcFile(path)
    said = "\n".join(mrc.notes)
    assert ('lacks the "MAP" stamp' in said) == (offset == 208)
    assert ("machine stamp 00 00" in said) == (offset == 212 or len(data) == 8)
    np.testing.assert_array_equal(mrc.read(np.arange(5))[:, 0], NOISE.astype(np.float32))


def test_wrong_byte_order_stamp_is_noted(tmp_path: Path) -> None:
    path = patched(written_by_mrcfile(tmp_path / "a.mrcs", NOISE.astype("<f4")), 212, b"\x11\x11")
    mrc = MrcFile(path)
    assert "byte order" in mrc.notes[0]
    np.testing.assert_array_equal(mrc.read(np.arange(5))[:, 0], NOISE.astype(np.float32))


def test_bytes_after_the_data_are_noted(tmp_path: Path) -> None:
    path = written_by_mrcfile(tmp_path / "a.mrcs", NOISE.astype("f4"))
    path.write_bytes(path.read_bytes() + b"tail")
    assert "4 bytes after" in MrcFile(path).notes[0]


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (12, struct.pack("<i", 4), "mode 4"),
        (12, struct.pack("<i", 99), "mode 99"),
        (8, struct.pack("<i", 2**30), "cut short"),
        (8, struct.pack("<i", 0), "damaged"),
        (0, struct.pack("<i", 8), "square"),
        (0, struct.pack("<2i", -9, -9), "damaged"),
        (0, struct.pack("<2i", 10**6, 10**6), "damaged"),
        (92, struct.pack("<i", -1024), "cut short"),
        (92, struct.pack("<i", 2**31 - 1), "cut short"),
        (88, struct.pack("<i", 401), "volumes"),
        (0, b"\x1f\x8b\x08\x00", "gzip"),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, offset: int, data: bytes, said: str) -> None:
    path = patched(written_by_mrcfile(tmp_path / "a.mrcs", NOISE.astype("f4")), offset, data)
    with pytest.raises(UserError, match=said) as caught:
        MrcFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 5, 1023, 1024, 1500])
def test_cut_files_are_one_sentence(tmp_path: Path, size: int) -> None:
    path = written_by_mrcfile(tmp_path / "a.mrcs", NOISE.astype("f4"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"cut short|no MRC file"):
        MrcFile(path)


def test_a_file_that_shrinks_or_goes_after_opening(tmp_path: Path) -> None:
    path = written_by_mrcfile(tmp_path / "a.mrcs", NOISE.astype("f4"))
    mrc = MrcFile(path)
    with path.open("r+b") as file:
        file.truncate(1200)
    with pytest.raises(UserError, match="shorter than when it was opened"):
        mrc.read(np.array([4]))
    other = MrcFile(written_by_mrcfile(tmp_path / "b.mrcs", NOISE.astype("f4")), pool := DescriptorPool())
    pool.close()
    (tmp_path / "b.mrcs").unlink()
    with pytest.raises(UserError, match="cannot read"):
        other.read(np.array([4]))


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 223), st.integers(0, 255)), max_size=6), st.integers(0, 2700))
def test_any_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], length: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz-mrc"
    folder.mkdir(exist_ok=True)
    path = folder / "a.mrcs"
    if path.exists():
        path.unlink()
    content = bytearray(written_by_mrcfile(path, NOISE.astype("f4")).read_bytes())
    for offset, value in edits:
        content[offset] = value
    path.write_bytes(content[:length] if length < 1300 else content)
    try:
        mrc = MrcFile(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    image = mrc.read(np.array([mrc.n_images - 1]))
    assert image.shape == (1, *mrc.shape) and image.nbytes <= 4 * path.stat().st_size


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_what_mrcfile_reads(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.mrcs"
    write_stack(path, NOISE, 1.34, dtype=dtype)
    # in float16 mrcfile's own check of the statistics overflows
    assert dtype == "float16" or mrcfile.validate(path)
    with mrcfile.open(path) as mrc:
        assert mrc.is_image_stack() and mrc.header.ispg == 0 and mrc.header.mz == 1
        assert mrc.voxel_size.x == pytest.approx(1.34, abs=1e-5)
        np.testing.assert_array_equal(mrc.data, NOISE.astype(dtype))
        assert mrc.header.dmean == pytest.approx(NOISE.mean(), abs=0.01)
        assert mrc.header.rms == pytest.approx(NOISE.std(), rel=1e-3)
    np.testing.assert_array_equal(
        MrcFile(path).read(np.arange(5))[:, 0], NOISE.astype(dtype).astype(np.float32)
    )


def test_writing_in_batches_is_writing_at_once(tmp_path: Path) -> None:
    write_stack(tmp_path / "a.mrcs", NOISE, np.nan)
    write_stack_in_batches(tmp_path / "b.mrcs", (NOISE[i : i + 2] for i in (0, 2, 4)), 5, 9, np.nan)
    assert (tmp_path / "a.mrcs").read_bytes() == (tmp_path / "b.mrcs").read_bytes()
    assert np.isnan(MrcFile(tmp_path / "a.mrcs").pixel_size_A)


def test_writing_never_replaces_unasked_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "a.mrcs"
    write_stack(path, NOISE, 1.0)
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_stack(path, 2 * NOISE, 1.0)
    with pytest.raises(ValueError, match="announced"):
        write_stack_in_batches(path, [NOISE], 6, 9, 1.0, overwrite=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.mrcs"]


def test_thousands_of_files_need_few_descriptors(tmp_path: Path) -> None:
    pool = DescriptorPool(limit=3)
    files = []
    for i in range(20):
        write_stack(tmp_path / f"{i}.mrcs", NOISE + i, 1.2)
        files.append(MrcFile(tmp_path / f"{i}.mrcs", pool))
    for i, file in enumerate(files):
        np.testing.assert_allclose(file.read(np.array([3]))[0, 0], NOISE[3] + i, rtol=1e-5)
    assert len(pool._open) <= 3


@pytest.mark.parametrize("has_pread", [True, False])
def test_reading_from_several_threads(
    tmp_path: Path, has_pread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as on Windows, where seek and read share one position."""
    if not has_pread:
        monkeypatch.delattr(descriptors.os, "pread")
    pool = DescriptorPool(limit=1)
    paths = [tmp_path / "a.mrcs", tmp_path / "b.mrcs"]
    for k, path in enumerate(paths):
        write_stack(path, np.arange(50.0)[:, None, None] + np.full((50, 8, 8), 100.0 * k), 1.2)
    files = [MrcFile(path, pool) for path in paths]
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            k, rows = int(rng.integers(2)), rng.integers(0, 50, 3)
            got = files[k].read(rows)[:, 0, 5, 5]
            if not np.array_equal(got, rows + 100.0 * k):
                wrong.append((k, rows, got))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stack_larger_than_memory_opens_at_once(tmp_path: Path) -> None:
    """A sparse file of 52 GB: 200 000 images of 256 px."""
    path = tmp_path / "huge.mrcs"
    write_stack(path, np.zeros((1, 256, 256)), 1.2)
    patched(path, 8, struct.pack("<i", 200_000))
    last = np.random.default_rng(0).normal(size=(256, 256)).astype("<f4")
    with path.open("r+b") as file:
        file.seek(1024 + 199_999 * last.nbytes)
        file.write(last.tobytes())
    mrc = MrcFile(path)
    assert mrc.n_images == 200_000
    np.testing.assert_array_equal(mrc.read(np.array([199_999]))[0, 0], last)
