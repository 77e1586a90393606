"""Stacks of every kind: what another program wrote is read image by image, and opened again from the "
"table."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from particle_explorer.configs import PreprocessConfig
from particle_explorer.files import UserError
from particle_explorer.io import pictures, unpacking
from particle_explorer.io.mrc import write_stack
from particle_explorer.io.reading import open_stacks, read
from particle_explorer.session import Session

GREY = np.random.default_rng(0).normal(scale=20, size=(5, 12, 12)).astype("f4")
COLOUR = np.random.default_rng(1).integers(0, 255, (5, 12, 12, 3)).astype("u1")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fuzz = _load("fuzz")


def _gz(path: Path) -> np.ndarray:
    write_stack(path.with_suffix(""), GREY, 1.7)
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
    path.with_suffix("").unlink()
    return GREY


def _bz2(path: Path) -> np.ndarray:
    write_stack(path.with_suffix(""), GREY, 1.7)
    path.write_bytes(bz2.compress(path.with_suffix("").read_bytes()))
    path.with_suffix("").unlink()
    return GREY


def _npz(path: Path) -> np.ndarray:
    np.savez_compressed(path, images=COLOUR, kind=np.arange(5), other=GREY[:2], poses=np.zeros((5, 3, 3)))
    return COLOUR


def _npz_stored(path: Path) -> np.ndarray:
    np.savez(path, images=GREY)
    return GREY


def _spider(path: Path) -> np.ndarray:
    path.write_bytes(fuzz.spider(GREY))
    return GREY


def _spider_big(path: Path) -> np.ndarray:
    path.write_bytes(fuzz.spider(GREY, ">"))
    return GREY


def _imagic(kind: bytes, order: str = "<") -> Callable[[Path], np.ndarray]:
    def make(path: Path) -> np.ndarray:
        data = np.abs(GREY).round() if kind == b"PACK" else GREY.round() if kind == b"INTG" else GREY
        hed, img = fuzz.imagic(data, order, kind)
        path.with_suffix(".hed").write_bytes(hed)
        path.with_suffix(".img").write_bytes(img)
        return data

    return make


def _eman(path: Path) -> np.ndarray:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for i in (3, 0, 4, 1, 2):  # EMAN2's names are numbers, not an order
            group = file.create_group(f"MDF/images/{i}")
            group["image"] = GREY[i]
            group.attrs["EMAN.apix_x"] = 1.7
    return GREY


def _h5(path: Path) -> np.ndarray:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.create_dataset("a/b/stack", data=COLOUR, chunks=(1, 12, 12, 3), compression="gzip")
        file["table"] = np.arange(9)
    return COLOUR


def _tif(**how: Any) -> Callable[[Path], np.ndarray]:
    def make(path: Path) -> np.ndarray:
        tifffile = pytest.importorskip("tifffile")
        data = COLOUR if how.get("photometric") == "rgb" else GREY
        tifffile.imwrite(path, data, **how)
        return data

    return make


def _zarr(version: int, in_group: bool) -> Callable[[Path], np.ndarray]:
    def make(path: Path) -> np.ndarray:
        zarr = pytest.importorskip("zarr")
        how = {"shape": GREY.shape, "chunks": (2, 12, 12), "dtype": "f4"}
        if in_group:  # as OME-Zarr: the full size and a smaller copy
            root = zarr.open_group(path, mode="w", zarr_format=version)
            root.create_array("0", **how)[:] = GREY
            root.create_array("1", **{**how, "shape": (5, 6, 6), "chunks": (5, 6, 6)})[:] = GREY[:, ::2, ::2]
        else:
            zarr.create_array(path, zarr_format=version, **how)[:] = GREY
        return GREY

    return make


KINDS: list[tuple[str, str, Callable[[Path], np.ndarray], float]] = [
    ("a.mrcs.gz", "mrc", _gz, 1.7),
    ("a.mrcs.bz2", "mrc", _bz2, 1.7),
    ("a.npz", "npz", _npz, np.nan),
    ("stored.npz", "npz", _npz_stored, np.nan),
    ("a.spi", "spider", _spider, 2.5),
    ("a.stk", "spider", _spider_big, 2.5),
    ("a.hed", "imagic", _imagic(b"REAL"), np.nan),
    ("big.img", "imagic", _imagic(b"REAL", ">"), np.nan),
    ("int.hed", "imagic", _imagic(b"INTG"), np.nan),
    ("byte.hed", "imagic", _imagic(b"PACK"), np.nan),
    ("a.hdf", "hdf", _eman, 1.7),
    ("a.h5", "hdf", _h5, np.nan),
    ("a.tif", "tiff", _tif(photometric="minisblack"), np.nan),
    ("big.tif", "tiff", _tif(photometric="minisblack", byteorder=">"), np.nan),
    ("zlib.tif", "tiff", _tif(photometric="minisblack", compression="zlib"), np.nan),
    ("rgb.tif", "tiff", _tif(photometric="rgb", compression="zlib"), np.nan),
    ("imagej.tif", "tiff", _tif(imagej=True, resolution=(5.0, 5.0), metadata={"unit": "nm"}), 2.0),
    ("v2.zarr", "zarr", _zarr(2, False), np.nan),
    ("v3.zarr", "zarr", _zarr(3, False), np.nan),
    ("ome.zarr", "zarr", _zarr(2, True), np.nan),
]


@pytest.mark.parametrize(("name", "kind", "make", "size"), KINDS, ids=[kind[0] for kind in KINDS])
def test_a_stack_of_another_program(
    tmp_path: Path, name: str, kind: str, make: Callable[[Path], np.ndarray], size: float
) -> None:
    data = make(tmp_path / name).astype(np.float32)
    wanted = data[:, None] if data.ndim == 3 else np.moveaxis(data, -1, 1)
    particles = read(tmp_path / name)
    table = particles.table
    assert (particles.kind, len(particles)) == (kind, 5)
    assert table["pixel_size_A"].iloc[0] == pytest.approx(size, abs=1e-5, nan_ok=True)
    np.testing.assert_array_equal(particles.images.read([4, 0, 2, 2]), wanted[[4, 0, 2, 2]])
    again = open_stacks(table.iloc[[3, 1]])
    np.testing.assert_array_equal(again.read([0, 1]), wanted[[3, 1]])


@pytest.mark.parametrize(("name", "make"), [("a.mrcs.gz", _gz), ("a.hdf", _eman), ("a.npz", _npz)])
def test_a_session_opens_its_originals_again(
    tmp_path: Path, name: str, make: Callable[[Path], np.ndarray]
) -> None:
    make(tmp_path / name)
    made = Session.create(tmp_path / "s", read(tmp_path / name), PreprocessConfig(background="none"))
    before = made.images[:]
    (tmp_path / "s" / "images.npy").unlink()
    again = Session.open(tmp_path / "s")
    again.prepare_images()
    np.testing.assert_array_equal(again.images[:], before)


def test_labels_of_an_archive_are_columns(tmp_path: Path) -> None:
    _npz(tmp_path / "a.npz")
    particles = read(tmp_path / "a.npz")
    assert particles.table["kind"].tolist() == [0, 1, 2, 3, 4]
    assert "holds 2 arrays of images; images, the largest, is read, not other" in particles.notes[0]


def test_a_star_file_over_stacks_of_several_kinds(tmp_path: Path) -> None:
    write_stack(tmp_path / "a.mrcs", GREY, 1.7)
    _spider(tmp_path / "b.spi")
    _gz(tmp_path / "c.mrcs.gz")
    rows = "".join(f"{i}@{name}\n" for i in (2, 5) for name in ("a.mrcs", "b.spi", "c.mrcs.gz"))
    (tmp_path / "p.star").write_text(f"data_\n\nloop_\n_rlnImageName #1\n{rows}")
    particles = read(tmp_path / "p.star")
    np.testing.assert_array_equal(particles.images.read(range(6))[:, 0], GREY[[1, 1, 1, 4, 4, 4]])


def test_a_folder_of_pictures_in_folders(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    tifffile = pytest.importorskip("tifffile")
    for i, pixels in enumerate(COLOUR):
        folder = tmp_path / ("round" if i % 2 else "spiral")
        folder.mkdir(exist_ok=True)
        image.fromarray(pixels).save(folder / f"g{i + 8}.png")
    tifffile.imwrite(tmp_path / "spiral" / "stack.tif", COLOUR[:2], photometric="rgb")
    (tmp_path / "readme.txt").write_text("no picture")
    particles = read(tmp_path)
    table = particles.table
    assert particles.kind == "pictures" and particles.images.n_channels == 3
    names = [Path(path).name for path in table["stack_path"]]
    assert names == ["g9.png", "g11.png", "g8.png", "g10.png", "g12.png", "stack.tif", "stack.tif"]
    assert table["folder"].tolist() == ["round"] * 2 + ["spiral"] * 5
    np.testing.assert_array_equal(
        particles.images.read(range(7)), np.moveaxis(COLOUR[[1, 3, 0, 2, 4, 0, 1]], -1, 1).astype("f4")
    )
    np.testing.assert_array_equal(open_stacks(table.iloc[[6]]).read([0])[0], np.moveaxis(COLOUR[1], -1, 0))
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    assert read(moved).table.index.tolist() == table.index.tolist(), "identity does not depend on the place"
    moved.rename(tmp_path)


def test_pictures_that_do_not_fit_are_left_out_with_a_note(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for i in range(3):
        image.fromarray(COLOUR[i]).save(tmp_path / f"{i}.png")
    image.fromarray(COLOUR[0, :, :, 0]).save(tmp_path / "grey.png")
    image.fromarray(COLOUR[0, :5]).save(tmp_path / "wide.png")
    (tmp_path / "broken.jpg").write_bytes(b"nothing")
    particles = read(tmp_path)
    text = "\n".join(particles.notes)
    assert len(particles) == 3
    assert "broken.jpg" in text and "so are 1 more" in text and "grey.png" in text


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("I;16", 1), ("RGBA", 3), ("P", 3), ("1", 1)])
def test_modes_of_pictures(tmp_path: Path, mode: str, channels: int) -> None:
    image = pytest.importorskip("PIL.Image")
    if mode == "I;16":
        picture = image.fromarray((GREY[0] * 100 + 30_000).astype("u2"))
    else:
        picture = image.fromarray(COLOUR[0]).convert(mode)
    picture.save(tmp_path / "a.png")
    particles = read(tmp_path / "a.png")
    assert particles.images.n_channels == channels and np.isfinite(particles.images[0]).all()
    if mode == "I;16":
        np.testing.assert_array_equal(particles.images[0][0], (GREY[0] * 100 + 30_000).astype("u2"))


@pytest.mark.parametrize("way", ["external", "soft", "virtual", "raw"])
def test_hdf5_leads_to_no_other_file(tmp_path: Path, way: str) -> None:
    """Links and data in other files are refused in a sentence, and never opened."""
    h5py = pytest.importorskip("h5py")
    secret = tmp_path / "secret"
    secret.mkdir()
    with h5py.File(secret / "s.h5", "w") as file:
        file["stack"], file["MDF/images/0/image"] = GREY, GREY[0]
    (secret / "raw.bin").write_bytes(GREY.tobytes())
    paths = {name: tmp_path / f"{name}.hdf" for name in ("array", "eman")}
    with h5py.File(paths["array"], "w") as file, h5py.File(paths["eman"], "w") as eman:
        eman.create_group("MDF/images/0")
        if way == "external":
            file["x"] = h5py.ExternalLink(str(secret / "s.h5"), "/stack")
            eman["MDF/images/0/image"] = h5py.ExternalLink(str(secret / "s.h5"), "/stack")
        elif way == "soft":
            file["ext"] = h5py.ExternalLink(str(secret / "s.h5"), "/")
            file["x"] = h5py.SoftLink("/ext/stack")
            eman["ext"] = h5py.ExternalLink(str(secret / "s.h5"), "/")
            del eman["MDF/images"]
            eman["MDF/images"] = h5py.SoftLink("/ext/MDF/images")
        elif way == "virtual":
            layout = h5py.VirtualLayout(GREY.shape, "f4")
            layout[:] = h5py.VirtualSource(secret / "s.h5", "stack", GREY.shape)
            file.create_virtual_dataset("x", layout)
            layout = h5py.VirtualLayout(GREY.shape[1:], "f4")
            layout[:] = h5py.VirtualSource(secret / "s.h5", "MDF/images/0/image", GREY.shape[1:])
            eman.create_virtual_dataset("MDF/images/0/image", layout)
        else:
            where = [(str(secret / "raw.bin"), 0, GREY.nbytes)]
            file.create_dataset("x", shape=GREY.shape, dtype="f4", external=where)
            eman.create_dataset("MDF/images/0/image", shape=(12, 12), dtype="f4", external=where)
    os.rename(secret, tmp_path / "gone")  # were they followed, the sentence would speak of it
    for path in paths.values():
        with pytest.raises(UserError) as caught:
            read(path)
        assert "secret" not in str(caught.value)


def test_an_archive_writes_nothing_under_its_own_names(tmp_path: Path) -> None:
    import io
    import zipfile

    stream = io.BytesIO()
    np.save(stream, GREY)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("../../outside.npy", stream.getvalue())
    before = set(tmp_path.parent.parent.iterdir()) | set(tmp_path.parent.iterdir())
    particles = read(tmp_path / "a.npz")
    np.testing.assert_array_equal(particles.images.read(range(5))[:, 0], GREY)
    assert set(tmp_path.parent.parent.iterdir()) | set(tmp_path.parent.iterdir()) == before


def test_what_an_archive_cannot_hold_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _gz(tmp_path / "a.mrcs.gz")
    usage = __import__("shutil").disk_usage(tmp_path)
    monkeypatch.setattr(unpacking.shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(UserError, match="TMPDIR"):
        read(tmp_path / "a.mrcs.gz")
    content = gzip.decompress((tmp_path / "a.mrcs.gz").read_bytes())
    (tmp_path / "b.mrcs.gz").write_bytes(
        gzip.compress(content[:8] + (2**30).to_bytes(4, "little") + content[12:])
    )
    with pytest.raises(UserError, match="more than a gzip file of its length can hold"):
        read(tmp_path / "b.mrcs.gz")


def test_a_compressed_stack_is_unpacked_once(tmp_path: Path) -> None:
    _gz(tmp_path / "a.mrcs.gz")
    read(tmp_path / "a.mrcs.gz")
    n = len(unpacking._done)
    assert "compressed with gzip" in read(tmp_path / "a.mrcs.gz").notes[0]
    assert len(unpacking._done) == n


@pytest.mark.parametrize("name", ["a.hdf", "a.tif", "a.png", "a.zarr"])
def test_a_missing_library_names_the_extra(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    def missing(module: str) -> Any:
        raise ImportError(module)

    (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r'pip install "napari-particle-explorer\[formats\]"'):
        read(tmp_path / name)


def test_numbers_in_names_sort_as_people_count() -> None:
    assert sorted(["img10", "img2", "a"], key=pictures._as_numbered) == ["a", "img2", "img10"]


@pytest.mark.parametrize("version", ["", "# version 30001", "# version 40001", "# version 50001"])
def test_star_files_of_every_version(tmp_path: Path, version: str) -> None:
    """The optics table is what tells the dialects; the tag is a comment, other tables are left alone."""
    for name in ("a", "b"):
        write_stack(tmp_path / f"{name}.mrcs", GREY + 100 * (name == "b"), 1.7)
    optics = "_rlnOpticsGroup\n_rlnOpticsGroupName\n_rlnImagePixelSize\n_rlnImageSize\n_rlnVoltage\n"
    optics += "_rlnSphericalAberration\n_rlnCtfDataAreCtfPremultiplied\n"
    rows = ["1@a.mrcs 1 0 1.7 -3.4 9e3", "5@b.mrcs 2 90 0 0 1e4", "2@a.mrcs 1 0 0 0 1e4"]
    labels = ["rlnImageName", "rlnOpticsGroup", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"]
    text = f"{version}\n\ndata_general\n\n_rlnTomoSubTomosAre2DStacks 1\n\n"
    text += f"{version}\n\ndata_optics\n\nloop_\n{optics}"
    text += '1 one 1.7 12 300 2.7 0\n2 "second group" 3.4 12 200 2.0 1\n\n'
    text += f"{version}\n\ndata_particles\n\nloop_\n"
    text += "".join(f"_{label}\n" for label in [*labels, "rlnDefocusU"])
    (tmp_path / "p.star").write_text(text + "\n".join(rows) + "\n")
    particles = read(tmp_path / "p.star")
    table = particles.table
    np.testing.assert_array_equal(particles.images.read(range(3))[:, 0], [GREY[0], (GREY + 100)[4], GREY[1]])
    assert table["pixel_size_A"].tolist() == [1.7, 3.4, 1.7]
    assert table["voltage_kV"].tolist() == [300, 200, 300]
    assert table["ctf_state"].tolist() == ["raw", "premultiplied", "raw"]
    np.testing.assert_allclose(table[["shift_x_px", "shift_y_px"]].iloc[0], [-1, 2])
    assert table["rlnOpticsGroupName"].tolist() == ["one", "second group", "one"]


def test_every_test_of_the_conformance_table_is_there() -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "formats.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    for file, test in named:
        path = root / file if "/" in file else Path(__file__).with_name(file)
        assert f"def {test}(" in path.read_text(encoding="utf-8"), f"{file}::{test}"
