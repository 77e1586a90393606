"""Poses are checked by their four signs; every image is read once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from particle_explorer.io.checking import SIGNS, check_poses, scan
from particle_explorer.io.inspecting import summarise
from particle_explorer.io.reading import read, read_array
from particle_explorer.particles import Particles


def _with_signs(particles: Particles, angle: int, shift: int) -> Particles:
    table = particles.table.assign(
        angle_deg=angle * particles.table["angle_deg"],
        shift_y_px=shift * particles.table["shift_y_px"],
        shift_x_px=shift * particles.table["shift_x_px"],
        class_id=1,
    )
    return Particles(particles.images, table, particles.source, particles.kind)


@pytest.mark.parametrize("box", [32, 33, 96])
@pytest.mark.parametrize("signs", SIGNS)
def test_the_right_signs_are_found(render: Any, box: int, signs: tuple[int, int]) -> None:
    """Images rendered by RELION's definition; the file's poses with their signs turned are found out."""
    particles = read(render(box=box, n=80).star("a.star", "3.1"))
    found = check_poses(_with_signs(particles, *signs))
    if signs == (1, 1):
        assert found.verdict == "agrees" and found.energies[0] == 1
    else:
        assert found.verdict == "disagrees"
        assert ("angles" in found.words) == (signs[0] < 0) and ("shifts" in found.words) == (signs[1] < 0)


def test_noise_and_few_particles_are_inconclusive(render: Any) -> None:
    particles = read(render(n=12).star("a.star", "3.0"))
    found = check_poses(particles)
    assert found.verdict == "inconclusive" and "too few" in found.words
    rng = np.random.default_rng(0)
    noise = read_array(rng.normal(size=(90, 24, 24)).astype("f4"), "noise")
    assert check_poses(noise).verdict == "none"
    table = noise.table.assign(
        angle_deg=rng.uniform(-180, 180, 90), shift_y_px=rng.normal(size=90), shift_x_px=rng.normal(size=90)
    )
    assert check_poses(Particles(noise.images, table, noise.source, "layer")).verdict == "inconclusive"


def test_poses_without_shifts_say_what_they_can(render: Any) -> None:
    particles = read(render(n=80).star("a.star", "3.1"))
    y, x = np.indices((32, 32)) - 16
    rng = np.random.default_rng(3)
    angle = rng.uniform(-180, 180, 80)
    images = []
    for a in np.deg2rad(angle):
        u, v = np.cos(a) * x + np.sin(a) * y, -np.sin(a) * x + np.cos(a) * y
        images.append(
            np.exp(-((u - 6) ** 2 + (v - 2) ** 2) / 9) + np.exp(-((u + 3) ** 2 + (v - 7) ** 2) / 20)
        )
    stack = read_array(np.stack(images).astype("f4"), "a")
    table = stack.table.assign(angle_deg=angle, shift_y_px=0.0, shift_x_px=0.0)
    found = check_poses(Particles(stack.images, table, particles.source, "layer"))
    assert found.verdict == "inconclusive" and "shifts are too small" in found.words


def test_a_scan_lists_every_blank_broken_and_double_image() -> None:
    images = np.random.default_rng(0).normal(size=(300, 64, 64)).astype("f4")
    images[7], images[250, 3, 3], images[299], images[100] = 1, np.inf, images[4], images[4]
    steps = list(scan(read_array(images, "a")))
    assert all(found is None for _, found in steps[:-1]) and steps[-1][0] == 1.0
    found = steps[-1][1]
    assert found is not None
    assert (found.blank, found.broken, found.duplicates) == ((7,), (250,), ((100, 4), (299, 4)))
    text = "\n".join(found.lines())
    assert "1 is blank (all pixels equal): rows 8" in text and "101 = 5, 300 = 5" in text


def test_rows_that_name_one_image_and_equal_images_are_counted(render: Any) -> None:
    rendered = render()
    path = rendered.star("a.star", "3.1")
    text = path.read_text().replace("000003@stack.mrcs", "000002@stack.mrcs")
    path.write_text(text)
    lines = "\n".join(summarise(read(path)).lines())
    assert "1 of the rows name an image that an earlier row names" in lines
    assert "1 of the images looked at have the pixels of another" in lines
    assert "pose self-check: " in lines


def test_pixel_sizes_are_told_by_optics_group(render: Any) -> None:
    path = render().star("a.star", "3.1")
    text = path.read_text()
    line = next(line for line in text.split("\n") if "opticsGroup1" in line)
    second = line.replace("    1 opticsGroup1 2.5000", "    2 opticsGroup2 3.1000")
    text = text.replace(line, f"{line}\n{second}")
    rows = [row for row in text.split("\n") if "@stack.mrcs" in row]
    for row in rows[:5]:
        text = text.replace(row, row.rstrip()[:-1] + "2 ")
    path.write_text(text)
    assert "2 optics groups (1: 2.5 Å, 2: 3.1 Å)" in summarise(read(path)).lines()
