"""Signal and noise of a class, from the power of a sum and the sum of the powers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from particle_explorer.summing.work import Sums


class Balance(NamedTuple):
    """Signal and noise of a class, ring by ring, in units of one image."""

    signal: NDArray[np.float64]
    noise: NDArray[np.float64]
    ssnr: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        sums: Sums,
        total: NDArray[np.complex128],
        gain: NDArray[Any],
        noise_gain: NDArray[Any],
        rings: sparse.csr_matrix,
        channels: int,
    ) -> Balance:
        """Two equations per ring: power of the sum and sum of the powers, each signal plus noise."""
        of_sum = rings @ (np.abs(total) ** 2).sum(0).ravel()
        signal_in_sum = channels * (rings @ np.asarray(gain, dtype=np.float64).ravel() ** 2)
        noise_in_sum = channels * (rings @ np.asarray(noise_gain, dtype=np.float64).ravel())
        signal_in_powers, noise_in_powers = sums.power_gain
        terms = [of_sum, sums.power, signal_in_sum, noise_in_sum, signal_in_powers, noise_in_powers]

        def solve(terms: list[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            total_, powers, a, b, c, d = terms
            determinant = a * d - b * c
            known = determinant > 1e-9 * a * d
            safe = np.where(known, determinant, 1.0)
            signal = np.where(known, (total_ * d - b * powers) / safe, 0.0)
            noise = np.where(known, (a * powers - c * total_) / safe, 0.0)
            return np.maximum(signal, 0.0), np.maximum(noise, 0.0)

        signal, noise = solve(terms)
        floor = 1e-9 * (signal + noise).max() + 1e-300
        # noise is counted as if every image covered the whole average
        covered = sums.weight[:, 2].sum() / max(sums.weight[:, 1].sum(), 1e-300)
        per_noise = signal_in_sum * covered / np.where(noise_in_sum > 0, noise_in_sum, np.inf)
        ssnr = per_noise * signal / np.maximum(noise, floor)
        # the filter wants steady numbers more than sharp ones: three rings together
        smooth = solve([ndimage.uniform_filter1d(term, 3, mode="nearest") for term in terms])
        return cls(*smooth, ssnr)

    def wiener(self, gain: NDArray[Any], noise_gain: NDArray[Any], m: int) -> NDArray[np.float64]:
        """`(m, m // 2 + 1)` factors that turn Σ CTF·F into the average.

        Rings without measurable signal are kept at a tenth of it rather than wiped out: a blank average would
        hide what is there.
        """
        ky, kx = np.meshgrid(np.fft.fftfreq(m, 1 / m), np.arange(m // 2 + 1), indexing="ij")
        ring = np.minimum(np.rint(np.hypot(ky, kx)).astype(int), m // 2)
        noise = np.where(self.noise > 0, self.noise, 1.0)
        total_gain, total_noise = np.asarray(gain, dtype=np.float64), np.asarray(noise_gain, dtype=np.float64)
        typical = max(float(total_gain.mean()), 1e-12)
        least = 0.1 * max(float(total_noise.mean()), 1e-12) / typical**2
        ratio = np.maximum(np.where(self.noise > 0, self.signal / noise, 1.0), least)[ring]
        return total_gain * ratio / (total_gain**2 * ratio + np.maximum(total_noise, 1e-12))
