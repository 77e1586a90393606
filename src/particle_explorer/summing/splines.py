"""Few images, moved back exactly by splines (`spectra.Grid`): some seconds' worth of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from particle_explorer.files import Stopped
from particle_explorer.spectra import Float, Grid, outside_circle
from particle_explorer.summing.work import BLOCK_BYTES, Part, Progress, Sums, Work, not_finite, powers_of


def spline_sums(work: Work, progress: Progress | None) -> list[Sums]:
    """Every image moved back exactly, in two threads; sums taken in order, whatever the timing."""

    def part(block: NDArray[np.int64], images: Float) -> Part:
        return _part(images, block, work)

    order = np.argsort(work.members.row, kind="stable")
    starts = np.searchsorted(work.members.row[order], np.arange(len(work.rows) + 1))
    sums: list[Sums] | None = None
    done = 0
    # rows in rising order: one pass over the disk, whatever the classes are
    for block, found in _in_two_threads(part, work):
        if sums is None:
            channels = found.images.shape[1]
            sums = [Sums(channels, work.m, work.mode == "wiener") for _ in work.sizes]
        for i, at in enumerate(block):
            for member in order[starts[at] : starts[at + 1]]:
                one = sums[work.members.average[member]]
                one.add(int(work.half[member]), float(work.members.weight[member]), found, i)
        done += len(block)
        if progress is not None:
            progress(done / len(work.rows))
    assert sums is not None
    return sums


def _in_two_threads(
    part: Callable[[NDArray[np.int64], Float], Part], work: Work
) -> Iterator[tuple[NDArray[np.int64], Part]]:
    """Read blocks here, work on them in two threads, hand them out in order, whatever the timing."""
    waiting: deque[tuple[NDArray[np.int64], Future[Part]]] = deque()
    with ThreadPoolExecutor(2) as pool:
        try:
            for block in _blocks(work.rows, work.boxes):
                if work.stop is not None and work.stop.is_set():
                    raise Stopped("stopped before all images were averaged; nothing was kept")
                images = np.asarray(work.stack.read(work.rows[block]), dtype=np.float32)
                waiting.append((block, pool.submit(part, block, images)))
                if len(waiting) == 3:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _blocks(rows: NDArray[np.int64], boxes: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    order = np.argsort(rows, kind="stable")
    for box in np.unique(boxes):
        same = order[boxes[order] == box]
        size = max(1, BLOCK_BYTES // int(4 * box**2))
        for start in range(0, len(same), size):
            yield same[start : start + size]


def _part(images: Float, block: NDArray[np.int64], work: Work) -> Part:
    m, ctf, angle, shift = work.m, work.ctf, work.angle_deg[block], work.shift_yx_px[block]
    grid = Grid(images.shape[-1], m)
    background = images[..., outside_circle(images.shape[-1])].mean(-1)[..., None, None]
    finite = np.isfinite(images.sum((1, 2, 3), dtype=np.float64))
    if not finite.all():
        raise not_finite(work.rows[block], finite)
    spectra = grid.transform((images - background) * work.signs[block, None, None, None])
    transfer = gain = None
    if ctf is not None:
        pixel = work.pixel_size_A[block]
        in_image = ctf.at(block, pixel, m, 0.0)
        untouched = ctf.premultiplied[block, None, None]
        if work.mode == "phase-flip":
            transfer = np.where(untouched, np.float32(1), np.sign(in_image))
        else:
            # the frame turns by R(-angle) with the image, and so does its astigmatism
            gain = ctf.at(block, pixel, m, -angle) ** 2
            transfer = np.where(untouched, np.float32(1), in_image)
    power, power_gain = powers_of(spectra, block, work, gain)
    aligned = grid.sample(spectra, angle, shift, transfer)
    return Part(aligned, gain, grid.covered(angle, shift), power, power_gain)
