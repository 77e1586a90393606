"""Images per second: of the models in training, encoding and decoding, of averaging and of preprocessing.

Every figure stands beside a yardstick timed in the same run on the same machine: spatial-VAE beside a plain
float32 implementation that decodes every pixel, TARGET-VAE beside one that also correlates with every turned
kernel directly, averaging beside reading the same file from end to end and
summing it, preprocessing beside a bare loop of reading and Fourier transforms. Each measurement runs in a
process of its own, so that its peak of memory is its own.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import torch
from numpy.typing import NDArray
from torch import Tensor

from particle_explorer import averaging, devices, encoding
from particle_explorer.bench.machine import describe
from particle_explorer.bench.plain import (
    PAPER_TARGET,
    REFERENCE_WORDS,
    images_per_s,
    time_plain_target,
    time_plain_vae,
)
from particle_explorer.bench.work import counted
from particle_explorer.configs import (
    AverageConfig,
    ClassMapConfig,
    CODAEConfig,
    DataSpec,
    ModelConfig,
    PreprocessConfig,
    RotationAEConfig,
    SimulateConfig,
    SpatialVAEConfig,
    SpeedConfig,
    TargetVAEConfig,
    VAEConfig,
)
from particle_explorer.files import UserError, write_text
from particle_explorer.io.mrc import write_stack_in_batches
from particle_explorer.io.reading import read
from particle_explorer.models.base import Batch
from particle_explorer.models.build import build_model
from particle_explorer.particles import ImageStack
from particle_explorer.session import Session
from particle_explorer.simulate import simulate
from particle_explorer.spectra import outside_circle

MODELS: dict[str, ModelConfig] = {
    "class-map": ClassMapConfig(latent_dim=1),
    "class-map-2d": ClassMapConfig(latent_dim=2),
    "spatial-vae": SpatialVAEConfig(starts=1),
    "target-vae": TargetVAEConfig(),
    "codae": CODAEConfig(),
    "rotation-ae": RotationAEConfig(),
    "vae": VAEConfig(),
}
DECODED_AT_ONCE = 16
"""Pictures of one call of `decode`, as a row of the gallery asks for"""
N_IMAGES = 3000
"""Particles that models are timed on; enough for the start of the class map."""


def run(
    config: SpeedConfig, json_file: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure everything; prints markdown tables and writes JSON."""
    if config.quick:
        update = {"boxes_px": (32,), "seconds": 0.2, "stack_box_px": 64, "stack_n": 64}
        config = config.model_copy(update=update)
    models: list[dict[str, Any]] = []
    names = _chosen(config.models)
    for box in () if config.what == "images" else config.boxes_px:
        for name in names:
            models.append(_alone(time_model, name, box, config))
            say(f"{name}, {box} px: " + _words(models[-1]))
        if "spatial-vae" in names:
            models.append(_alone(time_plain_vae, box, config))
            say(f"plain spatial-vae, {box} px: " + _words(models[-1]))
        if "target-vae" not in names:
            continue
        models.append(_alone(time_plain_target, "target-vae", box, config))
        say(f"plain target-vae, {box} px: " + _words(models[-1]))
        if box in PAPER_TARGET:
            for measure in (time_model, time_plain_target):
                models.append(_alone(measure, "target-vae of the paper", box, config))
                say(f"{models[-1]['model']}, {box} px: " + _words(models[-1]))
    images: list[dict[str, Any]] = []
    if config.what != "models":
        with tempfile.TemporaryDirectory(prefix="particle-explorer-bench-") as folder:
            stack = _stack(Path(folder), config)
            images = [_alone(time_averaging, stack, config, "")]
            device = config.device if config.device != "auto" else str(devices.choose_device("auto"))
            if config.device != "auto" or device != "cpu":
                images.append(_alone(time_averaging, stack, config, device))
            images.append(_alone(time_preprocessing, stack, config))
    for result in images:
        say(f"{result['what']}: " + _words(result))
    say("\n" + _tables(models, images))
    report = {
        "machine": describe(),
        "config": config.model_dump(mode="json"),
        "models": models,
        "images": images,
    }
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")
        say(f"\nwritten to {json_file}")
    return report


