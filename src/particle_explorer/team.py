"""Processes that train one model together, each on a device of its own.

Each of them takes its share of the rows of every batch; gradients and losses are added up, so that a step is
that of the whole batch in one process. Either `--train.devices N` starts the helpers, or `torchrun` starts
everybody.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from particle_explorer.files import UserError

if TYPE_CHECKING:
    from particle_explorer.models.base import Share

START_S = 300.0
"""Longest that a helper may take to start"""
END_S = 10.0
"""Longest that helpers are waited for when all is done"""


class Team:
    """This process among `size`; number 0 leads: it alone writes, reports and finishes."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = device or torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def portion(self, index: Tensor) -> tuple[Tensor, Share | None, float]:
        """This process's part of a batch, where that part lies, and its weight in the sum over processes.

        Of a batch with fewer rows than processes everybody takes the whole.
        """
        from particle_explorer.models.base import Share

        if self.size == 1:
            return index, None, 1.0
        if len(index) < self.size:
            return index, None, 1 / self.size
        parts = index.tensor_split(self.size)
        first = sum(len(part) for part in parts[: self.rank])
        mine = parts[self.rank]
        return mine, Share(first, len(index)), len(mine) / len(index)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        if self.size == 1:
            return flag
        value = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(value)
        return bool(value.item())

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes into each tensor, in one message."""
        if self.size == 1:
            return
        listed = list(tensors)
        flat = torch.cat([tensor.reshape(-1).float() for tensor in listed])
        dist.all_reduce(flat)
        for tensor, part in zip(listed, flat.split([tensor.numel() for tensor in listed]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def same(self, *tensors: Tensor) -> None:
        """Put what the leader has into each tensor."""
        if self.size == 1:
            return
        for tensor in tensors:
            sent = tensor.to(self.device).contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)

    def check_agreement(self, tensors: Iterable[Tensor]) -> None:
        """Refuse to go on where processes have other weights than each other."""
        if self.size == 1:
            return
        total = torch.stack([tensor.detach().double().sum() for tensor in tensors]).cpu()
        highest = total.float().to(self.device)
        lowest = highest.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        if not torch.equal(highest, lowest):
            raise UserError(
                f"the {self.size} processes of this training have come to different weights; their devices"
                " compute differently; train on one, or on devices of one kind"
            )

    def tell(self, text: str) -> str:
        """What the leader says, in every process."""
        data = list(text.encode())
        length = torch.tensor([len(data)])
        self.same(length)
        said = torch.tensor(data if self.leads else [0] * int(length), dtype=torch.uint8)
        self.same(said)
        return bytes(said.tolist()).decode()


def device_of(wanted: str, rank: int, size: int) -> torch.device:
    """The device of one process of several; `UserError` where there are not enough."""
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and n_cuda == 0):
        return torch.device("cpu")
    if wanted not in ("auto", "cuda"):
        raise UserError(f"--device {wanted}: several devices are cuda or cpu; choose auto, cuda or cpu")
    local = int(os.environ.get("LOCAL_RANK", rank))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if here > n_cuda:
        there = f"{n_cuda} CUDA device{'s' if n_cuda > 1 else ''}" if n_cuda else "no CUDA device"
        raise UserError(f"--train.devices {size}: torch finds {there} here; choose fewer, or --device cpu")
    return torch.device("cuda", local)


def started_by_torchrun() -> bool:
    """Whether `torchrun` or its like has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined(wanted: str, rank: int = -1, size: int = 0, store: Path | None = None) -> Iterator[Team]:
    """Meet the others: in the file `store`, or by what `torchrun` put into the environment."""
    if store is None:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = device_of(wanted, rank, size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method="env://" if store is None else store.absolute().as_uri(),
        rank=rank,
        world_size=size,
    )
    try:
        yield Team(rank, size, device)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def led(folder: Path, wanted: str, size: int, *, resume: bool) -> Iterator[Team]:
    """Start `size - 1` helpers for the run in `folder`, and lead them."""
    device_of(wanted, 0, size)  # refused before anything is started
    store = folder / ".team"
    store.unlink(missing_ok=True)
    logs = [folder / f".helper-{rank}.log" for rank in range(1, size)]
    helpers = []
    n_threads = torch.get_num_threads()
    try:
        for rank, log in enumerate(logs, 1):
            with log.open("wb") as file:
                words = [str(folder), str(rank), str(size), str(int(resume))]
                command = [sys.executable, "-m", "particle_explorer.training", *words]
                helpers.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
                )
        _wait_for(helpers, logs)
        try:
            with joined(wanted, 0, size, store) as team:
                yield team
        except RuntimeError as error:
            time.sleep(1.0)  # whoever ended first may still be ending
            _complain(helpers, logs, error)
            raise
        deadline = time.monotonic() + END_S
        for helper in helpers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                helper.wait(max(0.1, deadline - time.monotonic()))
    finally:
        for helper in helpers:
            if helper.poll() is None:
                helper.terminate()
            helper.wait()
        for path in (store, *logs, *(ready_file(log) for log in logs)):
            path.unlink(missing_ok=True)
        torch.set_num_threads(n_threads)


def ready_file(log: Path) -> Path:
    """What a helper makes when it is ready to meet the others."""
    return log.with_suffix(".ready")


def _wait_for(helpers: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    began = time.monotonic()
    while not all(ready_file(log).exists() for log in logs):
        _complain(helpers, logs, None)
        if time.monotonic() - began > START_S:
            raise UserError(f"{len(helpers)} helpers did not start within {START_S:.0f} s; use one device")
        time.sleep(0.05)


def _complain(helpers: list[subprocess.Popen[bytes]], logs: list[Path], error: BaseException | None) -> None:
    """Say what a helper that has ended said last."""
    for helper, log in zip(helpers, logs, strict=True):
        if helper.poll():
            said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
            reason = said[-1] if said else f"exit status {helper.returncode}"
            raise UserError(f"a process that helps with this training ended: {reason}") from error
