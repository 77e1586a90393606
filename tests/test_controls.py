"""Noise that keeps the power of an image and nothing of its picture."""

from __future__ import annotations

import numpy as np

from particle_explorer.controls import RandomPhases


class _Stack:
    def __init__(self, images):
        self.images = images
        self.box_px = np.full(len(images), images.shape[-1])
        self.n_channels = images.shape[1]

    def __len__(self):
        return len(self.images)

    def read(self, rows):
        return self.images[rows].copy()


def test_twins_keep_every_amplitude_and_no_phase():
    y, x = np.indices((48, 48)) - 20
    picture = np.exp(-(y**2 + 2 * x**2) / 60.0) + 0.3
    images = (picture + np.random.default_rng(0).normal(0, 0.05, (40, 1, 48, 48))).astype(np.float32)
    noise = RandomPhases(_Stack(images))
    twins = noise.read(np.arange(40))
    power = [np.abs(np.fft.rfft2(one)) for one in (images, twins)]
    np.testing.assert_allclose(power[1][..., 1:20], power[0][..., 1:20], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(twins.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=1e-4)
    np.testing.assert_array_equal(noise.read([7])[0], twins[7])  # the same row, the same noise
    together, apart = images.mean(0)[0], twins.mean(0)[0]
    assert together.std() > 4 * apart.std()
    assert not np.array_equal(RandomPhases(_Stack(images), 1).read([7])[0], twins[7])
