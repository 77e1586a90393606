"""What torch sums on a device is what splines give on the CPU, and nothing on the way waits or is doubled."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from particle_explorer import averaging, devices
from particle_explorer.averaging import ClassAverage, average_members, class_average
from particle_explorer.configs import AverageConfig
from particle_explorer.files import Stopped, UserError
from particle_explorer.resampling import Scale
from particle_explorer.summing import moving, on_device, where
from particle_explorer.summing.work import Members

DEVICES = ["torch-cpu"]
if torch.cuda.is_available():
    DEVICES.append("cuda")
if torch.backends.mps.is_available():
    DEVICES.append("mps")


class Stack:
    """Images of one or two boxes in memory."""

    def __init__(self, images: list[NDArray[np.float32]]) -> None:
        self.images = images
        self.box_px = np.array([image.shape[-1] for image in images])
        self.reads: list[int] = []

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        self.reads += rows.tolist()
        return np.stack([self.images[row] for row in rows])


class Originals:
    """Images of every kind: signs, states of the CTF, poses and a constant that must not matter."""

    def __init__(self, k: int, n: int, channels: int = 1, state: str = "raw", sign: int = 1) -> None:
        rng = np.random.default_rng(n)
        y, x = np.indices((n, n)) - n // 2
        blob = np.exp(-((y - 3) ** 2 + (x + 2) ** 2) / 20) * 3
        images = 50 + blob + rng.normal(size=(k, channels, n, n))
        self.stack = Stack(list(images.astype(np.float32)))
        self.table = pd.DataFrame(
            {
                "pixel_size_A": 3.0,
                "box_px": n,
                "defocus_u_A": rng.uniform(9000, 24000, k),
                "defocus_v_A": rng.uniform(9000, 24000, k),
                "defocus_angle_deg": rng.uniform(0, 180, k),
                "voltage_kV": 300.0,
                "spherical_aberration_mm": 2.7,
                "ctf_state": state,
            },
            index=pd.Index(np.arange(k, dtype=np.uint64) + 2**63, name="uid"),
        )
        self.plan = SimpleNamespace(sign=sign, ctf="keep")
        self.scale: Scale | None = None
        self.angle, self.shift = rng.uniform(-400, 400, k), rng.uniform(-5, 5, (k, 2))
        self.shift[0] = 500  # out of the box altogether

    def originals(self) -> Stack:
        return self.stack


def some_members(k: int) -> Members:
    """Three averages that share particles, of different weights; the second of one member."""
    row = np.concatenate([np.arange(k), [5], np.arange(k // 3, k)])
    rng = np.random.default_rng(0)
    which = np.repeat([0, 1, 2], [k, 1, k - k // 3])
    return Members(row, which, np.where(rng.random(len(row)) < 0.5, 1.0, rng.uniform(0.1, 2, len(row))))


def averages(session: Originals, device: str, *, half: Any = None, **config: Any) -> list[ClassAverage]:
    members = some_members(len(session.table))
    if half is not None:
        half = np.random.default_rng(1).integers(0, 2, len(members.row))
    return average_members(
        session,
        members,
        ["a", "b", "c"],
        session.angle,
        session.shift,
        AverageConfig(**({"interpolation": "spline"} | config)),
        half=half,
        device=device,
    )


def assert_alike(found: list[ClassAverage], expected: list[ClassAverage]) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in ("image", "half_a", "half_b", "frc"):
            got, wanted = getattr(one, name), getattr(other, name)
            np.testing.assert_allclose(got, wanted, atol=2e-4 * max(1e-3, np.abs(wanted).max()), err_msg=name)
        np.testing.assert_allclose(*(x.ssnr / (1 + x.ssnr) for x in (one, other)), atol=1e-3)
        np.testing.assert_array_equal(one.uid, other.uid)
        np.testing.assert_array_equal(one.weight, other.weight)
        assert one.n_effective == pytest.approx(other.n_effective)
        assert (one.ctf, one.halves_independent) == (other.ctf, other.halves_independent)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("n", "m", "channels", "state", "mode", "sign"),
    [
        (32, 0, 1, "none", "none", 1),
        (33, 0, 3, "none", "none", -1),
        (32, 0, 1, "raw", "wiener", -1),
        (33, 0, 3, "raw", "wiener", 1),
        (33, 24, 1, "premultiplied", "wiener", 1),
        (32, 25, 1, "phase-flipped", "wiener", -1),
        (32, 0, 1, "raw", "phase-flip", 1),
        (33, 25, 3, "premultiplied", "phase-flip", -1),
        (32, 0, 1, "phase-flipped", "phase-flip", 1),
    ],
)
def test_a_device_gives_what_splines_give(
    device: str, n: int, m: int, channels: int, state: str, mode: str, sign: int, monkeypatch: Any
) -> None:
    session = Originals(40, n, channels, state, sign)
    expected = averages(session, "cpu", half=mode == "none" or None, ctf=mode, box_px=m)
    monkeypatch.setattr(on_device, "BLOCK_BYTES", 7 * 4 * channels * n * n)  # seven images at a time
    monkeypatch.setattr(on_device, "SEGMENTS", 2)
    for most in (2**30, 1):  # all averages together, and one after the other
        monkeypatch.setattr(on_device, "SUMS_BYTES", most)
        found = averages(session, device, half=mode == "none" or None, ctf=mode, box_px=m)
        assert_alike(found, expected)
        again = averages(session, device, half=mode == "none" or None, ctf=mode, box_px=m)
        for one, other in zip(found, again, strict=True):  # whatever the timing
            np.testing.assert_array_equal(one.image, other.image)
            np.testing.assert_array_equal(one.ssnr, other.ssnr)
    assert found[0].settings["interpolation"] == "spline"
    assert expected[0].settings["computed_on"] == "CPU, 2 threads" != found[0].settings["computed_on"]


@pytest.mark.parametrize("device", DEVICES)
def test_boxes_of_two_sizes_and_large_classes(device: str, monkeypatch: Any) -> None:
    small, large = Originals(200, 24), Originals(50, 36)
    session = Originals(250, 24)
    session.stack = Stack([*small.stack.images, *large.stack.images])
    session.table = pd.concat([small.table, large.table.assign(pixel_size_A=2.0)])
    session.table.index = pd.Index(np.arange(250, dtype=np.uint64), name="uid")
    expected = averages(session, "cpu", ctf="none")
    monkeypatch.setattr(on_device, "BLOCK_BYTES", 16 * 4 * 24 * 24)
    monkeypatch.setattr(on_device, "POWER_MEMBERS", 1000)  # all tell the power
    assert_alike(averages(session, device, ctf="none"), expected)
    monkeypatch.setattr(on_device, "POWER_MEMBERS", 32)  # some do
    for one, other in zip(averages(session, device, ctf="wiener"), averages(session, "cpu"), strict=True):
        np.testing.assert_allclose(one.half_a, other.half_a, atol=0.05 * np.abs(other.half_a).max())
        if one.n > 100:
            strong = other.ssnr > 3
            assert np.abs(one.ssnr[strong] / other.ssnr[strong] - 1).max() < 0.25


def test_every_image_is_read_once_and_progress_ends() -> None:
    session, done = Originals(30, 32), []
    average_members(
        session, some_members(30), ["a", "b", "c"], session.angle, session.shift, device="torch-cpu",
        progress=done.append,
    )  # fmt: skip
    assert session.stack.reads[1:] == list(range(30))  # the first tells how many channels there are
    assert done == sorted(done) and done[-1] == 1.0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("row", [2, 29])
def test_an_image_that_is_not_finite_is_named(device: str, value: float, row: int, monkeypatch: Any) -> None:
    session = Originals(30, 32)
    session.stack.images[row][0, 16, 15] = value
    monkeypatch.setattr(on_device, "BLOCK_BYTES", 2 * 4 * 32 * 32)
    for where_ in (device, "cpu"):
        for how in ("spline", "shears"):
            with pytest.raises(UserError, match=f"image of particle {row + 1} holds numbers that are"):
                averages(session, where_, interpolation=how)


def test_stopping_makes_nothing(monkeypatch: Any) -> None:
    session, stop = Originals(60, 32), threading.Event()
    monkeypatch.setattr(on_device, "BLOCK_BYTES", 2 * 4 * 32 * 32)
    with pytest.raises(Stopped):
        average_members(
            session, some_members(60), ["a", "b", "c"], session.angle, session.shift, device="torch-cpu",
            progress=lambda share: stop.set(), stop=stop,
        )  # fmt: skip
    assert len(session.stack.reads) < 20


class _Watch(TorchDispatchMode):
    """Refuses numbers of double precision, which Apple's GPUs lack, and what makes the host wait."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "_assert_async")

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, name
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                assert one.dtype not in (torch.float64, torch.complex128), name
        self.seen += 1
        return out


