"""Image stacks as files that anybody can play or print: GIF, MP4, and a contact sheet."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from particle_explorer.files import UserError, replacing

Bytes = NDArray[np.uint8]
LEAST_PX = 256
"""Smaller pictures are enlarged by whole numbers until they are about so large."""
GAP_PX = 2


def grey(stack: ArrayLike, low: float | None = None, high: float | None = None) -> Bytes:
    """`(k, h, w)` to 8 bit with one contrast for all frames, by default percentiles 0.5 and 99.8."""
    stack = np.asarray(stack, np.float32)
    known = stack[np.isfinite(stack)]
    if not known.size:
        return np.zeros(stack.shape, np.uint8)
    low = float(np.percentile(known, 0.5)) if low is None else low
    high = float(np.percentile(known, 99.8)) if high is None else high
    scaled = (np.nan_to_num(stack, nan=low) - low) / max(high - low, 1e-12)
    return np.asarray(np.clip(scaled * 255, 0, 255).round(), np.uint8)


def side_by_side(stacks: Sequence[ArrayLike]) -> Bytes:
    """Stacks `(k, h, w)` of equal shape beside each other, each with a contrast of its own."""
    parts = [grey(stack) for stack in stacks]
    gap = np.zeros((*parts[0].shape[:2], GAP_PX), np.uint8)
    joined = [part for each in parts for part in (each, gap)][:-1]
    return np.concatenate(joined, axis=2)


def enlarged(frames: Bytes) -> Bytes:
    """`(k, h, w)` repeated to about `LEAST_PX` on the shorter side."""
    times = max(1, round(LEAST_PX / min(frames.shape[1:])))
    return frames.repeat(times, 1).repeat(times, 2)


def contact_sheet(stacks: Sequence[ArrayLike], n_columns: int = 0) -> Bytes:
    """Frames of stacks `(k, h, w)` as one picture: reading order, a line of each stack under the other."""
    parts = [grey(stack) for stack in stacks]
    k, h, w = parts[0].shape
    columns = n_columns or min(k, 8)
    rows = math.ceil(k / columns)
    band = len(parts) * (h + GAP_PX) + (GAP_PX if len(parts) > 1 else 0)
    sheet = np.zeros((rows * band, columns * (w + GAP_PX)), np.uint8)
    for i in range(k):
        for j, part in enumerate(parts):
            top, left = (i // columns) * band + j * (h + GAP_PX), (i % columns) * (w + GAP_PX)
            sheet[top : top + h, left : left + w] = part[i]
    return sheet


def write_gif(path: Path, frames: Bytes, per_second: float, *, overwrite: bool = False) -> None:
    """`(k, h, w)` as a grey GIF that repeats for ever (GIF89a, W3C)."""
    _, height, width = frames.shape
    if max(height, width) > 0xFFFF:
        raise UserError(f"{path}: a GIF holds at most 65535 px, not {width} × {height}")
    palette = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1).tobytes()
    delay = max(2, round(100 / per_second))  # hundredths of a second; players mistrust less than two
    with replacing(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        file.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF7, 0, 0) + palette)
        file.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01" + struct.pack("<H", 0) + b"\0")
        for frame in frames:
            file.write(b"\x21\xf9\x04" + struct.pack("<BHB", 0, delay, 0) + b"\0")
            file.write(b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x08")
            data = _lzw(frame.tobytes())
            for start in range(0, len(data), 255):
                block = data[start : start + 255]
                file.write(bytes([len(block)]) + block)
            file.write(b"\0")
        file.write(b"\x3b")


def _lzw(pixels: bytes) -> bytes:
    """8-bit pixels in GIF's variable-length codes (appendix F of its specification)."""
    clear, end = 256, 257
    out = bytearray()
    buffer, n_bits = clear, 9  # every image begins by clearing the table
    table: dict[int, int] = {}
    size, next_code = 9, 258
    prefix = -1
    for pixel in pixels:
        if prefix < 0:
            prefix = pixel
            continue
        key = prefix << 8 | pixel
        code = table.get(key)
        if code is not None:
            prefix = code
            continue
        buffer |= prefix << n_bits
        n_bits += size
        table[key] = next_code
        if next_code == 1 << size:
            size += 1
        next_code += 1
        if next_code == 4096:
            buffer |= clear << n_bits
            n_bits += size
            table, size, next_code = {}, 9, 258
        prefix = pixel
        while n_bits >= 8:
            out.append(buffer & 0xFF)
            buffer >>= 8
            n_bits -= 8
    for code in (prefix, end):
        buffer |= code << n_bits
        n_bits += size
        if code != end and next_code == 1 << size:
            size += 1
    while n_bits > 0:
        out.append(buffer & 0xFF)
        buffer >>= 8
        n_bits -= 8
    return bytes(out)


def can_write_mp4() -> bool:
    """Whether the optional package that brings ffmpeg is installed."""
    from importlib.util import find_spec

    return find_spec("imageio_ffmpeg") is not None


def write_mp4(path: Path, frames: Bytes, per_second: float, *, overwrite: bool = False) -> None:
    """`(k, h, w)` as a grey film."""
    if not can_write_mp4():
        raise UserError(
            "MP4 needs ffmpeg; install it with pip install 'napari-particle-explorer[movie]', or choose GIF"
        )
    import imageio_ffmpeg

    even = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]  # the format wants even sides
    height, width = even.shape[1:]
    with replacing(path, overwrite=overwrite) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary), (width, height), pix_fmt_in="gray", fps=per_second, quality=8, macro_block_size=2
        )
        writer.send(None)
        for frame in even:
            writer.send(np.ascontiguousarray(frame))
        writer.close()
