"""What a benchmark ran on, so that its numbers can be read."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from particle_explorer import __version__, devices


def describe() -> dict[str, Any]:
    """Processor, cores, threads, the products it has, GPU, versions."""
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "avx512_bf16": bool(features.get("avx512_bf16")),
        "amx_bf16": bool(features.get("amx_bf16")),
        "device": devices.describe_device(devices.choose_device("auto")),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "version": __version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
