"""Weights of earlier versions: what they lack, so that they encode as they did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from particle_explorer.models.base import ParticleModel

_OF_NEIGHBOURS = ("known", "known_place", "centring")


def upgraded(model: ParticleModel, weights: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Weights of before there was a CTF in the likelihood were fitted to images as they are, without junk."""
    weights.setdefault(prefix + "with_ctf", torch.tensor(False))
    weights.setdefault(prefix + "junk_share", torch.tensor(0.0))
    weights.setdefault(prefix + "noise_floor", torch.tensor(0.0))
    weights.setdefault(prefix + "signal_power", torch.zeros_like(model.get_buffer("signal_power")))
    weights.setdefault(prefix + "kept", torch.ones_like(model.get_buffer("kept")))
    for name in _OF_NEIGHBOURS:  # as many as there were particles
        empty = model.get_buffer(name)
        setattr(model, name, torch.empty_like(weights.setdefault(prefix + name, empty), device=empty.device))
