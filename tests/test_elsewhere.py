"""Every model is fitted on a GPU as it is on the CPU: nothing is left on the host, nothing is mixed.

No GPU is needed: tensors only say that they lie on one, and refuse what it would refuse. They are computed
on the CPU, so a fit has to give the numbers that it gives there. Refused are operations with a tensor of
the host (unless it has no dimension, or is an index), NumPy, random numbers from a generator of the host,
what the kind of device has no kernel for by the list that comes with torch, and 64-bit floats on Apple's.
Not seen here: kernels that round differently, and speed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchgen
import yaml
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from particle_explorer import training
from particle_explorer.configs import PreprocessConfig, RunConfig
from particle_explorer.encoding import SessionBatches, encode, load_model
from particle_explorer.latents import Latents
from particle_explorer.models.class_map import ClassMap
from particle_explorer.particles import Particles
from particle_explorer.session import Run, Session
from particle_explorer.training import fit

SMALL_TARGET = {
    "kind": "target-vae",
    "channels": 16,
    "kernel_functions": 40,
    "features": 64,
    "hidden": 32,
    "rotations": "P4",
}
MODELS: dict[str, dict[str, object]] = {
    "class-map": {"kind": "class-map", "latent_dim": 1, "angle_step_deg": 30, "nodes_per_dim": 5},
    "class-map of many dimensions": {
        "kind": "class-map",
        "latent_dim": 4,
        "angle_step_deg": 30,
        "nodes_per_dim": 4,
    },
    "class-map of classes": {
        "kind": "class-map",
        "varies": "classes",
        "angle_step_deg": 30,
        "nodes_per_dim": 4,
    },
    "class-map of filaments": {
        "kind": "class-map",
        "psi_prior_deg": 10,
        "mirror": True,
        "shift_range_px": 6,
        "angle_step_deg": 30,
        "nodes_per_dim": 4,
    },
    "vae": {"kind": "vae", "hidden": 32},
    "spatial-vae": {"kind": "spatial-vae", "hidden": 32},
    "spatial-vae with CTF": {
        "kind": "spatial-vae",
        "hidden": 32,
        "apply_ctf": True,
        "likelihood": "gaussian-learned",
        "non_negative": True,
    },
    "target-vae": SMALL_TARGET,
    "codae": {"kind": "codae"},
    "rotation-ae": {"kind": "rotation-ae", "critic_every": 1},
    "rotation-ae without poses": {"kind": "rotation-ae", "poses": "self", "adversarial": "binary"},
}


@pytest.fixture
def session(tiny_particles: Particles, tmp_path: Path) -> Session:
    """Forty particles that carry a CTF and poses."""
    some = tiny_particles[np.arange(40)]
    table = some.table.assign(
        angle_deg=some.table["true_angle_deg"],
        shift_y_px=some.table["true_shift_y_px"],
        shift_x_px=some.table["true_shift_x_px"],
    )
    return Session.create(tmp_path / "session", replace(some, table=table), PreprocessConfig())


def new_run(session: Session, model: dict[str, object], n_epochs: int = 2, precision: str = "float32") -> Run:
    config = {
        "model": model,
        "train": {"n_epochs": n_epochs, "precision": precision, "batch_size": 16, "checkpoint_minutes": 0},
        "device": "cpu",
        "data": session.data_spec(),
    }
    return session.new_run(RunConfig.model_validate(config))


def fitted(run: Run, **how: Any) -> Latents:
    for _ in fit(run, **how):
        pass
    latents = run.latents()
    assert latents is not None
    return latents


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("model", MODELS)
def test_a_fit_there_is_the_fit_here(model: str, kind: str, session: Session, monkeypatch: Any) -> None:
    precision = {"cuda": "bf16", "mps": "float32"}[kind]
    here = fitted(new_run(session, MODELS[model], precision=precision))
    with pretended(kind, monkeypatch) as device:
        run = new_run(session, MODELS[model], precision=precision)
        there = fitted(run)
        again = load_model(run, device)
        assert next(again.parameters()).device == device
        *_, (_, encoded) = encode(again, session, precision=precision)
        assert again.decode(torch.zeros(1, again.latent_dim, device=device)).device == device
        if isinstance(again, ClassMap):
            batch = SessionBatches(session, np.arange(5), device, with_ctf=True, with_pose=True).take(
                torch.arange(5)
            )
            assert again.log_density(batch, again.encode(batch)).device == device
    assert "CPU" not in run.status.device and encoded is not None
    # not equal to the last digit: optimisers go through tensors of another type one by one
    for latents in (there, encoded):
        np.testing.assert_allclose(latents.z, here.z, rtol=1e-3, atol=1e-4)
    if here.angle_deg is not None:
        np.testing.assert_allclose(there.angle_deg, here.angle_deg, atol=0.05)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_stopped_fit_is_resumed_there(kind: str, session: Session, monkeypatch: Any) -> None:
    model = MODELS["vae"]
    here = fitted(new_run(session, model, n_epochs=4))
    with pretended(kind, monkeypatch):
        run, stop = new_run(session, model, n_epochs=4), threading.Event()
        for progress in fit(run, stop):
            if progress.epoch == 2:
                stop.set()
        assert run.can_resume and not run.is_encoded
        np.testing.assert_array_equal(fitted(run, resume=True).z, here.z)


def test_what_a_gpu_refuses_is_refused(monkeypatch: Any) -> None:
    host = torch.ones(3)
    with pretended("cuda", monkeypatch) as device:
        there = host.to(device)
        assert there.device == device and there.cpu().device == HERE and there.tolist() == [1, 1, 1]
        assert (there * host.sum()).device == (there * 2)[torch.tensor([0])].device == device
        for refused in (
            lambda: there + host,
            lambda: host[there > 0],
            lambda: there.__setitem__(torch.tensor([0]), host),
            lambda: torch.cat([there, host]),
            lambda: torch.rand(3, device=device, generator=torch.Generator()),
            lambda: torch.linalg.lstsq(there[:, None], there[:, None], driver="gelsd"),
        ):
            with pytest.raises(RuntimeError):
                refused()
        with pytest.raises(TypeError):
            there.numpy()
    with pretended("mps", monkeypatch) as device:
        with pytest.raises(TypeError):
            torch.ones(3, device=device).double()
        with pytest.raises(NotImplementedError):
            torch.linalg.svd(torch.eye(3, device=device))


# ---------------------------------------------------------------------- the device


HERE = torch.device("cpu")
_COMPOSED = {
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
}
_ABOUT = {getattr(Tensor, name).__get__: name for name in ("device", "is_cuda", "is_mps", "is_cpu")}
_COPIES = (Tensor.copy_, Tensor.data.__set__)  # type: ignore[attr-defined]
_INDEXED = (Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_, torch.index_put)
_TO = (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as)
_NUMPY = (Tensor.numpy, Tensor.__array__)
_FROM_NUMBERS = (torch.tensor, torch.as_tensor)


class Elsewhere(Tensor):
    """A tensor that lies on the pretended device."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})


