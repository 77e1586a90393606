"""Star files as text: every dialect in, and nothing lost on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from particle_explorer.files import UserError
from particle_explorer.io.star import StarFile, format_block, numbers, quoted


def star(tmp_path: Path, text: str | bytes) -> StarFile:
    path = tmp_path / "a.star"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return StarFile(path)


TEXT = """# Created by hand
data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2 [what it is called]
 1 one

data_general
_rlnPixelSize   1.25
_rlnName  'two words' # a comment

data_particles

loop_
_rlnImageName
_rlnDefocusU #2   comment
_rlnClassNumber
000001@data_1/s.mrcs 1.5e4 3
\t000002@s.mrcs\t 16000.25 -4 \x20
# between
000003@s.mrcs nan 5
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n\n \n"])
def test_blocks_labels_and_values(tmp_path: Path, end: str, last: str) -> None:
    file = star(tmp_path, (TEXT.rstrip("\n") + last).replace("\n", end))
    assert [block.name for block in file.blocks] == ["optics", "general", "particles"]
    general = file.block("general")
    assert general is not None and general.values == {"rlnPixelSize": "1.25", "rlnName": "two words"}
    table = file.table(file.blocks[2])
    assert list(table) == ["rlnImageName", "rlnDefocusU", "rlnClassNumber"]
    assert table["rlnImageName"].tolist() == ["000001@data_1/s.mrcs", "000002@s.mrcs", "000003@s.mrcs"]
    np.testing.assert_array_equal(table["rlnDefocusU"], [1.5e4, 16000.25, np.nan])
    assert table["rlnClassNumber"].tolist() == [3, -4, 5]


def test_numbers_are_exact(tmp_path: Path) -> None:
    """A uid of 64 bits and a number with all its digits survive."""
    file = star(tmp_path, "data_\nloop_\n_a\n_b\n18446744073709551615 0.1\n3 123456.789012\n")
    table = file.table(file.blocks[0])
    assert table["a"].tolist() == [18446744073709551615, 3]
    assert table["b"].tolist() == [0.1, 123456.789012]


def test_quotes_hold_spaces_and_marks(tmp_path: Path) -> None:
    file = star(
        tmp_path,
        "data_\nloop_\n_rlnMicrographName\n_x\n_y\n'a b.mrc' 1 \"it's\"\nbob's.mrc 2 '' # said\n\"#1\" 3 "
        "x#y\n",
    )
    table = file.table(file.blocks[0])
    assert table["rlnMicrographName"].tolist() == ["a b.mrc", "bob's.mrc", "#1"]
    assert table["x"].tolist() == [1, 2, 3]
    assert table["y"].tolist() == ["it's", "", "x#y"]


def test_an_apostrophe_inside_a_word_is_no_quote(tmp_path: Path) -> None:
    file = star(tmp_path, "data_\nloop_\n_rlnMicrographName\n_x\nbob's.mrc 1\nann's.mrc 2\n")
    assert file.table(file.blocks[0])["rlnMicrographName"].tolist() == ["bob's.mrc", "ann's.mrc"]


def test_a_row_that_begins_like_a_block_is_a_row(tmp_path: Path) -> None:
    file = star(tmp_path, "data_x\nloop_\n_rlnMicrographName\n_v\ndata_1/a.mrc 1\ndata_2/b.mrc 2\nc.mrc 3\n")
    assert len(file.blocks) == 1
    assert file.table(file.blocks[0])["rlnMicrographName"].tolist() == [
        "data_1/a.mrc",
        "data_2/b.mrc",
        "c.mrc",
    ]


