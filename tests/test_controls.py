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


def test_the_control_shows_what_an_inference_of_poses_puts_into_noise(tiny_session, monkeypatch):
    """Shifts that fit a template put it into both halves; shifts that ignore the images put nothing."""
    from scipy.ndimage import gaussian_filter

    from particle_explorer import controls
    from particle_explorer.averaging import average_members
    from particle_explorer.configs import AverageConfig, ClassMapConfig, RunConfig
    from particle_explorer.latents import Latents
    from particle_explorer.summing.work import Members

    n = 32
    template = gaussian_filter(np.random.default_rng(3).normal(size=(n, n)), 1.3)
    run = tiny_session.new_run(RunConfig(model=ClassMapConfig(), data=tiny_session.data_spec()))
    members = Members(np.arange(120), np.zeros(120, int), np.ones(120))
    settings = AverageConfig(ctf="none")
    averages = average_members(tiny_session, members, ["all"], np.zeros(120), np.zeros((120, 2)), settings)

    def infer(fits: bool):
        def encode(model, particles, plan, *, precision):
            images = np.stack(list(particles.images))[:, 0]
            score = np.fft.irfft2(np.fft.rfft2(images) * np.fft.rfft2(template).conj(), s=(n, n))
            if not fits:
                score = np.random.default_rng(0).normal(size=score.shape)
            place = np.stack(np.unravel_index(score.reshape(len(images), -1).argmax(1), (n, n)), 1)
            shift = ((place + n // 2) % n - n // 2).astype(np.float32)
            zero = np.zeros(len(images), np.float32)
            yield 1.0, Latents(particles.table.index.to_numpy(), zero[:, None], None, zero, shift)

        return encode

    found = []
    for fits in (True, False):
        monkeypatch.setattr(controls, "load_model", lambda run, device: None)
        monkeypatch.setattr(controls, "encode_prepared", infer(fits))
        found.append(controls.noise_control(run, members, averages, settings)[0])
    aligned, ignored = (one.control_frc[3:8].mean() for one in found)
    assert aligned > 0.5 > 0.3 > abs(ignored)
    assert found[0].control_n == 120
    assert found[0].believable_ring <= found[1].believable_ring, "the bias is held against the average"