class _Pretence(TorchFunctionMode):
    """While it lasts, functions that make tensors know the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _call(func, args, kwargs or {})


class _Kernels(TorchDispatchMode):
    """While it lasts, operations on tensors that lie there have to be written for their device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _n_there:
            name = func.name().removeprefix("aten::").removesuffix(".default")
            if name not in _written_for(_there.type.upper()):
                raise NotImplementedError(f"{name} is not written for {_there.type}")
        return func(*args, **(kwargs or {}))


@cache
def _written_for(device: str) -> frozenset[str]:
    """The operations that have a kernel for `CUDA` or `MPS`, or are made of such."""
    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    entries = yaml.load((folder / "native_functions.yaml").read_text(), Loader=yaml.CSafeLoader)
    known = {entry["func"].split("(")[0]: entry for entry in entries}
    mine = {device, "Sparse" + device, "SparseCsr" + device, *_COMPOSED}
    written = set()
    for name, entry in known.items():
        kernels = known[entry.get("structured_delegate", name)].get(
            "dispatch", {"CompositeImplicitAutograd": ""}
        )
        kernels = {*kernels, *entry.get("dispatch", {})}
        if mine & {key.strip() for keys in kernels for key in keys.split(",")}:
            written.add(name)
    return frozenset(written)


_there = torch.device("meta")
_n_there = 0  # calls under way that have to do with it


@contextlib.contextmanager
def pretended(kind: str, patch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """`cuda` or `mps` for `fit`, tensors and modules, in this thread."""
    global _there
    _there = torch.device(kind, 0)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    save, load = torch.save, torch.load
    with patch.context() as patched, _Pretence(), _Kernels():
        patched.setattr(training, "choose_device", lambda wanted: _there)
        patched.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**34))
        patched.setattr(torch.cuda, "get_device_name", lambda device: "a pretended GPU")
        patched.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        patched.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
        patched.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
        autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
        patched.setattr(torch, "autocast", lambda kind, *how, **said: autocast("cpu", *how, **said))
        patched.setattr(torch, "is_autocast_enabled", lambda kind: enabled("cpu"))
        patched.setattr(torch, "get_autocast_dtype", lambda kind: dtype("cpu"))
        patched.setattr(torch.random, "fork_rng", _fork_rng(torch.random.fork_rng))
        patched.setattr(torch, "save", lambda value, path: save(_brought(value, HERE), path))
        patched.setattr(
            torch,
            "load",
            lambda path, map_location, weights_only: _brought(
                load(path, HERE, weights_only=weights_only), map_location
            ),
        )
        try:
            yield _there
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)


