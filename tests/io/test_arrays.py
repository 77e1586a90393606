"""Stacks in .npy files and in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from particle_explorer.files import UserError
from particle_explorer.io.reading import open_stacks, read, read_array

IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8))


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f4", "u1", "i2", "f2", "bool"])
def test_npy_of_any_number_type(tmp_path: Path, dtype: str) -> None:
    data = np.abs(IMAGES * 9).astype(dtype)
    np.save(tmp_path / "a.npy", data)
    particles = read(tmp_path / "a.npy")
    assert particles.kind == "npy" and len(particles) == 6
    np.testing.assert_array_equal(particles.images.read(range(6))[:, 0], data.astype(np.float32))


@pytest.mark.parametrize("shape", [(6, 8, 8), (8, 8), (5, 1, 8, 8), (5, 3, 8, 8), (5, 8, 8, 3), (5, 8, 8, 1)])
def test_shapes_of_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    data = np.random.default_rng(1).normal(size=shape).astype("f4")
    np.save(tmp_path / "a.npy", data)
    from_file = read(tmp_path / "a.npy").images.read([-1])[0]
    wanted = data.reshape(-1, *shape[-3:])[-1] if len(shape) == 4 else data.reshape(-1, 1, 8, 8)[-1]
    if len(shape) == 4 and shape[-1] in (1, 3):
        wanted = wanted.transpose(2, 0, 1)
    np.testing.assert_array_equal(from_file, wanted)
    np.testing.assert_array_equal(read_array(data, "a").images.read([-1])[0], wanted)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (np.zeros((4, 8, 9)), "4×8×9"),
        (np.zeros((1319, 2)), "1319×2"),
        (np.zeros(7), "7"),
        (np.zeros((0, 8, 8)), "no images"),
        (np.zeros((2, 8, 8), complex), "complex"),
        (np.zeros((2, 8, 8), "S3"), "S3"),
        (np.array([{}, None]), "pickled"),
        (np.asfortranarray(IMAGES), "ascontiguousarray"),
    ],
)
def test_what_is_no_stack_is_one_sentence(tmp_path: Path, data: np.ndarray, said: str) -> None:
    np.save(tmp_path / "a.npy", data)
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)


@given(
    st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), min_size=1, max_size=5),
    st.integers(0, 4000),
)
def test_any_npy_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.npy"
    np.save(path, IMAGES.astype("f4"))
    content = bytearray(path.read_bytes())
    for offset, value in edits:
        content[offset] = value
    path.write_bytes(content[:length])
    try:
        particles = read(path)
    except UserError:
        return
    particles.images.read([len(particles) - 1])


def test_a_lazy_array_is_read_image_by_image() -> None:
    asked: list[int] = []

    class Lazy:
        shape, dtype = (1_000_000, 8, 8), np.dtype("f4")

        def __getitem__(self, index: int) -> np.ndarray:
            asked.append(index)
            return np.full((8, 8), index, "f4")

    particles = read_array(Lazy(), "lazy", 2.5)
    assert (particles.kind, particles.table["pixel_size_A"].iloc[0]) == ("layer", 2.5)
    np.testing.assert_array_equal(particles.images.read([7, 3])[:, 0, 0, 0], [7, 3])
    assert asked == [7, 3]


def test_opening_again_from_the_table(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    particles = read(tmp_path / "a.npy")[np.array([5, 2])]
    np.testing.assert_array_equal(open_stacks(particles.table).read([0, 1]), particles.images.read([0, 1]))
    np.save(tmp_path / "a.npy", IMAGES[:4])
    with pytest.raises(UserError, match="holds 4 images now"):
        open_stacks(particles.table)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(UserError, match="not there any more"):
        open_stacks(particles.table)
    with pytest.raises(UserError, match="memory only"):
        open_stacks(read_array(IMAGES, "a").table)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.doc", "no kind"),
        ("a.map", "3-D map"),
        ("a.star.gz", "compressed"),
        ("", "holds no pictures"),
        ("a.vol", "3-D map"),
        ("b.star", "not exist"),
    ],
)
def test_what_is_not_read_says_what_is(tmp_path: Path, name: str, said: str) -> None:
    if name and name != "b.star":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=said):
        read(tmp_path / name)