def _chosen(text: str) -> list[str]:
    if text == "all":
        return list(MODELS)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in MODELS:
            raise UserError(
                f"--models {name}: choose all, or some of {', '.join(MODELS)}, with commas between"
            )
    return names


def _words(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in result.items() if isinstance(value, (int, float)))


def _alone(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """`measure(*args)` in a fresh process, with its peak of memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_memory, measure, *args).result()


def _with_memory(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    result = measure(*args)
    return {"peak_memory_MB": peak_memory_MB()} | result


def peak_memory_MB() -> int:
    """The most memory this process has held; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3))


# ---------------------------------------------------------------------- models


class _InMemory:
    """Simulated particles, normalised, as `models.base.Batches`."""

    def __init__(self, box: int, n: int) -> None:
        settings = SimulateConfig(
            n=n, box_px=box, pixel_size_A=max(2.0, 260 / box), snr=0.2, defocus_max_A=0, defocus_min_A=0
        )
        simulation = simulate(settings)
        self.images = torch.from_numpy(simulation.read(np.arange(n)))

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor) -> Batch:
        return Batch(self.images[index], None, index)


def _passes(n: int, size: int) -> Iterator[tuple[int, Tensor]]:
    """Epoch and rows of one batch after the other, as in training."""
    epoch = 0
    while True:
        yield from ((epoch, index) for index in torch.randperm(n).split(size))
        epoch += 1