def _fork_rng(fork_rng: Any) -> Any:
    return lambda devices: fork_rng(devices=[])  # there is one generator, the CPU's


def _brought(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _brought(x, device) for key, x in value.items()}
    return [_brought(x, device) for x in value] if isinstance(value, list) else value


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = list(_tensors((args, kwargs)))
    there = any(_lies_there(x) for x in tensors)
    if there and func in _ABOUT:
        return _there if _ABOUT[func] == "device" else _ABOUT[func] == f"is_{_there.type}"
    if func is torch._has_compatible_shallow_copy_type:
        return _lies_there(args[0]) == _lies_there(args[1])
    if func in _TO:
        return _moved(func, *args, **kwargs)
    device = kwargs.get("device")
    wanted = None if device is None else torch.device(device).type
    if wanted == _there.type:
        if kwargs.get("generator") is not None:
            raise RuntimeError(f"{_name(func)}: a generator of the host for {_there}")
        kwargs = {**kwargs, "device": HERE}
    elif wanted is not None or func in _FROM_NUMBERS:
        return func(*args, **kwargs)
    elif there:
        _refuse(func, args, kwargs, tensors)
    else:
        return func(*args, **kwargs)
    global _n_there
    _n_there += 1
    try:
        result = func(*args, **kwargs)
    finally:
        _n_there -= 1
    if func is Tensor.copy_ and not _lies_there(args[0]):
        return result
    return _tagged(result)


def _refuse(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
    """What a GPU would refuse."""
    if func in _NUMPY:
        raise TypeError(f"a tensor of {_there} is none of NumPy's")
    if func is torch.linalg.lstsq and _there.type == "cuda" and kwargs.get("driver") not in (None, "gels"):
        raise RuntimeError(f"lstsq: CUDA has no {kwargs['driver']}")
    if func in _COPIES:
        return
    if func in _INDEXED:
        indices = list(_tensors(args[1]))
        if not _lies_there(args[0]) and any(_lies_there(x) for x in indices):
            raise RuntimeError(f"{_name(func)}: an index of {_there} into a tensor of the host")
        if func is Tensor.__setitem__ and not indices:
            return  # a copy into a slice
        tensors = [args[0], *_tensors(args[2:])]
    lie = {_lies_there(x) for x in tensors if x.dim()}
    if len(lie) > 1:
        which = ", ".join(f"{tuple(x.shape)} {'there' if _lies_there(x) else 'here'}" for x in tensors)
        raise RuntimeError(f"{_name(func)}: tensors of the host and of {_there}: {which}")


def _moved(func: Any, tensor: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
    """`to` and the like: a copy, where the device is another."""
    given = [*rest, kwargs.pop("device", None), *([HERE] if func is Tensor.cpu else [])]
    given += [_there] if func is Tensor.cuda else []
    device: Any = _there if _lies_there(tensor) else tensor.device
    dtype = kwargs.pop("dtype", None)
    for x in given:
        if isinstance(x, Tensor):
            device, dtype = _there if _lies_there(x) else x.device, x.dtype
        elif isinstance(x, (torch.device, str)):
            device = torch.device(x)
        elif isinstance(x, torch.dtype):
            dtype = x
    moves = (device.type == _there.type) != _lies_there(tensor)
    if device.type not in (HERE.type, _there.type):
        raise RuntimeError(f"there is no {device}")
    copy = bool(kwargs.get("copy", False)) or moves
    result = tensor.to(dtype or tensor.dtype, copy=copy)
    if not moves:
        return _tagged(result) if _lies_there(tensor) else result
    return _tagged(result) if device.type == _there.type else result.as_subclass(Tensor)


def _tagged(result: Any) -> Any:
    if isinstance(result, Tensor):
        if _there.type == "mps" and result.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Apple's GPUs have no {result.dtype}")
        if result.is_sparse or result.layout == torch.sparse_csr:
            result.lies_elsewhere = True  # torch makes no subclasses of these
            return result
        return result if isinstance(result, Elsewhere) else result.as_subclass(Elsewhere)
    if (
        isinstance(result, (list, tuple))
        and any(True for _ in _tensors(result))
        and not isinstance(result, torch.Size)
    ):
        parts = [_tagged(x) for x in result]
        if type(result) in (list, tuple):
            return type(result)(parts)
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return result


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _lies_there(x: Any) -> bool:
    return isinstance(x, Elsewhere) or hasattr(x, "lies_elsewhere")


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
