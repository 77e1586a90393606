"""A report is one file that needs nothing else, and its pictures show the numbers given."""

from __future__ import annotations

import base64
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray

from particle_explorer.report import curves, figures, page, png, scatter


def read_png(address: str) -> NDArray[np.uint8]:
    """A grey 8-bit PNG without line filters, every checksum verified."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 0)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:]


def test_a_png_holds_the_picture() -> None:
    image = np.array([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    np.testing.assert_array_equal(read_png(png(image)), np.array([[0, 51, 102], [153, 204, 255]]))
    np.testing.assert_array_equal(read_png(png(image, low=2.0, high=3.0))[0], [0, 0, 0])
    assert read_png(png(image, zoom=3)).shape == (6, 9)
    assert read_png(png(np.ones((2, 2)))).shape == (2, 2)


def test_figures_share_a_scale_when_asked() -> None:
    dark, bright = np.array([[0.0, 1.0]]), np.array([[0.0, 10.0]])
    together = re.findall(r'src="([^"]+)"', figures([dark, bright], ["a", "b"], zoom=1, together=True))
    np.testing.assert_array_equal(read_png(together[0]), [[0, 26]])
    apart = re.findall(r'src="([^"]+)"', figures([dark, bright], ["a", "b"], zoom=1))
    np.testing.assert_array_equal(read_png(apart[0]), [[0, 255]])


@pytest.mark.parametrize("y", [np.linspace(-3, 8, 20), np.zeros(20)])
def test_diagrams_are_svg_with_every_point_inside(y: NDArray[np.float64]) -> None:
    colour = np.where(np.arange(20) < 4, np.nan, y)
    root = ElementTree.fromstring(scatter(np.arange(20), y, colour, "x", "y"))
    circles = root.findall("circle")
    assert len(circles) == 20 and sum(c.get("fill") == "none" for c in circles) == 4
    assert all(0 < float(c.get("cx", -1)) < 640 and 0 < float(c.get("cy", -1)) < 340 for c in circles)
    lines = ElementTree.fromstring(curves(np.arange(20), [("a < b", y), ("c", -y)], "x", "y"))
    assert len(lines.findall("polyline")) == 2
    assert "a < b" in [text.text for text in lines.findall("text")]


def test_a_page_needs_nothing_else() -> None:
    text = page("A & B", "<p>hello</p>")
    assert "<title>A &amp; B</title>" in text and "<p>hello</p>" in text
    assert "http" not in text and "src=" not in text