def test_names_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    file = star(tmp_path, "data_\nloop_\n_rlnMicrographName\n_v\n007 1\n008 2\n")
    assert file.table(file.blocks[0])["rlnMicrographName"].tolist() == ["007", "008"]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    file = star(tmp_path, b"# \xe5ngstr\xf6m\ndata_\nloop_\n_rlnMicrographName\n_v\nm\xfc.mrc 1\n")
    assert file.table(file.blocks[0])["rlnMicrographName"].tolist() == ["mü.mrc"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 2 3\n", "before any data_ block"),
        ("loop_\n_a\n1\n", "before any data_ block"),
        ("data_\nloop_\n_a\n_b\n1 2\n3\n", "line 6: 1 values, but block data_ has 2 columns"),
        ("data_\nloop_\n_a\n_b\n1 2 3\n4\n", "line 5: 3 values"),
        ("data_\nloop_\n_a\n_b\n'x y' 2 3\n", "line 5: 3 values"),
        ("data_\nloop_\n1 2\n", "outside of a loop with labels"),
        ("data_\n_a 1\n2 3\n", "outside of a loop"),
        ("data_\n_a\n", "expected a label and one value"),
        ("data_\nloop_\n_a\n_a\n1 2\n", "twice"),
        ("data_\nloop_\n_a\n1\n_b\n", "after the rows"),
        ("data_\nloop_\n_a\n1\nloop_\n_b\n2\n", "second table"),
        ("data_\nloop_\n_a\n;text\n;\n", "several lines"),
        (b"\x00\x01\x02" * 100, "binary"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        file = star(tmp_path, text)
        file.table(file.blocks[0])
    assert "\n" not in str(caught.value)


def test_rows_read_in_parts_are_the_rows_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(i, i if i < 7 else i + 0.5, i if i != 8 else "word", "nan" if i == 1 else 2) for i in range(10)]
    body = "".join(f"{i:02d}@a.mrcs {a} {b} {c}\n" + "# why\n" * (i == 4) for i, a, b, c in rows)
    labels = "".join(f"_{name}\n" for name in ("rlnImageName", "rlnNumber", "rlnWord", "rlnGap"))
    text = f"data_particles\nloop_\n{labels}{body}"
    whole = star(tmp_path, text)
    monkeypatch.setattr("particle_explorer.io.star._CHUNK_ROWS", 3)
    parts = star(tmp_path, text.replace("# why\n", ""))
    found = parts.table(parts.blocks[0])
    pd.testing.assert_frame_equal(found, whole.table(whole.blocks[0]))
    assert list(found["rlnNumber"][5:9]) == [5, 6, 7.5, 8.5] and found["rlnWord"][0] == "0"


def test_a_word_among_numbers_is_named_by_row(tmp_path: Path) -> None:
    file = star(tmp_path, "data_\nloop_\n_rlnDefocusU\n1\n2\nthree\n")
    with pytest.raises(UserError, match='row 3: rlnDefocusU is "three"'):
        numbers(file.table(file.blocks[0]), "rlnDefocusU", file.path)


def test_empty_file_and_empty_loop(tmp_path: Path) -> None:
    assert star(tmp_path, "").blocks == []
    file = star(tmp_path, "data_particles\nloop_\n_a #1\n_b #2\n\n")
    assert file.table(file.blocks[0]).shape == (0, 2)


def test_what_is_printed_is_read_back(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "rlnMicrographName": ["a b", "", "'", "#x", "_y"],
            "n": [1, 2, 3, 4, 5],
            "x": [0.5, -1.25, 1e4, 0, 3],
        }
    )
    file = star(tmp_path, format_block("particles", table))
    pd.testing.assert_frame_equal(file.table(file.blocks[0]), table, check_dtype=False)


WORDS = st.text(st.sampled_from("ab1.-_#'\"@; \tdé"), max_size=6)


@given(st.lists(st.lists(WORDS, min_size=2, max_size=2), min_size=1, max_size=6))
def test_any_text_survives_printing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    table = pd.DataFrame(rows, columns=["rlnImageName", "rlnMicrographName"], dtype="str")
    try:
        text = format_block("x", table)
    except UserError:
        assert any({"'", '"'} <= set(word) for row in rows for word in row)
        return
    path = tmp_path_factory.getbasetemp() / "words.star"
    path.write_text(text, encoding="utf-8")
    file = StarFile(path)
    pd.testing.assert_frame_equal(file.table(file.blocks[0]), table)


@given(st.binary(max_size=120), st.integers(0, 400))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.star"
    content = TEXT.encode()
    path.write_bytes(content[:place] + noise + content[place:])
    try:
        file = StarFile(path)
        for block in file.blocks:
            file.table(block)
    except UserError as error:
        assert "\n" not in str(error)


def test_quoting_refuses_what_cannot_be_written() -> None:
    assert quoted("plain") == "plain"
    with pytest.raises(UserError):
        quoted("both ' and \"")


def test_the_mark_that_windows_puts_first_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.star"
    path.write_bytes(b"\xef\xbb\xbfdata_particles\n\nloop_\n_rlnImageName #1\n1@a.mrcs\n")
    star = StarFile(path)
    assert star.table(star.blocks[0])["rlnImageName"].tolist() == ["1@a.mrcs"]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r"))
    with pytest.raises(UserError, match="line ends of old Apple computers"):
        StarFile(path)
