"""What sums images: compiled functions on the CPU, or torch on a GPU."""

from __future__ import annotations

import ctypes
import os
import sys

DEVICE_PIXELS = 4e9
"""From so many on a GPU is worth the seconds that starting it takes."""


def check(wanted: str) -> None:
    """Complain of a device that is not there before anything long is begun."""
    gpu(wanted, 0)


def gpu(wanted: str, pixels: float, least: float = DEVICE_PIXELS) -> str:
    """The device of torch that averages `pixels` of all members, empty for the compiled functions on the CPU.

    `auto` takes a CUDA device from `least` pixels on.
    """
    if wanted == "cpu":
        return ""
    if wanted == "torch-cpu":
        return "cpu"
    if wanted == "auto":
        # torch is imported only where it may find something
        if pixels < least or not _has_gpu_driver():
            return ""
    from particle_explorer.devices import choose_device

    device = choose_device(wanted)
    return "" if wanted == "auto" and device.type != "cuda" else str(device)


def _has_gpu_driver() -> bool:
    """Whether the system has a driver of GPUs that torch calls CUDA: NVIDIA's, or AMD's on Linux."""
    if os.path.exists("/dev/kfd"):
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