@pytest.mark.parametrize("mode", ["none", "wiener", "phase-flip"])
def test_nothing_is_doubled_waits_or_comes_back_to_the_host(mode: str, monkeypatch: Any) -> None:
    """Torch's meta device has shapes and no numbers: whoever reads one, or mixes in a tensor of the host,
    fails as on a GPU."""
    add, seen = moving.Mover.add, []

    def watched(self: moving.Mover, block: moving.Block, images: torch.Tensor) -> torch.Tensor:
        elsewhere = moving.Mover(self.work, self.first, self.first + 3, self.channels, torch.device("meta"))
        with _Watch() as watch:
            bad = add(elsewhere, block, images.to("meta"))
        assert bad.is_meta and bad.shape == (len(block.rows),)
        seen.append(watch.seen)
        return add(self, block, images)

    monkeypatch.setattr(moving.Mover, "add", watched)
    monkeypatch.setattr(on_device, "BLOCK_BYTES", 16 * 4 * 32 * 32)
    averages(Originals(40, 32), "torch-cpu", ctf=mode)
    # as many steps for 16 images as for 8: nothing is done image by image
    assert len(seen) == 3 and len(set(seen)) == 1


def test_a_gpu_is_taken_where_there_is_one_and_much_to_do(monkeypatch: Any) -> None:
    asked: list[str] = []

    def choose(wanted: str) -> torch.device:
        asked.append(wanted)
        return torch.device("cuda", 1) if wanted == "auto" else torch.device(wanted)

    monkeypatch.setattr(devices, "choose_device", choose)
    monkeypatch.setattr(where, "_has_gpu_driver", lambda: True)
    assert where.gpu("auto", 1e9) == "" == where.gpu("cpu", 1e12) and not asked
    assert where.gpu("auto", 1e10) == "cuda:1" and where.gpu("mps", 1.0) == "mps"
    monkeypatch.setattr(where, "_has_gpu_driver", lambda: False)
    assert where.gpu("auto", 1e12) == ""
    monkeypatch.setattr(where, "_has_gpu_driver", lambda: True)
    monkeypatch.setattr(devices, "choose_device", lambda wanted: torch.device("cpu"))
    assert where.gpu("auto", 1e12) == ""  # a driver, and a torch that knows none


