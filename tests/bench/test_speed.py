"""The benchmark of speed measures what it says, beside its yardsticks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from particle_explorer.bench import speed
from particle_explorer.bench.machine import describe
from particle_explorer.bench.plain import images_per_s, time_plain_target, time_plain_vae
from particle_explorer.bench.work import counted
from particle_explorer.configs import SpeedConfig
from particle_explorer.files import UserError

TINY = SpeedConfig(boxes_px=(16,), batch_size=8, seconds=0.02, stack_box_px=32, stack_n=16, quick=True)


def test_a_rate_is_images_over_seconds() -> None:
    calls: list[int] = []

    def step() -> int:
        calls.append(1)
        time.sleep(0.05 if len(calls) > 1 else 0.3)  # the warm-up is slow and not counted
        return 5

    assert images_per_s(step, 0.2) == pytest.approx(100, rel=0.2)


def test_images_are_timed_beside_their_yardsticks(tmp_path: Path) -> None:
    star = speed._stack(tmp_path, TINY)
    averaging = [speed.time_averaging(star, TINY, device) for device in ("", "cpu")]
    for result in (*averaging, speed.time_preprocessing(star, TINY)):
        assert result["images_per_s"] > 0
        assert result["ratio"] == pytest.approx(result["images_per_s"] / result["yardstick_per_s"], abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stack.mrcs", "stack.star"]


def test_models_are_timed_and_the_table_compares_like_with_like() -> None:
    ours = speed.time_model("spatial-vae", 32, TINY)
    plain = time_plain_vae(32, TINY)
    assert min(ours[f"{what}_per_s"] for what in ("train", "train_float32", "encode", "decode")) > 0
    assert ours["decode_one_ms"] > 0 and plain["train_per_s"] > 0
    assert speed.time_model("target-vae", 16, TINY)["train_per_s"] > 0
    assert time_plain_target("target-vae", 16, TINY)["train_per_s"] > 0
    rows = speed._tables([ours | {"train_per_s": 300.0}, plain | {"train_per_s": 100.0}], []).splitlines()
    assert rows[2].startswith("| spatial-vae | 32 | 300 | 3.0 |")
    assert rows[3].startswith("| plain spatial-vae | 32 | 100 |  |")
    assert "The papers' code on another processor" in rows[5]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_products_and_bytes_are_counted() -> None:
    a, b = torch.randn(10, 20), torch.randn(20, 30)
    some = torch.eye(20).to_sparse_csr()
    total = torch.zeros(10, 30)

    def step() -> int:
        product = a @ b  # 2 · 10 · 20 · 30
        total.addmm_(a, b)  # as many
        _ = some @ b  # 2 · 20 · 30: zeros that are not there cost nothing
        _ = product.T[3:]  # nothing is done
        return 4

    work = counted(step, 2)
    assert (work.flop, work.n_operations, work.n_images) == (2 * (12_000 + 12_000 + 1_200), 6, 8)
    sparse = 20 * 4 + 21 * 8 + 20 * 8
    assert work.n_bytes == 2 * (
        4 * (200 + 600 + 300) + 4 * (300 + 200 + 600 + 300) + sparse + 4 * (600 + 600)
    )
    x = torch.randn(3, 4, requires_grad=True)

    def there_and_back() -> int:
        (x @ b[:4]).sum().backward()
        return 1

    both = counted(there_and_back)
    assert both.flop == 2 * (2 * 3 * 4 * 30)  # forward, and backward for x alone


def test_chosen_models_are_timed_and_no_others() -> None:
    said: list[str] = []
    config = TINY.model_copy(update={"what": "models", "models": "rotation-ae, vae"})
    report = speed.run(config, say=said.append)
    assert [(one["model"], one["box_px"]) for one in report["models"]] == [("rotation-ae", 32), ("vae", 32)]
    assert said[0].startswith("rotation-ae, 32 px: ") and report["images"] == []
    with pytest.raises(UserError, match="--models rae: choose all, or some of class-map"):
        speed.run(config.model_copy(update={"models": "vae,rae"}))


def test_each_measurement_has_its_own_memory() -> None:
    result = speed._alone(time_plain_vae, 16, TINY)
    assert 50 < result["peak_memory_MB"] < 5000


def test_the_machine_is_described() -> None:
    machine = describe()
    assert machine["processor"] and machine["cores"] >= 1 and machine["threads"] >= 1
