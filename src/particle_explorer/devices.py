"""Where a model is computed: the device, its precision, and what is free of it."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from particle_explorer.files import UserError

FREE_MEMORY_UNKNOWN = 2 * 2**30
STEP_MEMORY_SHARE = 0.5
"""A batch is taken in parts where a step would need more than this of what is free"""


class Model(Protocol):
    """The part of `models.base.ParticleModel` that is needed here."""

    autocast: bool


def choose_device(wanted: str = "auto") -> torch.device:
    """`cpu`, `mps`, `cuda:N`, or `auto`: the CUDA device with most free memory, else MPS, else CPU."""
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == "mps" or (wanted == "auto" and n_cuda == 0 and torch.backends.mps.is_available()):
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: torch finds no Apple GPU here; choose --device auto or cpu")
        return torch.device("mps")
    if wanted in ("auto", "cuda"):
        if n_cuda:
            free = [torch.cuda.mem_get_info(i)[0] for i in range(n_cuda)]
            return torch.device("cuda", int(np.argmax(free)))
        if wanted == "auto":
            return torch.device("cpu")
    number = wanted.removeprefix("cuda:")
    if wanted == "cuda" or (wanted.startswith("cuda:") and number.isdigit()):
        if wanted == "cuda" or int(number) >= n_cuda:
            there = f"{n_cuda} CUDA devices" if n_cuda else "no CUDA device"
            raise UserError(f"--device {wanted}: torch finds {there} here; choose --device auto or cpu")
        return torch.device("cuda", int(number))
    raise UserError(f"--device {wanted} is not known; choose auto, cpu, mps or cuda:N")


def describe_device(device: torch.device) -> str:
    """In the words of a user: the name of the GPU, or the number of CPU threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda:{device.index or 0})"
    threads = torch.get_num_threads()
    return "Apple GPU" if device.type == "mps" else f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than float32 here: the hardware has them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # emulated bf16 would be slower
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


def autocast(model: Model, device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context that steps and encoding of `model` run in."""
    if not model.autocast or precision == "float32" or (precision == "auto" and not has_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def stand_back() -> None:
    """Leave one core for others."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), n_cores - 1)))


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Where the random numbers of the CPU and of this device are."""
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Undo `generator_states`, of this kind of device or of another."""
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this says that an allocation failed; of the CPU and of MPS it has no class of its own."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    of_cpu = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return any(words in str(error) for words in (*of_cpu, "MPS backend out of memory"))


def images_at_once(bytes_per_image: int, most: int, device: torch.device) -> int:
    """How many images a step can hold: `most`, or a power of two. 0 bytes stand for little."""
    if not bytes_per_image:
        return most
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()
    fits = int(STEP_MEMORY_SHARE * free) // bytes_per_image
    return most if fits >= most else 2 ** int(math.log2(max(1, fits)))


def free_memory_bytes() -> int:
    """Memory that could be had now, by the system's count."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0])
    except (OSError, KeyError):
        try:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            free = FREE_MEMORY_UNKNOWN
    group = Path("/sys/fs/cgroup")  # a container may have less than the computer
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such limit ("max")
        return free
    return min(free, max(0, limit - used))
