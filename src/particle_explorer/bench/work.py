"""What a step has to do, counted and not timed: its products, and the bytes its operations read and write.

A device that does so many products and moves so many bytes in a second cannot be faster than either allows,
as long as operations are not fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm, torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm}
_GATHERING = {
    torch.ops.aten.index,
    torch.ops.aten.index_select,
    torch.ops.aten.gather,
    torch.ops.aten.embedding,
}
"""Of what they read from, they read as much as they write."""


class Work(NamedTuple):
    """Of some steps together."""

    flop: int
    """Of matrix products and convolutions, a multiplication with its addition counted as two"""
    n_bytes: int
    """Read and written by operations, each by itself, and copies"""
    n_operations: int
    """A GPU takes some microseconds to start each"""
    n_images: int

    def per_image(self, of: str) -> dict[str, float]:
        """`OF_MFLOP_per_image`, `OF_MB_per_image` and `OF_operations_per_1000`."""
        return {
            f"{of}_MFLOP_per_image": round(self.flop / self.n_images / 1e6, 2),
            f"{of}_MB_per_image": round(self.n_bytes / self.n_images / 1e6, 2),
            f"{of}_operations_per_1000": round(self.n_operations / self.n_images * 1000),
        }


def counted(step: Callable[[], int], n_steps: int = 1) -> Work:
    """The work of `n_steps` steps, each of which returns how many images it did."""
    with _Counter() as counter:
        n_images = sum(step() for _ in range(n_steps))
    return Work(counter.flop, counter.n_bytes, counter.n_operations, n_images)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flop = self.n_bytes = self.n_operations = 0

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        aliases = [value.alias_info for value in function._schema.returns]
        if aliases and all(alias is not None and not alias.is_write for alias in aliases):
            return out  # a view
        self.n_operations += 1
        packet = function.overloadpacket
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if packet in _GATHERING:
            read = [*written, *read[1:]]
        self.n_bytes += sum(map(_n_bytes, read)) + sum(map(_n_bytes, written))
        sparse = [one for one in read if one.layout != torch.strided]
        product = _IN_PLACE.get(packet, packet)
        if sparse:
            self.flop += 2 * sparse[0].values().numel() * written[0].shape[-1]
        elif product in flop_registry:
            self.flop += flop_registry[product](*args, **kwargs, out_val=out)
        return out


def _n_bytes(tensor: Tensor) -> int:
    if tensor.layout != torch.strided:
        parts = (tensor.values(), tensor.crow_indices(), tensor.col_indices())
        return sum(part.numel() * part.element_size() for part in parts)
    # what is expanded is read once
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
