"""Particles: identity, conditions and lazy images."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from particle_explorer.files import UserError
from particle_explorer.io.arrays import ArrayFile
from particle_explorer.io.reading import read_array
from particle_explorer.particles import ImageStack, make_uids, random_subset, where_mask


def images(n: int, box: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, box, box)).astype(np.float32)


@pytest.fixture
def stack() -> ImageStack:
    """Rows 0 … 6 over two files, mixed and with a repeat."""
    files = [ArrayFile(images(4, 8, 0), "a"), ArrayFile(images(5, 8, 1), "b")]
    return ImageStack(files, [0, 1, 1, 0, 1, 0, 0], [3, 0, 4, 0, 2, 1, 3])


def test_read_gives_rows_in_the_order_asked_for(stack: ImageStack) -> None:
    rows = [6, 2, 0, 2, -1]
    got = stack.read(rows)
    assert got.shape == (5, 1, 8, 8) and got.dtype == np.float32
    np.testing.assert_array_equal(got, np.stack([stack[row] for row in rows]))
    np.testing.assert_array_equal(stack[2][0], images(5, 8, 1)[4])


def test_take_is_the_same_as_reading_those_rows(stack: ImageStack) -> None:
    mask = np.array([1, 0, 1, 1, 0, 0, 1], bool)
    np.testing.assert_array_equal(stack.take(mask).read(range(4)), stack.read(np.flatnonzero(mask)))
    assert len(stack.take([])) == 0
    assert stack.take([]).read([]).shape[0] == 0


def test_a_stack_refuses_to_become_one_array(stack: ImageStack) -> None:
    with pytest.raises(TypeError, match="larger than memory"):
        np.asarray(stack)


def test_mixed_boxes_can_be_held_but_not_read_together() -> None:
    stack = ImageStack([ArrayFile(images(2, 8), "a"), ArrayFile(images(2, 10), "b")], [0, 1, 0], [0, 0, 1])
    assert stack.box_px.tolist() == [8, 10, 8]
    assert stack.read([0, 2]).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="8, 10"):
        stack.read([0, 1])


def test_a_subset_of_particles_keeps_images_and_rows_together() -> None:
    particles = read_array(images(6, 8), "layer")
    some = particles[np.array([4, 1])]
    assert some.table["source_row"].tolist() == [4, 1]
    np.testing.assert_array_equal(some.images[0], particles.images[4])


def test_uids_are_the_hash_of_name_and_occurrence() -> None:
    names = ["1@a.mrcs", "2@a.mrcs", "1@a.mrcs"]
    uids = make_uids(names)
    assert uids.dtype == np.uint64 and len(set(uids.tolist())) == 3
    digest = hashlib.blake2b(b"1@a.mrcs\n1", digest_size=8).digest()
    assert int(uids[2]) == int.from_bytes(digest, "little")
    np.testing.assert_array_equal(make_uids(names[:2]), uids[:2])


def test_uids_of_a_bare_stack_do_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    from particle_explorer.io.reading import read

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "stack.npy", images(3, 8))
    a, b = (read(tmp_path / folder / "stack.npy").table for folder in ("a", "b"))
    assert a.index.equals(b.index)


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "class_id": [1, 2, 3, 3],
            "defocus_u_A": [1e4, 2e4, 3e4, np.nan],
            "micrograph": ["a.mrc", "b c.mrc", "a.mrc", "and"],
            "good": [True, False, True, True],
            "alignments2D/shift[0]": [0.5, -1.0, 0.0, 2.0],
        },
        index=pd.Index([1, 2, 3, 2**63 + 1], dtype="uint64", name="uid"),
    )


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", [0, 1, 2, 3]),
        ("class_id == 3", [2, 3]),
        ("class_id==3 and defocus_u_A >= 3e4", [2]),
        ("class_id != 1 AND class_id < 3", [1]),
        ("micrograph == a.mrc", [0, 2]),
        ('micrograph == "b c.mrc"', [1]),
        ("micrograph != 'a.mrc'", [1, 3]),
        ('micrograph == "and" and class_id > 1', [3]),
        ("good == true", [0, 2, 3]),
        ("good == False", [1]),
        ("alignments2D/shift[0] < 0", [1]),
        ("`class_id` <= 2", [0, 1]),
        (f"uid == {2**63 + 1}", [3]),
        ("defocus_u_A > 0", [0, 1, 2]),
    ],
)
def test_conditions(table: pd.DataFrame, text: str, rows: list[int]) -> None:
    assert np.flatnonzero(where_mask(table, text)).tolist() == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clas == 3", "class_id"),
        ("class_id = 3", "COLUMN OP VALUE"),
        ("class_id == three", "holds numbers"),
        ("micrograph > a", "holds text"),
        ("class_id == 3 or class_id == 2", 'expected "and"'),
        ("class_id == 3 and", 'expected "and"'),
        ("class_id == 3 and ", "COLUMN OP VALUE"),
        ("good == maybe", "neither"),
    ],
)
def test_bad_conditions_are_one_sentence(table: pd.DataFrame, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        where_mask(table, text)
    assert "\n" not in str(caught.value)


def test_a_random_subset_is_in_order_and_the_same_again() -> None:
    table = pd.DataFrame({"class_id": [1] * 50 + [2] * 5 + [3] * 20})
    rows = random_subset(table, 10)
    assert len(rows) == len(set(rows)) == 10 and np.all(np.diff(rows) > 0)
    np.testing.assert_array_equal(rows, random_subset(table, 10))
    assert not np.array_equal(rows, random_subset(table, 10, seed=1))
    each = table["class_id"].iloc[random_subset(table, 8, "class_id")]
    assert each.value_counts().to_dict() == {1: 8, 2: 5, 3: 8}
    with pytest.raises(UserError, match="no column"):
        random_subset(table, 8, "psi")