def test_what_cannot_be_had_is_said(monkeypatch: Any) -> None:
    session = Originals(8, 32)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device here; choose --device auto or cpu"):
            averages(session, "cuda:0")
    with pytest.raises(UserError, match="--device gpu is not known"):
        averages(session, "gpu")

    def add(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(moving.Mover, "add", add)
    with pytest.raises(UserError, match="too little memory free to average images of 32 px"):
        averages(session, "torch-cpu")


def test_memory_bounds_blocks_and_groups(monkeypatch: Any) -> None:
    assert on_device._images_at_once(256, 256, 1, on_device.WORK_BYTES) >= 64
    assert on_device._images_at_once(2048, 2048, 3, 2**20) == 1
    made: list[int] = []
    group = on_device._group

    def counted(work: Any, first: int, last: int, *args: Any) -> Any:
        made.append(last - first)
        return group(work, first, last, *args)

    monkeypatch.setattr(on_device, "_group", counted)
    session = Originals(12, 32)
    each = 4 * (2 * 32 * 32 + 2 * 32 * 34 + 4 * 32)
    monkeypatch.setattr(on_device, "_free_bytes", lambda device: 2.5 * each * 2)
    averages(session, "torch-cpu", ctf="wiener")
    assert made == [2, 1]


def test_one_average_of_many_images_by_a_user(tmp_path: Any) -> None:
    """`class_average` takes the same word."""
    session = Originals(20, 32)
    rows = np.arange(20)
    one, other = (
        class_average(session.stack, rows, session.angle, session.shift, table=session.table, device=device)
        for device in ("torch-cpu", "cpu")
    )
    assert_alike([one], [other])
    assert averaging.DEVICE_PIXELS == where.DEVICE_PIXELS