def time_model(name: str, box: int, config: SpeedConfig) -> dict[str, Any]:
    """Start the model on simulated particles, then time steps of the kind that `training.fit` makes."""
    torch.manual_seed(0)
    device = devices.choose_device("auto")
    n = 300 if config.quick else N_IMAGES
    data = DataSpec(box_px=box, n_channels=1, diameter_px=0.8 * box, n_particles=n)
    model = build_model(MODELS.get(name) or PAPER_TARGET[box], data).to(device)
    batches = _InMemory(box, n)
    batches.images = batches.images.to(device)
    started = time.perf_counter()
    for _ in model.start(batches):
        pass
    start_seconds = time.perf_counter() - started
    size = min(config.batch_size or model.batch_size, n)
    groups = [p for group in model.parts().values() for p in group]
    optimiser = torch.optim.Adam(groups, lr=model.learning_rate)
    model.train()
    passes = _passes(n, size)

    def train() -> int:
        epoch, index = next(passes)
        model.schedule(0.5, model.n_epochs // 2 + epoch)
        batch = batches.take(index)
        for part in model.parts():
            with devices.autocast(model, device, model.precision):
                losses = model(batch, part)
            if not losses:
                continue
            optimiser.zero_grad(set_to_none=True)
            torch.stack([loss.float() for loss in losses.values()]).sum().backward()
            optimiser.step()
        return len(index)

    def encode() -> int:
        some = min(encoding.ENCODE_AT_ONCE, n)
        with torch.no_grad(), devices.autocast(model, device, "auto"):
            model.encode(batches.take(torch.arange(some)))
        return some

    def decode(k: int) -> Callable[[], int]:
        z = torch.zeros(k, model.latent_dim, device=device)

        def step() -> int:
            with torch.inference_mode():
                model.decode(z)
            return k

        return step

    result: dict[str, Any] = {
        "model": name,
        "box_px": box,
        "batch": size,
        "start_seconds": round(start_seconds, 2),
    }
    result["train_per_s"] = round(images_per_s(train, config.seconds), 1)
    result |= counted(train, 2 * math.ceil(n / size)).per_image("train")
    model.precision = "float32"
    result["train_float32_per_s"] = round(images_per_s(train, config.seconds), 1)
    model.precision = "auto"
    model.eval()
    result["encode_per_s"] = round(images_per_s(encode, config.seconds), 1)
    result |= counted(encode).per_image("encode")
    result["decode_per_s"] = round(images_per_s(decode(DECODED_AT_ONCE), config.seconds), 1)
    result["decode_one_ms"] = round(1e3 / images_per_s(decode(1), config.seconds), 2)
    return result


# ---------------------------------------------------------------------- images


def _stack(folder: Path, config: SpeedConfig) -> Path:
    """A stack of noise with a star file that knows its CTF."""
    n, box = config.stack_n, config.stack_box_px
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((min(n, 64), box, box), dtype=np.float32)
    batches = (noise[: min(len(noise), n - start)] for start in range(0, n, len(noise)))
    write_stack_in_batches(folder / "stack.mrcs", batches, n, box, 1.0)
    lines = [
        "data_optics", "loop_", "_rlnOpticsGroup #1", "_rlnImagePixelSize #2", "_rlnImageSize #3",
        "_rlnVoltage #4", "_rlnSphericalAberration #5", "_rlnAmplitudeContrast #6",
        f"1 1.0 {box} 300.0 2.7 0.1", "", "data_particles", "loop_", "_rlnImageName #1", "_rlnOpticsGroup #2",
        "_rlnDefocusU #3", "_rlnDefocusV #4", "_rlnDefocusAngle #5",
    ]  # fmt: skip
    defocus = rng.uniform(8000, 25000, n)
    lines += [f"{i + 1:06d}@stack.mrcs 1 {u + 200:.1f} {u:.1f} 30.0" for i, u in enumerate(defocus)]
    write_text(folder / "stack.star", "\n".join([*lines, ""]))
    return folder / "stack.star"


def time_averaging(star: Path, config: SpeedConfig, device: str) -> dict[str, Any]:
    """One average of all full-size images, beside reading the file and summing it: from memory, and from the
    disk. By the compiled functions, or by torch on `device`."""
    particles = read(star)
    n, box = len(particles), config.stack_box_px
    path = star.with_name("stack.mrcs")
    rng = np.random.default_rng(0)
    angle, shift = rng.uniform(-180, 180, n), rng.normal(0, 2, (n, 2))

    def summed() -> int:
        data = np.memmap(path, dtype=np.float32, mode="r", offset=1024, shape=(n, box, box))
        total = np.zeros(data.shape[1:], dtype=np.float64)
        for start in range(0, n, 64):
            total += data[start : start + 64].sum(0)
        return n

    on = {"": "cpu", "cpu": "torch-cpu"}.get(device, device)

    def averaged(ctf: str, k: int = n) -> Callable[[], int]:
        def step() -> int:
            averaging.class_average(
                particles.images,
                np.arange(k),
                angle[:k],
                shift[:k],
                table=particles.table[:k],
                config=AverageConfig(ctf=ctf, interpolation="auto" if device else "shears"),  # type: ignore[arg-type]
                device=on,
            )
            return k

        return step

    for ctf in ("none", "wiener"):
        averaged(ctf, min(n, 32))()  # compiled, libraries loaded
    names = {"none": "images_per_s", "wiener": "with_wiener_per_s"}
    words = f", torch on {devices.describe_device(devices.choose_device(device))}" if device else ""
    what = f"averaging, {box} px{words}"
    result: dict[str, Any] = {"what": what, "n": n, "yardstick": "reading and summing"}
    for ctf, name in names.items():
        result[name] = round(images_per_s(averaged(ctf), config.seconds), 1)
    result["peak_memory_MB"] = peak_memory_MB()  # now: the yardstick maps the file into memory
    result["yardstick_per_s"] = round(images_per_s(summed, config.seconds), 1)
    result["ratio"] = round(result["images_per_s"] / result["yardstick_per_s"], 3)
    if _forget(path):
        times = []
        for step in (summed, averaged("none")):
            _forget(path)
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        result |= {
            "from_disk_yardstick_per_s": round(n / times[0], 1),
            "from_disk_per_s": round(n / times[1], 1),
            "from_disk_ratio": round(times[0] / times[1], 3),
        }
    if device:
        if device.startswith("cuda"):
            result["peak_device_memory_MB"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
        return result
    result["alignment_1_minus_r"] = _alignment_error(particles.images, angle, shift, min(n, 200))
    return result


def _forget(path: Path) -> bool:
    """Have the system drop a file from its memory, where it can."""
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return True


def _alignment_error(images: ImageStack, angle: NDArray[Any], shift: NDArray[Any], k: int) -> float:
    """1 - r between one average by splines and by shears, low-passed at 0.3 of the sampling."""
    pictures = []
    for how in ("spline", "shears"):
        average = averaging.class_average(
            images,
            np.arange(k),
            angle[:k],
            shift[:k],
            config=AverageConfig(ctf="none", interpolation=how),  # type: ignore[arg-type]
        )
        n = average.image.shape[-1]
        y, x = np.meshgrid(np.fft.fftfreq(n), np.fft.rfftfreq(n), indexing="ij")
        low = np.fft.irfft2(np.fft.rfft2(average.image) * (np.hypot(y, x) < 0.3), s=(n, n))
        pictures.append(low[~outside_circle(n)])
    return float(f"{1 - np.corrcoef(pictures[0], pictures[1])[0, 1]:.2g}")


def time_preprocessing(star: Path, config: SpeedConfig) -> dict[str, Any]:
    """Making a session (crop, flip, background, file on disk), beside reading and transforming."""
    particles = read(star)
    n = len(particles)
    rows = np.arange(n)

    def bare() -> int:
        for start in range(0, n, 64):
            scipy.fft.rfft2(particles.images.read(rows[start : start + 64]))
        return n

    with tempfile.TemporaryDirectory(dir=star.parent) as folder:
        names = _counted(Path(folder))

        def session() -> int:
            Session.create(next(names), particles, PreprocessConfig())
            return n

        yardstick, rate = images_per_s(bare, config.seconds), images_per_s(session, config.seconds)
    return {
        "what": f"preprocessing, {config.stack_box_px} px",
        "images_per_s": round(rate, 1),
        "yardstick": "reading and a Fourier transform",
        "yardstick_per_s": round(yardstick, 1),
        "ratio": round(rate / yardstick, 3),
    }


def _counted(folder: Path) -> Iterator[Path]:
    number = 0
    while True:
        yield folder / f"session-{number}"
        number += 1


def _tables(models: list[dict[str, Any]], images: list[dict[str, Any]]) -> str:
    lines = [
        "| model | box | train, images/s | ratio to plain | ratio to float32 | encode, images/s"
        " | decode, pictures/s | one picture, ms | peak, MB"
        " | train: MFLOP · MB per image · operations per 1 000 | encode |"
    ]
    lines.append("|" + "---|" * 11)
    plain = {(m["model"], m["box_px"]): m["train_per_s"] for m in models if m["model"].startswith("plain")}
    for m in models:
        ratio = m["train_per_s"] / plain.get((f"plain {m['model']}", m["box_px"]), math.nan)
        cells = [
            m["model"],
            str(m["box_px"]),
            f"{m['train_per_s']:.{0 if m['train_per_s'] >= 20 else 1}f}",
            "" if math.isnan(ratio) else f"{ratio:.1f}",
            f"{m['train_per_s'] / m['train_float32_per_s']:.1f}" if "train_float32_per_s" in m else "",
        ]
        rest = ("encode_per_s", "decode_per_s", "decode_one_ms", "peak_memory_MB")
        cells += [str(m.get(name, "")) for name in rest]
        for what in ("train", "encode"):
            work = [
                m.get(f"{what}_{of}") for of in ("MFLOP_per_image", "MB_per_image", "operations_per_1000")
            ]
            cells.append("" if None in work else " · ".join(map(str, work)))
        lines.append("| " + " | ".join(cells) + " |")
    if models:
        lines += ["", f"{describe()['processor']}, {torch.get_num_threads()} threads. " + REFERENCE_WORDS]
    lines += ["", "| what | images/s | yardstick | its images/s | ratio | peak, MB |", "|" + "---|" * 6]
    for i in images:
        names = ("what", "images_per_s", "yardstick", "yardstick_per_s", "ratio", "peak_memory_MB")
        lines.append("| " + " | ".join(str(i.get(name, "")) for name in names) + " |")
    return "\n".join(lines)
