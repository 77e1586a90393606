"""Images read from the disk, moved back and summed on a GPU, or on whatever torch computes on.

Two threads read blocks into memory that a GPU fetches from by itself, while it works on the blocks before
(`moving`); nothing waits for the device but the reader whose memory is still in use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from particle_explorer.devices import describe_device
from particle_explorer.files import Stopped, UserError
from particle_explorer.pose import rotation_matrix
from particle_explorer.shears import covered
from particle_explorer.spectra import Grid
from particle_explorer.summing.moving import Block, Mover, Phase, Powers, Weights
from particle_explorer.summing.work import POWER_MEMBERS, Progress, Sums, Work, not_finite, shares_told

BLOCK_BYTES = 32 * 2**20
"""Original images moved back in one go, at most."""
WORK_BYTES = 2 * 2**30
"""What a block may take on the device while it is moved back, at most."""
SUMS_BYTES = 16 * 2**30
"""Sums of averages held at once on a GPU, at most."""
CPU_BYTES = 512 * 2**20
"""What torch's CPU device is taken to have."""
SLOTS = 3
"""Blocks on their way: two that are read and one that is worked on."""
SEGMENTS = 128
"""Halves of averages that one product adds to."""


class _Slot:
    """Memory for the images of one block, here and on the device."""

    def __init__(self, device: torch.device, pixels: int, images: int) -> None:
        self.device, cuda = device, device.type == "cuda"
        self.host = torch.empty(pixels, pin_memory=cuda)
        self.there = self.host if device.type == "cpu" else torch.empty(pixels, device=device)
        self.bad = torch.zeros(images, dtype=torch.bool, pin_memory=cuda)
        self.rows = np.zeros(0, np.int64)
        self.copied = torch.cuda.Event() if cuda else None
        self.done = torch.cuda.Event() if cuda else None

    def settle(self) -> None:
        """Wait until the device needs this memory no more, and complain of what it found there."""
        if self.done is not None:
            self.done.synchronize()
        good = ~self.bad[: len(self.rows)].numpy()
        rows, self.rows = self.rows, self.rows[:0]
        if not good.all():
            raise not_finite(rows, good)

    def send(self, pixels: int, stream: Any) -> None:
        """Have the images copied, and let what is computed from now on wait for them."""
        if self.copied is None:
            if self.there is not self.host:
                self.there[:pixels].copy_(self.host[:pixels])
            return
        with torch.cuda.stream(stream):
            self.there[:pixels].copy_(self.host[:pixels], non_blocking=True)
            self.copied.record(stream)
        torch.cuda.current_stream(self.device).wait_event(self.copied)

    def note(self, rows: NDArray[np.int64], bad: Tensor) -> None:
        """Have it known which images are bad, once the device comes to it."""
        self.rows = rows
        self.bad[: len(rows)].copy_(bad, non_blocking=self.done is not None)
        if self.done is not None:
            self.done.record(torch.cuda.current_stream(self.device))


def device_sums(work: Work, name: str, progress: Progress | None) -> Iterator[Sums]:
    """Every image moved back exactly on the device `name` of torch; one average after the other.

    Averages are taken in groups whose sums fit into what is free on the device, each in one pass over its
    images.
    """
    device, channels = torch.device(name), int(work.stack.read(work.rows[:1]).shape[1])
    m, free = work.m, _free_bytes(device)
    each = 4 * (2 * channels * m * m + (2 * m * (m + 2) if work.mode == "wiener" else 0) + 4 * m)
    per_group = max(1, int(min(SUMS_BYTES, 0.4 * free)) // each)
    at_once = {
        box: _images_at_once(box, m, channels, min(WORK_BYTES, 0.3 * free))
        for box in np.unique(work.boxes).tolist()
    }

    tell = shares_told(progress, len(work.members.row))
    for first in range(0, len(work.sizes), per_group):
        last = min(first + per_group, len(work.sizes))
        try:
            mover = _group(work, first, last, channels, device, at_once, tell)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU has too little memory free to average images of {work.boxes.max()} px; end what "
                "else uses it, or choose --device cpu"
            ) from error
        yield from mover.sums()
        del mover  # before the next group asks for its memory


def device_words(name: str) -> str:
    """The device `name`, for those who want to know what computed."""
    return "torch on the CPU" if name == "cpu" else describe_device(torch.device(name))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return CPU_BYTES


def _images_at_once(box: int, m: int, channels: int, work_bytes: float) -> int:
    padded = Grid(box, m).padded
    numbers = channels * (3 * box**2 + 5 * padded**2 + 4 * m * m) + 20 * m * m
    return max(1, int(min(BLOCK_BYTES / (4 * channels * box**2), work_bytes / (4 * numbers))))


