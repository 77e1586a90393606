"""Pages to look at without anything else: grey pictures as PNG, diagrams as SVG, all inside one HTML file."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2129; background: #f6f7f9; margin: 0; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 6px; }
p { max-width: 75ch; margin: 6px 0 12px; } .note { color: #5b6270; font-size: 13px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.card, .panel, pre { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; }
.card { padding: 12px 18px; min-width: 150px; } .panel { padding: 14px; overflow-x: auto; }
.card b { display: block; font-size: 26px; font-weight: 600; } .card span { color: #5b6270; font-size: 13px; }
.pass b::after { content: " ✓"; color: #1a7f4b; } .fail b::after { content: " ✗"; color: #b3261e; }
.row { display: flex; flex-wrap: nowrap; gap: 8px; } .row.wrap { flex-wrap: wrap; }
.row > i { flex: 0 0 92px; font-style: normal; font-weight: 600; font-size: 13px; align-self: center; }
figure { margin: 0 0 6px; text-align: center; width: min-content; }
figcaption { font-size: 12px; line-height: 1.35; color: #5b6270; padding-top: 2px; }
img { display: block; max-width: none; image-rendering: pixelated; border-radius: 4px; }
svg { max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: #5b6270; } svg .axis { fill: #1d2129; font-size: 13px; }
svg .grid { stroke: #e6e9ed; } table { border-collapse: collapse; background: #fff; }
td, th { border: 1px solid #dfe3e8; padding: 4px 12px; text-align: right; } th { background: #f0f2f5; }
td:first-child, th:first-child { text-align: left; }
pre { padding: 12px; font-size: 12px; overflow-x: auto; }
@media print {
  body { background: #fff; } h2 { break-after: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .row { flex-wrap: wrap; overflow: visible; } figure, svg, tr { break-inside: avoid; }
}
"""


def png(image: ArrayLike, *, low: float | None = None, high: float | None = None, zoom: int = 1) -> str:
    """A grey picture `(h, w)` as a `data:` address; `low` is black and `high` white."""
    return (
        "data:image/png;base64," + base64.b64encode(png_file(image, low=low, high=high, zoom=zoom)).decode()
    )


def png_file(
    image: ArrayLike, *, low: float | None = None, high: float | None = None, zoom: int = 1
) -> bytes:
    """A grey picture `(h, w)` as the content of a PNG file."""
    image = np.asarray(image, dtype=np.float64)
    low = float(image.min()) if low is None else low
    high = float(image.max()) if high is None else high
    grey = np.clip((image - low) / max(high - low, 1e-12) * 255, 0, 255).round().astype(np.uint8)
    grey = grey.repeat(zoom, 0).repeat(zoom, 1)
    height, width = grey.shape
    lines = np.concatenate([np.zeros((height, 1), np.uint8), grey], 1).tobytes()  # filter 0 before each line

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines, 9))
        + chunk(b"IEND", b"")
    )


_VIRIDIS = np.array(
    [(68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137),
     (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37)]
)  # fmt: skip


def _colour(share: float) -> str:
    at = np.clip(share, 0, 1) * (len(_VIRIDIS) - 1)
    rgb = [np.interp(at, np.arange(len(_VIRIDIS)), _VIRIDIS[:, i]) for i in range(3)]
    return "#" + "".join(f"{round(v):02x}" for v in rgb)


