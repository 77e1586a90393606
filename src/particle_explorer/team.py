"""Processes that train one model together, each on a device of its own.

Each of them takes its share of the rows of every batch; gradients and losses are added up, so that a step
is that of the whole batch in one process. Either `--train.devices N` starts the helpers, or `torchrun` or
SLURM's `srun` starts everybody. They meet and talk through Lightning Fabric, of the extra `multi`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from particle_explorer.files import UserError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from particle_explorer.models.base import Share

START_S = 300.0
"""Longest that a helper may take to start"""
END_S = 10.0
"""Longest that helpers are waited for when all is done"""


class Place(NamedTuple):
    """One process among several, of which some run on the same computer."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    port: int = 0
    """Where all meet on this computer; 0 where the environment says where"""


class Team:
    """This process among `size`; number 0 leads: it alone writes, reports and finishes."""

    def __init__(
        self, rank: int = 0, size: int = 1, device: torch.device | None = None, fabric: Fabric | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self.device = device or torch.device("cpu")
        self._fabric = fabric

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
        return bool(self._reduced(value, "sum").item())

    def least(self, number: int) -> int:
        """The smallest of what the processes say."""
        if self.size == 1:
            return number
        return int(self._reduced(torch.tensor([float(number)], device=self.device), "min").item())

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Put the sum over all processes into each tensor, in one message."""
        if self.size == 1:
            return
        listed = list(tensors)
        flat = torch.cat([tensor.reshape(-1).float() for tensor in listed])
        flat = self._reduced(flat, "sum")
        for tensor, part in zip(listed, flat.split([tensor.numel() for tensor in listed]), strict=True):
            tensor.copy_(part.reshape(tensor.shape))

    def same(self, *tensors: Tensor) -> None:
        """Put what the leader has into each tensor."""
        if self.size == 1:
            return
        for tensor in tensors:
            sent = tensor.to(self.device).contiguous()
            dist.broadcast(sent, 0)  # Fabric's would send a pickle
            tensor.copy_(sent)

    def check_agreement(self, tensors: Iterable[Tensor]) -> None:
        """Refuse to go on where processes have other weights than each other."""
        if self.size == 1:
            return
        total = torch.stack([tensor.detach().double().sum() for tensor in tensors]).cpu()
        mine = total.float().to(self.device)
        highest, lowest = (self._reduced(mine.clone(), how) for how in ("max", "min"))
        if not torch.equal(highest, lowest):
            raise UserError(
                f"the {self.size} processes of this training have come to different weights; their devices"
                " compute differently; train on one, or on devices of one kind"
            )

    def _reduced(self, tensor: Tensor, how: str) -> Tensor:
        assert self._fabric is not None
        reduced: Any = self._fabric.all_reduce(tensor, reduce_op=how)
        return reduced  # type: ignore[no-any-return]

    def tell(self, text: str) -> str:
        """What the leader says, in every process."""
        data = list(text.encode())
        length = torch.tensor([len(data)])
        self.same(length)
        said = torch.tensor(data if self.leads else [0] * int(length), dtype=torch.uint8)
        self.same(said)
        return bytes(said.tolist()).decode()


def device_of(wanted: str, place: Place) -> torch.device:
    """The device of one process of several; `UserError` where there are not enough."""
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and n_cuda == 0):
        return torch.device("cpu")
    if wanted not in ("auto", "cuda"):
        raise UserError(f"--device {wanted}: several devices are cuda or cpu; choose auto, cuda or cpu")
    if place.local_size > n_cuda:
        there = f"{n_cuda} CUDA device{'s' if n_cuda > 1 else ''}" if n_cuda else "no CUDA device"
        raise UserError(
            f"--train.devices {place.size}: torch finds {there} here; choose fewer, or --device cpu"
        )
    return torch.device("cuda", place.local_rank)


def place_among_several() -> Place | None:
    """Where `torchrun` or `srun` has put this process; None where it was started alone."""
    said = os.environ
    if int(said.get("WORLD_SIZE", "1")) > 1:
        rank, size = int(said["RANK"]), int(said["WORLD_SIZE"])
        return Place(rank, size, int(said.get("LOCAL_RANK", rank)), int(said.get("LOCAL_WORLD_SIZE", size)))
    # a batch script, which runs once, has the number of tasks too, but no step
    if "SLURM_STEP_ID" in said and int(said.get("SLURM_NTASKS", "1")) > 1:
        return Place(
            int(said["SLURM_PROCID"]),
            int(said["SLURM_NTASKS"]),
            int(said["SLURM_LOCALID"]),
            _tasks_per_node(),
        )
    return None


def _tasks_per_node() -> int:
    """How many processes `srun` runs on each node; `UserError` where nodes have more and less.

    Fabric counts ranks and meets by equal nodes: with others it would wait for somebody who never comes.
    """
    said = os.environ
    size, n_nodes = int(said["SLURM_NTASKS"]), int(said.get("SLURM_NNODES", "1"))
    told = said.get("SLURM_STEP_TASKS_PER_NODE") or said.get("SLURM_TASKS_PER_NODE", "")
    counts = set(re.findall(r"(\d+)(?:\(x\d+\))?", told))  # 2(x3),1 is 2, 2, 2 and 1
    if len(counts) > 1 or size % n_nodes:
        raise UserError(
            f"srun runs {size} tasks on {n_nodes} nodes, not as many on each{f' ({told})' if told else ''};"
            " training needs equal numbers: choose --ntasks-per-node and --nodes, and no --ntasks beside them"
        )
    return int(counts.pop()) if counts else size // n_nodes


def _fabric(place: Place, device: torch.device) -> Fabric:
    """Fabric for one process of several that somebody else has started."""
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
        from lightning_fabric.strategies import DDPStrategy
    except ImportError as error:
        raise UserError(
            "training on several devices needs Lightning Fabric:"
            ' pip install "napari-particle-explorer[multi]", or train on one'
        ) from error

    class Here(LightningEnvironment):
        """This place, and where to meet."""

        @property
        def creates_processes_externally(self) -> bool:
            return True

        @property
        def main_address(self) -> str:
            return "127.0.0.1" if place.port else os.environ.get("MASTER_ADDR", "127.0.0.1")

        @property
        def main_port(self) -> int:
            return place.port or int(os.environ.get("MASTER_PORT", "29500"))

        def world_size(self) -> int:
            return place.size

        def set_world_size(self, size: int) -> None:
            pass  # it is known

        def global_rank(self) -> int:
            return place.rank

        def set_global_rank(self, rank: int) -> None:
            pass

        def local_rank(self) -> int:
            return place.local_rank

        def node_rank(self) -> int:
            return place.rank // place.local_size

    by_slurm = not place.port and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if by_slurm:  # Fabric asks for the option, also where srun was told the number of all tasks
        os.environ["SLURM_NTASKS_PER_NODE"] = str(place.local_size)
    environment = SLURMEnvironment(auto_requeue=False) if by_slurm else Here()
    for name in ("lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return Fabric(
        accelerator=device.type,
        devices=place.local_size,
        num_nodes=max(1, place.size // place.local_size),
        strategy=DDPStrategy(cluster_environment=environment),
    )


@contextlib.contextmanager
def joined(wanted: str, place: Place) -> Iterator[Team]:
    """Meet the others."""
    device = device_of(wanted, place)
    fabric = _fabric(place, device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // place.local_size))
    fabric.launch()
    try:
        yield Team(place.rank, place.size, fabric.device, fabric)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def led(folder: Path, wanted: str, size: int, *, resume: bool) -> Iterator[Team]:
    """Start `size - 1` helpers for the run in `folder`, and lead them."""
    leader = Place(0, size, 0, size, _free_port())
    _fabric(leader, device_of(wanted, leader))  # what is missing is said before anything is started
    logs = [folder / f".helper-{rank}.log" for rank in range(1, size)]
    helpers = []
    n_threads = torch.get_num_threads()
    try:
        for rank, log in enumerate(logs, 1):
            with log.open("wb") as file:
                words = [str(folder), str(rank), str(size), str(leader.port), str(int(resume))]
                command = [sys.executable, "-m", "particle_explorer.training", *words]
                helpers.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
                )
        _wait_for(helpers, logs)
        try:
            with joined(wanted, leader) as team:
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
        for path in (*logs, *(ready_file(log) for log in logs)):
            path.unlink(missing_ok=True)
        torch.set_num_threads(n_threads)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


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