@contextmanager
def _computing(device: torch.device) -> Iterator[None]:
    """No gradients, and products in full single precision: the phase of a CTF is one of them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(), _current(device):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _group(
    work: Work,
    first: int,
    last: int,
    channels: int,
    device: torch.device,
    at_once: dict[int, int],
    tell: Callable[[int], None],
) -> Mover:
    """The averages `first` … `last - 1`, summed."""
    with _computing(device), ThreadPoolExecutor(2) as pool:
        mover = Mover(work, first, last, channels, device)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        pixels = max(channels * box**2 * k for box, k in at_once.items())
        free = deque(_Slot(device, pixels, max(at_once.values())) for _ in range(SLOTS))
        coming: deque[tuple[_Slot, Future[Block]]] = deque()
        cuts = _cuts(work, first, last, at_once)
        if stream is not None:  # what held the slots' memory before is done with it
            stream.wait_stream(torch.cuda.current_stream(device))
        try:
            while True:
                while free and (cut := next(cuts, None)) is not None:
                    slot = free.popleft()
                    coming.append((slot, pool.submit(_prepare, work, first, channels, slot, mover, *cut)))
                if not coming:
                    break
                if work.stop is not None and work.stop.is_set():
                    raise Stopped("stopped before all images were averaged; nothing was kept")
                slot, future = coming.popleft()
                block = future.result()
                shape = (len(block.rows), channels, block.box, block.box)
                pixels = int(np.prod(shape))
                slot.send(pixels, stream)
                slot.note(block.rows, mover.add(block, slot.there[:pixels].view(shape)))
                mover.count(block)
                free.append(slot)
                tell(len(block.half))
        finally:
            for _, future in coming:
                future.cancel()
            if stream is not None:  # nobody gets the slots' memory while something is copied into it
                stream.synchronize()
        for slot in free:
            slot.settle()
    return mover


def _cuts(
    work: Work, first: int, last: int, at_once: dict[int, int]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Images of one box, neighbours on the disk; the members that show them; which of the images each is."""
    average = work.members.average
    own = np.flatnonzero((average >= first) & (average < last))
    wanted, where = np.unique(work.members.row[own], return_inverse=True)
    order = np.lexsort((work.rows[wanted], work.boxes[wanted]))
    place = np.argsort(order)[where.reshape(-1)]
    wanted, by_place = wanted[order], np.argsort(place, kind="stable")
    own, place = own[by_place], place[by_place]
    boxes = work.boxes[wanted]
    for box in np.unique(boxes).tolist():
        begin, end = np.searchsorted(boxes, [box, box + 1]).tolist()
        for start in range(begin, end, at_once[box]):
            stop = min(start + at_once[box], end)
            low, high = np.searchsorted(place, [start, stop])
            yield wanted[start:stop], own[low:high], place[low:high] - start


def _prepare(
    work: Work,
    first: int,
    channels: int,
    slot: _Slot,
    mover: Mover,
    images: NDArray[np.int64],
    members: NDArray[np.int64],
    at: NDArray[np.int64],
) -> Block:
    """Read the images into the slot, and write down what the device must know of them. For a thread."""
    slot.settle()
    box = int(work.boxes[images[0]])
    rows = work.rows[images]
    pixels = len(images) * channels * box**2
    slot.host[:pixels].numpy()[:] = np.asarray(work.stack.read(rows), dtype=np.float32).reshape(-1)

    def sent(array: NDArray[Any]) -> Tensor:
        kind = np.int64 if array.dtype.kind == "i" else np.float32
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=kind))
        return tensor.pin_memory() if slot.device.type == "cuda" else tensor

    angle, shift, m, b = work.angle_deg[images], work.shift_yx_px[images], work.m, len(images)
    average, half, weight = work.members.average[members], work.half[members], work.members.weight[members]
    share = covered(box, np.deg2rad(angle), np.ascontiguousarray(shift))
    noise = weight**2 * share[at]
    into = 2 * (average - first) + half
    # one pixel of the average is box / m pixels of the image, padded / m of the spline's grid
    turn = rotation_matrix(angle)[:, ::-1, ::-1] * (mover.padded_px / m)
    origin = (box // 2 + shift) * (mover.padded_px / box) - turn @ np.full(2, m // 2)
    stride = np.maximum(1, work.sizes[average] // POWER_MEMBERS)
    powered = work.rank[members] // 2 % stride == 0
    with _current(slot.device):
        phase = None
        if work.ctf is not None:
            size = work.pixel_size_A[images]
            in_image, added = work.ctf.phase(images, size, 0.0)
            # the frame turns by R(-angle) with the image, and so does its astigmatism
            turned, _ = work.ctf.phase(images, size, -angle)
            states = work.ctf.flipped[images], work.ctf.premultiplied[images]
            phase = Phase(*(sent(x) for x in (in_image, turned, added[:, None])),
                           *(sent(x[:, None].astype(np.float32)) for x in states))  # fmt: skip
        weights = []
        places, row = np.unique(into, return_inverse=True)
        for start in range(0, len(places), SEGMENTS):
            some = (row >= start) & (row < start + SEGMENTS)
            matrices = np.zeros((2, min(SEGMENTS, len(places) - start), b))
            for matrix, counts in zip(matrices, (weight, noise), strict=True):
                np.add.at(matrix, (row[some] - start, at[some]), counts[some])
            weights.append(Weights(*(sent(x) for x in (places[start : start + SEGMENTS], *matrices))))
        powers = None
        if powered.any():
            some_images, column = np.unique(at[powered], return_inverse=True)
            places, row = np.unique(average[powered] - first, return_inverse=True)
            counts = np.zeros((len(places), len(some_images)))
            np.add.at(counts, (row, column), 1)
            powers = Powers(sent(some_images), sent(places), sent(counts))
        return Block(
            rows, box, sent(turn), sent(origin), sent(work.signs[images, None]), phase, weights, powers, into,
            np.stack([weight, weight**2, noise], 1), average[powered] - first,
        )  # fmt: skip
