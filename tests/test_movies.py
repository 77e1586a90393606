"""Films are read back by another program's reader."""

from __future__ import annotations

import numpy as np
import pytest

from particle_explorer import movies
from particle_explorer.files import UserError

Image = pytest.importorskip("PIL.Image")


def frames(k: int, h: int, w: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(k)
    if kind == "noise":
        return rng.integers(0, 256, (k, h, w), dtype=np.uint8)
    y, x = np.mgrid[:h, :w]
    return np.stack(
        [(255 * np.exp(-((x - w / 2 - i) ** 2 + (y - h / 2) ** 2) / 40)) for i in range(k)]
    ).astype(np.uint8)


@pytest.mark.parametrize(("kind", "h", "w"), [("noise", 64, 71), ("noise", 200, 190), ("smooth", 80, 80)])
def test_gif_holds_the_very_pixels(tmp_path, kind, h, w):
    stack = frames(3, h, w, kind)
    movies.write_gif(tmp_path / "a.gif", stack, 10)
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3 and film.info["duration"] == 100 and film.info["loop"] == 0
        for i, frame in enumerate(stack):
            film.seek(i)
            np.testing.assert_array_equal(np.asarray(film.convert("L")), frame)


@pytest.mark.parametrize("n", range(253, 262))
def test_gif_of_every_length_ends_in_order(tmp_path, n):
    stack = np.arange(n, dtype=np.int64)[None, None] * 97 % 256
    movies.write_gif(tmp_path / "a.gif", stack.astype(np.uint8), 10)
    with Image.open(tmp_path / "a.gif") as film:
        np.testing.assert_array_equal(np.asarray(film.convert("L")), stack[0])


def test_mp4_shows_the_pictures_in_order(tmp_path):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    stack = movies.enlarged(frames(6, 40, 41, "smooth"))
    movies.write_mp4(tmp_path / "a.mp4", stack, 8)
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"), pix_fmt="gray", bits_per_pixel=8)
    size = next(reader)["size"]
    back = [np.frombuffer(frame, np.uint8).reshape(size[1], size[0]).astype(float) for frame in reader]
    assert len(back) == 6
    for frame, seen in zip(stack, back, strict=True):
        assert np.corrcoef(frame[: size[1], : size[0]].ravel(), seen.ravel())[0, 1] > 0.98


def test_mp4_without_ffmpeg_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(movies, "can_write_mp4", lambda: False)
    with pytest.raises(UserError, match=r"\[movie\]"):
        movies.write_mp4(tmp_path / "a.mp4", frames(2, 20, 20, "noise"), 8)


def test_sheet_has_each_frame_once_and_its_partner_below():
    first = np.stack([np.full((4, 4), i, float) for i in range(10)])
    sheet = movies.contact_sheet([first, -first], n_columns=5)
    assert sheet.shape == (2 * (2 * 6 + 2), 5 * 6)
    tops = [sheet[14 * (i // 5), 6 * (i % 5)] for i in range(10)]
    below = [sheet[14 * (i // 5) + 6, 6 * (i % 5)] for i in range(10)]
    assert tops == sorted(tops) and tops[0] == 0 and tops[-1] == 255
    assert below == sorted(below, reverse=True)