def _axes(
    x: NDArray[Any], y: NDArray[Any], x_label: str, y_label: str, width: int = 640, height: int = 340
) -> tuple[list[str], Callable[[NDArray[Any]], NDArray[Any]], Callable[[NDArray[Any]], NDArray[Any]]]:
    """Frame and ticks of a diagram, and the maps from its numbers to its points."""
    left, right, top, bottom = 62, 16, 14, 46

    def scale(values: NDArray[Any], start: float, end: float) -> tuple[list[float], Callable[[Any], Any]]:
        low, high = float(np.min(values)), float(np.max(values))
        low, high = (low - 0.5, high + 0.5) if high - low < 1e-12 else (low, high)
        margin = 0.03 * (high - low)
        low, high = low - margin, high + margin
        step = 10 ** np.floor(np.log10((high - low) / 4))
        step *= max(m for m in (1, 2, 5) if m * step <= (high - low) / 4)
        ticks = [float(t) + 0.0 for t in np.arange(np.ceil(low / step), np.floor(high / step) + 0.5) * step]
        return ticks, lambda v: start + (np.asarray(v, dtype=float) - low) / (high - low) * (end - start)

    x_ticks, to_x = scale(x, left, width - right)
    y_ticks, to_y = scale(y, height - bottom, top)
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img">']
    for tick in x_ticks:
        at = to_x(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{height - bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        at = to_y(tick)
        parts.append(f'<line class="grid" x1="{left}" y1="{at:.1f}" x2="{width - right}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 7}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle_x, middle_y = (left + width - right) / 2, (top + height - bottom) / 2
    parts.append(f'<text class="axis" x="{middle_x}" y="{height - 8}" text-anchor="middle">{x_label}</text>')
    turned = f'transform="rotate(-90 15 {middle_y})"'
    parts.append(f'<text class="axis" x="15" y="{middle_y}" text-anchor="middle" {turned}>{y_label}</text>')
    return parts, to_x, to_y


def scatter(x: ArrayLike, y: ArrayLike, colour: ArrayLike, x_label: str, y_label: str) -> str:
    """Points `(n,)` as an SVG; `colour` `(n,)` from its least (dark) to its largest number, NaN grey."""
    x, y, colour = (np.asarray(v, dtype=np.float64) for v in (x, y, colour))
    parts, to_x, to_y = _axes(x, y, x_label, y_label)
    known = np.isfinite(colour)
    low, high = (colour[known].min(), colour[known].max()) if known.any() else (0.0, 1.0)
    for i in np.argsort(known, kind="stable"):
        at = f'cx="{to_x(x[i]):.1f}" cy="{to_y(y[i]):.1f}"'
        if known[i]:
            parts.append(
                f'<circle {at} r="2.6" fill="{_colour((colour[i] - low) / max(high - low, 1e-12))}"/>'
            )
        else:
            parts.append(f'<circle {at} r="2.6" fill="none" stroke="#999"/>')
    return "".join([*parts, "</svg>"])


def curves(x: ArrayLike, lines: Sequence[tuple[str, ArrayLike]], x_label: str, y_label: str) -> str:
    """Lines `(n,)` over one axis as an SVG, each named at its colour."""
    x = np.asarray(x, dtype=np.float64)
    values = [np.asarray(line, dtype=np.float64) for _, line in lines]
    parts, to_x, to_y = _axes(x, np.concatenate([*values, [0.0, 1.0]]), x_label, y_label)
    for i, ((name, _), line) in enumerate(zip(lines, values, strict=True)):
        colour = _colour(0.15 + 0.75 * i / max(len(lines) - 1, 1))
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(to_x(x), to_y(line), strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        at = f'x="620" y="{28 + 16 * i}" text-anchor="end" style="fill:{colour}"'
        parts.append(f"<text {at}>{html.escape(name)}</text>")
    return "".join([*parts, "</svg>"])


def figures(
    images: Iterable[ArrayLike], captions: Sequence[str], *, zoom: int = 2, together: bool = False
) -> str:
    """A row of pictures with captions; `together` gives them one grey scale."""
    arrays = [np.asarray(image) for image in images]
    low, high = (min(a.min() for a in arrays), max(a.max() for a in arrays)) if together else (None, None)
    cells = [
        f'<figure><img src="{png(image, low=low, high=high, zoom=zoom)}" alt="">'
        f"<figcaption>{caption}</figcaption></figure>"
        for image, caption in zip(arrays, captions, strict=True)
    ]
    return f'<div class="row">{"".join(cells)}</div>'


def page(title: str, body: str) -> str:
    """A whole HTML file."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'
