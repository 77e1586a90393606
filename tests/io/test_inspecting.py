"""The summary says what is in the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from particle_explorer.io.inspecting import guess_contrast, summarise
from particle_explorer.io.reading import read, read_array
from particle_explorer.particles import Particles


def noisy(sign: float, n: int = 40, box: int = 48) -> np.ndarray:
    y, x = np.indices((box, box)) - box // 2
    blob = np.exp(-(x**2 + y**2) / (2 * 6.0**2))
    return (np.random.default_rng(0).normal(size=(n, 1, box, box)) + 0.3 * sign * blob).astype("f4")


@pytest.mark.parametrize("sign", [1, -1])
def test_contrast_is_seen_through_noise(sign: int) -> None:
    seen = guess_contrast(noisy(sign) * 5 + 100)
    assert seen.sign == sign and abs(seen.t) > 3 and seen.n_images == 40


def test_noise_alone_gives_no_contrast() -> None:
    assert guess_contrast(noisy(0)).sign == 0
    assert guess_contrast(np.zeros((0, 1, 8, 8), "f4")).sign == 0


def test_the_sentences_of_a_star_file(render: Any) -> None:
    rendered = render()
    tilt, micrograph = [str(i) for i in range(24)], ["m.mrc"] * 24
    defocus = {"DefocusU": ["15000"] * 24, "DefocusV": ["14000"] * 24}
    path = rendered.star("a.star", "3.1", AngleTilt=tilt, MicrographName=micrograph, **defocus)
    lines = summarise(read(path)).lines()
    assert lines[:3] == ["24 particles in 1 file (star)", "box 32 px", "pixel size 2.5 Å"]
    text = "\n".join(lines)
    assert "CTF parameters present, images not corrected, defocus 1.40 to 1.50 µm" in text
    assert "the images look bright" in text and "3-D refinement" in text
    assert "3 classes" in text and "1 micrograph" in text


def test_a_defocus_that_nobody_knows(render: Any) -> None:
    rendered = render()
    defocus = {"DefocusU": ["nan"] * 24, "DefocusV": ["nan"] * 24}
    text = "\n".join(summarise(read(rendered.star("a.star", "3.1", **defocus))).lines())
    assert "CTF parameters present, images not corrected; not usable without the defocus" in text
    assert "nan" not in text


def test_the_sentences_of_a_bare_stack() -> None:
    text = "\n".join(summarise(read_array(noisy(-1)[:, 0], "layer")).lines())
    assert "pixel size unknown" in text and "no CTF parameters" in text and "no poses" in text
    assert "look dark" in text


def test_file_and_images_that_disagree_are_told_apart() -> None:
    particles = read_array(noisy(-1)[:, 0], "layer")
    table = particles.table.assign(contrast_sign=np.int8(1))
    said = Particles(particles.images, table, particles.source, "cs")
    assert "the particle is bright, but the images look dark" in "\n".join(summarise(said).lines())
    dark = Particles(particles.images, table.assign(contrast_sign=np.int8(-1)), particles.source, "cs")
    assert "the particle is dark: the file says so and the images agree" in "\n".join(summarise(dark).lines())
    both = table.assign(contrast_sign=np.int8([1, -1] * (len(table) // 2)))
    text = "\n".join(summarise(Particles(particles.images, both, particles.source, "cs")).lines())
    assert "bright in some images and dark in others" in text


def test_images_that_do_not_show_the_contrast_are_said_in_plain_words() -> None:
    particles = read_array(noisy(0)[:, 0], "layer")
    text = "\n".join(summarise(particles).lines())
    assert "does not say the contrast, and the images do not show it clearly" in text
    table = particles.table.assign(contrast_sign=np.int8(-1))
    text = "\n".join(summarise(Particles(particles.images, table, particles.source, "cs")).lines())
    assert "says that the particle is dark; the images do not show it clearly" in text


def test_blank_images_are_counted_and_do_not_stop_it() -> None:
    images = noisy(1)[:, 0]
    images[3], images[7, 0, 0] = 0, np.nan
    summary = summarise(read_array(images, "layer"))
    assert summary.n_blank == 2
    assert "2 of 40 images looked at are blank or broken" in summary.lines()
