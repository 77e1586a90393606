"""How many images are worked on at a time."""

from __future__ import annotations

import torch

_BLOCK_BYTES = 8 * 2**20
"""Rows and scores made at a time in a search; small enough to stay in a processor's cache."""


def block(floats_per_image: int, device: torch.device, factor: int = 1) -> int:
    """How many images make a block; a GPU wants large ones."""
    n_bytes = factor * _BLOCK_BYTES * (1 if device.type == "cpu" else 32)
    return max(1, n_bytes // (4 * floats_per_image))
