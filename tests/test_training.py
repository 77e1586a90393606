"""Fitting: what is written, what a stop keeps, and that resuming repeats the uninterrupted run."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from particle_explorer import devices, encoding, status, training
from particle_explorer.configs import (
    ClassMapConfig,
    Config,
    DataSpec,
    PreprocessConfig,
    RunConfig,
    TrainConfig,
    VAEConfig,
)
from particle_explorer.devices import choose_device
from particle_explorer.encoding import encode, encode_stack, load_model, weights_to_start_from
from particle_explorer.files import UserError, locked
from particle_explorer.io.reading import read_array
from particle_explorer.models.base import Batch, Batches, Encoding, ParticleModel, Step
from particle_explorer.session import Run, Session
from particle_explorer.status import read_status, request_pause
from particle_explorer.training import NotFinite, Progress, fit


class TinyModel(ParticleModel):
    """A linear auto-encoder of images shrunk to 4 × 4, with a random number drawn in every step."""

    learning_rate = 1e-2
    batch_size = 16
    n_epochs = 4

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__(config, data)
        self.latent_dim = 2
        self.down = nn.Linear(16, 2)
        self.up = nn.Linear(2, 16)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor
        self.heat = 0.0
        self.told: list[tuple[float, int]] = []
        self.batches: list[Batch] = []

    def _small(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images[:, :1], 4).flatten(1)

    def encode(self, batch: Batch) -> Encoding:
        z = self.down(self._small(batch.images))
        b = len(z)
        extras = {
            "angle_std": torch.full((b,), 0.1),
            "shift_std": torch.full((b,), 0.5),
            "pose_entropy": z[:, 0],
        }
        return Encoding(z, torch.ones_like(z), torch.full((b,), torch.pi / 2), torch.ones(b, 2), extras)

    def decode(self, z: Tensor, angle: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        small = self.up(z).reshape(-1, 1, 4, 4)
        images = nn.functional.interpolate(small, size=(self.data.box_px, self.data.box_px))
        images = images if shift is None else images + shift.sum(1)[:, None, None, None]
        return images if angle is None else images + angle[:, None, None, None]

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        self.batches.append(batch)
        small = self._small(batch.images)
        z = self.down(small)
        noise = torch.randn_like(z) * (0.1 + self.heat)
        return {
            "reconstruction": (self.up(z + noise) - small).square().mean(),
            "kl": 1e-3 * z.square().mean(),
        }

    def start(self, batches: Batches) -> Iterator[Step]:
        yield Step("looking", 0.0)
        self.seen += len(batches.take(torch.arange(len(batches))).row)
        self.up.weight.data += 0.01 * torch.randn(16, 2)
        yield Step("looking", 1.0)

    def schedule(self, fraction: float, epoch: int) -> None:
        self.told.append((fraction, epoch))
        self.heat += 0.01

    def finish(self, batches: Batches) -> Iterator[Step]:
        self.down.bias.data += torch.rand(2)
        yield Step("finishing", 1.0)

    def nodes(self) -> Tensor:
        return torch.zeros(3, 2)

    def training_state(self) -> dict[str, Any]:
        return {"heat": self.heat}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.heat = float(state["heat"])


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    use(monkeypatch, TinyModel)


def use(monkeypatch, model: type[TinyModel]) -> list[TinyModel]:
    """Have `fit` build this model; returns the list that built models are put into."""
    built: list[TinyModel] = []

    def build(config, data):
        built.append(model(config, data))
        return built[-1]

    for module in (training, encoding):
        monkeypatch.setattr(module, "build_model", build)
    return built


def new_run(session: Session, *, where: str = "", device: str = "cpu", **train) -> Run:
    train = {"checkpoint_minutes": 0.0, **train}
    config = RunConfig(
        model=ClassMapConfig(),
        train=TrainConfig(**train),
        data=session.data_spec(),
        where=where,
        device=device,
    )
    return session.new_run(config)


def finished(session: Session) -> Run:
    run = new_run(session)
    last(fit(run))
    return run


def last(steps) -> Progress:
    return list(steps)[-1]


def stop_after(run: Run, condition, **options) -> list[Progress]:
    stop = threading.Event()
    seen = []
    for progress in fit(run, stop, **options):
        seen.append(progress)
        if condition(progress):
            stop.set()
    return seen


def assert_same_results(a: Run, b: Run) -> None:
    first, second = (safetensors.torch.load_file(run.path / "model.safetensors") for run in (a, b))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    np.testing.assert_array_equal(a.latents().z, b.latents().z)


# ---------------------------------------------------------------------- a whole fit


def test_a_constant_learning_rate_stays(tiny_session):
    run = new_run(tiny_session, schedule="constant", n_epochs=2)
    last(fit(run))
    np.testing.assert_allclose(run.metrics()["learning_rate"], TinyModel.learning_rate)


def test_a_fit_leaves_everything_in_its_folder(tiny_session):
    run = new_run(tiny_session)
    told = list(fit(run))
    assert [what for i, what in enumerate(p.what for p in told) if i == 0 or told[i - 1].what != what] == [
        "looking",
        "training",
        "finishing",
        "encoding",
    ]
    assert run.state == "finished" and run.status.message == str(run.path) and run.status.n_epochs == 4
    assert tiny_session.newest_finished_run().name == run.name
    metrics = run.metrics()
    assert metrics["epoch"].tolist()[-1] == 4 and metrics["step"].tolist()[-1] == 4 * 8
    assert metrics["loss"].iloc[-1] < metrics["loss"].iloc[0]
    assert {"reconstruction", "kl", "learning_rate", "seconds", "images_per_second"} <= set(metrics)
    np.testing.assert_allclose(metrics["loss"], metrics["reconstruction"] + metrics["kl"], rtol=1e-5)
    assert metrics["learning_rate"].iloc[-1] == pytest.approx(0, abs=1e-12)
    assert not list(run.path.glob("*.part*")) and told[-1].fraction == 1


def test_angles_become_degrees_and_shifts_pixels_of_the_original(tmp_path):
    images = np.random.default_rng(0).normal(size=(20, 48, 48)).astype(np.float32)
    session = Session.create(tmp_path / "s", read_array(images, "layer"), PreprocessConfig(box_px=32))
    run = new_run(session, n_epochs=1)
    last(fit(run))
    latents = run.latents()
    np.testing.assert_allclose(latents.angle_deg, 90, rtol=1e-5)
    np.testing.assert_allclose(latents.shift_yx_px, 1.5)  # 48 / 32
    np.testing.assert_allclose(latents.extras["angle_std_deg"], np.rad2deg(0.1), rtol=1e-5)
    np.testing.assert_allclose(latents.extras["shift_std_px"], 0.75)


def test_all_rows_are_encoded_also_those_not_fitted(tiny_session, monkeypatch):
    built = use(monkeypatch, TinyModel)
    run = new_run(tiny_session, where="source_row < 30", n_epochs=1)
    last(fit(run))
    fitted = torch.cat([batch.row for batch in built[0].batches])
    assert sorted(fitted.tolist()) == list(range(30)) and float(built[0].seen) == 30
    np.testing.assert_array_equal(run.latents().uid, tiny_session.uid)


def test_every_epoch_sees_every_particle_once_in_another_order(tiny_session, monkeypatch):
    built = use(monkeypatch, TinyModel)
    last(fit(new_run(tiny_session, n_epochs=2, batch_size=50)))
    batches = built[0].batches
    epochs = [torch.cat([batch.row for batch in batches[i : i + 3]]).tolist() for i in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(120)) and epochs[0] != epochs[1]
    np.testing.assert_array_equal(batches[0].images, tiny_session.images.read(batches[0].row))
    fractions, numbers = zip(*built[0].told, strict=True)
    assert numbers == (0, 0, 0, 1, 1, 1) and fractions == tuple(i / 6 for i in range(6))


def test_reading_from_disk_gives_the_same_fit(tiny_session, monkeypatch):
    in_memory, from_disk = new_run(tiny_session), new_run(tiny_session)
    last(fit(in_memory))
    monkeypatch.setattr(encoding, "free_memory_bytes", lambda: 0)
    last(fit(from_disk))
    assert_same_results(in_memory, from_disk)


def test_the_seed_decides(tiny_session):
    runs = [new_run(tiny_session, seed=seed, n_epochs=1) for seed in (1, 1, 2)]
    for run in runs:
        last(fit(run))
    assert_same_results(runs[0], runs[1])
    assert not np.array_equal(runs[0].latents().z, runs[2].latents().z)


def test_the_ctf_comes_along_when_it_is_wanted(tiny_session, monkeypatch):
    class Asking(TinyModel):
        uses_ctf = True

    for model, has in ((TinyModel, False), (Asking, True)):
        built = use(monkeypatch, model)
        last(fit(new_run(tiny_session, n_epochs=1)))
        batch = built[0].batches[0]
        assert (batch.ctf is not None) == has
        if batch.ctf is not None:
            np.testing.assert_allclose(batch.ctf, tiny_session.ctf(batch.row.numpy()))


def test_the_live_view_shows_map_and_panel(tiny_session, monkeypatch):
    monkeypatch.setattr(training, "LIVE_S", 0.0)
    monkeypatch.setattr(training, "LIVE_SHARE", 1e9)
    run = new_run(tiny_session)
    last(fit(run))
    files = sorted((run.path / "live").glob("*.npz"))
    assert len(files) == 2  # the newest, and the one before it for whoever is just reading it
    with np.load(files[-1]) as live:
        assert live["epoch"] == 4
        np.testing.assert_allclose(live["z"], run.latents().z[live["row"]], atol=1e-5)
        assert live["nodes_z"].shape == (3, 2) and live["nodes_images"].shape == (3, 32, 32)
        panel = tiny_session.images.read(live["panel_row"])[:, 0]
        np.testing.assert_array_equal(live["panel_images"], panel)
        assert live["panel_reconstructions"].shape == panel.shape


def test_the_live_view_does_not_change_the_fit(tiny_session, monkeypatch):
    class Dropping(TinyModel):
        def encode(self, batch: Batch) -> Encoding:
            torch.rand(7)  # a model that draws numbers where it should not
            return super().encode(batch)

    use(monkeypatch, Dropping)
    rare, often = new_run(tiny_session), new_run(tiny_session)
    monkeypatch.setattr(training, "LIVE_S", 1e9)
    last(fit(rare))
    monkeypatch.setattr(training, "LIVE_S", 0.0)
    monkeypatch.setattr(training, "LIVE_SHARE", 1e9)
    last(fit(often))
    assert_same_results(rare, often)


def test_the_parts_of_a_model_are_stepped_in_turn(tiny_session, monkeypatch):
    class Adversarial(TinyModel):
        def __init__(self, config, data) -> None:
            super().__init__(config, data)
            self.critic = nn.Linear(2, 1)

        def parts(self) -> dict[str, list[nn.Parameter]]:
            return {
                "model": [*self.down.parameters(), *self.up.parameters()],
                "critic": [*self.critic.parameters()],
            }

        def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
            loss = self.critic(self.down(self._small(batch.images))).mean()
            return {"critic": loss} if part == "critic" else {**super().forward(batch), "fool": -loss}

    built = use(monkeypatch, Adversarial)
    run = new_run(tiny_session, n_epochs=1)
    last(fit(run))
    assert {"model/reconstruction", "model/fool", "critic/critic"} <= set(run.metrics())
    before = Adversarial(ClassMapConfig(), tiny_session.data_spec())
    torch.manual_seed(0)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), built[0].parameters(), strict=True))


# ---------------------------------------------------------------------- stopping and resuming


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_stopped_run_resumes_to_the_uninterrupted_one(tiny_session, epoch):
    whole, parts = new_run(tiny_session), new_run(tiny_session)
    last(fit(whole))
    stop_after(parts, lambda p: p.what == "training" and p.epoch == epoch)
    assert parts.state == "stopped" and not parts.is_encoded and parts.has_weights and parts.can_resume
    told = list(fit(parts, resume=True))
    assert parts.state == "finished" and told[0].what == "training" and told[0].epoch == epoch + 1
    assert_same_results(whole, parts)
    columns = ["step", "loss", "learning_rate"]
    ends = [run.metrics().groupby("epoch").last()[columns].to_numpy() for run in (whole, parts)]
    np.testing.assert_allclose(*ends, rtol=1e-6)


def test_a_fit_that_was_killed_resumes_to_the_uninterrupted_one(tiny_session, monkeypatch):
    whole, killed = new_run(tiny_session), new_run(tiny_session)
    last(fit(whole))

    class Dying(TinyModel):
        def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
            if len(self.told) == 21:  # in the middle of an epoch
                raise ZeroDivisionError
            return super().forward(batch, part)

    use(monkeypatch, Dying)
    with pytest.raises(ZeroDivisionError):
        last(fit(killed))
    assert killed.state == "failed" and "ZeroDivisionError" in killed.status.error
    use(monkeypatch, TinyModel)
    last(fit(killed, resume=True))
    assert_same_results(whole, killed)


def test_a_stop_in_the_start_begins_anew(tiny_session):
    whole, early = new_run(tiny_session), new_run(tiny_session)
    last(fit(whole))
    stop_after(early, lambda p: p.what == "looking")
    assert early.state == "stopped" and not early.can_resume
    last(fit(early, resume=True))
    assert_same_results(whole, early)


@pytest.mark.parametrize("what", ["finishing", "encoding"])
def test_a_stop_after_the_last_epoch_only_finishes_on_resuming(tiny_session, what):
    whole, late = new_run(tiny_session), new_run(tiny_session)
    last(fit(whole))
    stop_after(late, lambda p: p.what == what)
    assert late.state == "stopped"
    told = list(fit(late, resume=True))
    assert told[0].what == "finishing"
    assert_same_results(whole, late)


def go_on(session: Session, parent: Run, model: Config | None = None, **train: Any) -> Run:
    config = RunConfig(
        model=model or ClassMapConfig(),
        train=TrainConfig(checkpoint_minutes=0.0, **train),
        data=session.data_spec(),
        parent=parent.name,
        warm_start=True,
        device="cpu",
    )
    return session.new_run(config)


def test_a_run_goes_on_from_the_weights_of_another(tiny_session, monkeypatch):
    parent = finished(tiny_session)
    built = use(monkeypatch, TinyModel)
    warmed: list[TinyModel] = []
    monkeypatch.setattr(TinyModel, "skip_warm_up", lambda self: warmed.append(self))
    child = go_on(tiny_session, parent, learning_rate=1e-9, n_epochs=1)
    told = list(fit(child))
    assert told[0].what == f"starting from {parent.name}" and "looking" not in {p.what for p in told}
    weights = safetensors.torch.load_file(parent.path / "model.safetensors")
    after = safetensors.torch.load_file(child.path / "model.safetensors")
    for name in ("down.weight", "up.weight", "up.bias", "seen"):
        torch.testing.assert_close(after[name], weights[name], atol=1e-6, rtol=0)
    assert warmed and warmed[0] in built and child.config.parent == parent.name

    # stopped and resumed it is the same: it does not start from its parent again
    parts, whole = (go_on(tiny_session, parent) for _ in range(2))
    last(fit(whole))
    stop_after(parts, lambda p: p.what == "training" and p.epoch == 2)
    last(fit(parts, resume=True))
    assert_same_results(whole, parts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": VAEConfig()}, "of the model class-map"),
        ({"data": {"box_px": 16}}, "box_px 32, these have 16"),
        ({"size": True}, "keep what gives the networks their size"),
        ({"weights": False}, "it has none yet"),
    ],
)
def test_what_a_run_cannot_start_from_is_said(tiny_session, monkeypatch, change, words):
    parent = finished(tiny_session)
    child = go_on(tiny_session, parent, change.get("model"))
    config = child.config
    if "data" in change:
        config = config.model_copy(update={"data": config.data.model_copy(update=change["data"])})
    if change.get("size"):

        class Wider(TinyModel):
            def __init__(self, config: Config, data: DataSpec) -> None:
                super().__init__(config, data)
                self.down = nn.Linear(16, 3)

        use(monkeypatch, Wider)
    if "weights" in change:
        (parent.path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=words):
        weights_to_start_from(config, parent)


def test_a_fit_stands_still_while_it_is_paused(tiny_session, monkeypatch):
    monkeypatch.setattr(status, "HEARTBEAT_S", 0.02)
    whole, run = new_run(tiny_session), new_run(tiny_session)
    last(fit(whole))
    seen: list[str] = []

    def watch() -> None:
        while read_status(run.path).what != "paused":
            time.sleep(0.01)
        before = read_status(run.path)
        time.sleep(0.3)
        seen.extend({before.what, read_status(run.path).what})
        assert read_status(run.path).epoch == before.epoch
        request_pause(run.path, False)

    thread = threading.Thread(target=watch)
    for i, _ in enumerate(fit(run)):
        if i == 0:
            request_pause(run.path)
            time.sleep(0.1)
            thread.start()
    thread.join(10)
    assert seen == ["paused"] and run.state == "finished"
    assert_same_results(whole, run)


def test_a_batch_beyond_the_memory_is_taken_in_parts_to_the_same_end(tiny_session, monkeypatch):
    class Even(TinyModel):
        """No random numbers: parts and whole see the same."""

        step_bytes_per_image = 1000

        def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
            small = self._small(batch.images)
            self.batches.append(batch)
            return {"reconstruction": (self.up(self.down(small)) - small).square().mean()}

    built = use(monkeypatch, Even)
    runs = {}
    for free, largest in ((10**9, 16), (2 * 5500, 4)):  # room for 5 images: a power of two of them
        monkeypatch.setattr(devices, "free_memory_bytes", lambda free=free: free)
        runs[largest] = finished(tiny_session)
        assert max(len(batch.row) for batch in built[-1].batches) == largest
    whole, parts = (safetensors.torch.load_file(run.path / "model.safetensors") for run in runs.values())
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-4)
    losses = [run.metrics()["loss"].to_numpy() for run in runs.values()]
    np.testing.assert_allclose(losses[0][-1], losses[1][-1], rtol=1e-3)


def test_failed_allocations_are_known_by_what_torch_says():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**56)
    assert devices.is_out_of_memory(failed.value)
    assert devices.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as failed:
        torch.ones(2) @ torch.ones(3)
    assert not devices.is_out_of_memory(failed.value)


ON_CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes. Error code 12"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError(ON_CPU)])
def test_a_device_that_runs_out_of_memory_is_asked_for_less(tiny_session, monkeypatch, error):
    class Hungry(TinyModel):
        step_bytes_per_image = 1
        most = 5

        def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
            if len(batch.row) > self.most:
                raise error
            return super().forward(batch, part)

    built = use(monkeypatch, Hungry)
    assert finished(tiny_session).status.state == "finished"
    assert max(len(batch.row) for batch in built[-1].batches) == 4
    monkeypatch.setattr(Hungry, "most", 0)
    with pytest.raises(UserError, match=r"does not hold a step of 1 images; choose a smaller"):
        finished(tiny_session)
    error = RuntimeError("another")
    with pytest.raises(RuntimeError, match="another"):
        finished(tiny_session)


def test_a_stop_file_is_obeyed(tiny_session, monkeypatch):
    from particle_explorer import status

    monkeypatch.setattr(status, "HEARTBEAT_S", 0.01)
    run = new_run(tiny_session, n_epochs=100_000)
    for progress in fit(run):
        if progress.epoch == 2:
            status.request_stop(run.path)
    assert run.state == "stopped" and 2 <= run.status.epoch < 100_000


def test_one_run_has_one_trainer(tiny_session):
    run = new_run(tiny_session)
    with locked(run.path / ".lock"), pytest.raises(UserError, match="is being trained by another process"):
        last(fit(run))


def test_a_broken_checkpoint_is_said_in_a_sentence(tiny_session):
    run = new_run(tiny_session)
    stop_after(run, lambda p: p.epoch == 1)
    (run.path / "resume.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be resumed from"):
        last(fit(run, resume=True))


def test_a_loss_that_is_no_number_keeps_the_last_good_weights(tiny_session, monkeypatch):
    class Exploding(TinyModel):
        def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
            losses = super().forward(batch, part)
            return (
                losses if len(self.told) <= 16 else {"reconstruction": losses["reconstruction"] * torch.nan}
            )

    use(monkeypatch, Exploding)
    run = new_run(tiny_session, checkpoint_minutes=600)
    with pytest.raises(NotFinite, match="not a number any more in epoch 3; the weights of epoch 2 were kept"):
        last(fit(run))
    assert run.state == "failed" and "smaller --train.learning-rate" in run.status.error
    weights = load_model(run).state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    use(monkeypatch, TinyModel)
    two = new_run(tiny_session)
    stop_after(two, lambda p: p.epoch == 2)
    for name, value in load_model(two).state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_buffer_that_is_no_number_keeps_the_last_good_weights(tiny_session, monkeypatch):
    class Exploding(TinyModel):
        def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
            if len(self.told) > 16:  # in the third epoch
                self.seen.fill_(torch.inf)
            return super().forward(batch, part)

    use(monkeypatch, Exploding)
    run = new_run(tiny_session, checkpoint_minutes=600)
    with pytest.raises(NotFinite, match="the weights of epoch 2 were kept"):
        last(fit(run))
    assert load_model(run).seen.isfinite()


# ---------------------------------------------------------------------- models and devices


def test_weights_of_another_model_are_refused(tiny_session, monkeypatch):
    run = new_run(tiny_session, n_epochs=1)
    with pytest.raises(UserError, match="has no weights yet"):
        load_model(run)
    last(fit(run))

    class Wider(TinyModel):
        def __init__(self, config, data) -> None:
            super().__init__(config, data)
            self.down = nn.Linear(16, 3)

    use(monkeypatch, Wider)
    with pytest.raises(UserError, match="does not hold the weights") as error:
        load_model(run)
    assert "\n" not in str(error.value)


def test_encoding_another_stack_equals_encoding_the_session(tiny_session, tiny_particles, monkeypatch):
    run = new_run(tiny_session, n_epochs=1)
    last(fit(run))
    model = load_model(run)
    inside = [latents for _, latents in encode(model, tiny_session)][-1]
    outside = [latents for _, latents in encode_stack(model, tiny_session, tiny_particles)][-1]
    np.testing.assert_array_equal(outside.uid, inside.uid)
    np.testing.assert_allclose(outside.z, inside.z, atol=5e-3)  # the session's images are float16
    np.testing.assert_allclose(outside.shift_yx_px, inside.shift_yx_px)
    wider = replace(tiny_particles, table=tiny_particles.table.assign(pixel_size_A=3.5))
    with pytest.raises(UserError, match="Å per pixel"):
        list(encode_stack(model, tiny_session, wider))


def test_a_mac_that_is_none_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^--device mps: torch finds no Apple GPU here; choose"):
        choose_device("mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("text", ["cuda", "cuda:0", "gpu", "cuda:x"])
def test_a_device_that_is_not_there_is_said_in_a_sentence(text):
    with pytest.raises(UserError, match=r"--device|choose"):
        choose_device(text)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_processor_is_taken():
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_a_run_of_another_cache_is_refused(tiny_session):
    run = new_run(tiny_session)
    other = run.config.model_copy(update={"data": run.config.data.model_copy(update={"box_px": 64})})
    (run.path / "config.json").write_text(other.model_dump_json())
    with pytest.raises(UserError, match="start a new run"):
        last(fit(Run(tiny_session, run.path)))
