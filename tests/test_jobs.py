"""Background jobs as they are seen through their folder, and the process that draws."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from particle_explorer import status
from particle_explorer.configs import RunConfig, SpatialVAEConfig, TrainConfig
from particle_explorer.devices import autocast
from particle_explorer.encoding import load_model
from particle_explorer.files import Stopped, UserError
from particle_explorer.jobs import (
    DecodeClient,
    Status,
    StatusWriter,
    process_started,
    read_log,
    read_status,
    request_stop,
    start,
)
from particle_explorer.session import Run, Session
from particle_explorer.training import fit


def wait_for(folder: Path, seconds: float = 120) -> Status:
    deadline = time.monotonic() + seconds
    while not (found := read_status(folder)).is_over:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def tiny_run(session: Session, **train) -> Run:
    """A run of the smallest spatial-VAE."""
    config = RunConfig(
        model=SpatialVAEConfig(hidden=8, layers=1),
        train=TrainConfig(**{"n_epochs": 1, **train}),
        data=session.data_spec(),
    )
    return session.new_run(config)


# ---------------------------------------------------------------------- status


def test_a_folder_without_a_job_is_new(tmp_path):
    assert read_status(tmp_path) == Status()


def test_a_job_says_what_it_does_and_how_it_ended(tmp_path):
    with StatusWriter(tmp_path / "job") as writer:
        writer.update(what="counting", fraction=0.5)
        found = read_status(tmp_path / "job")
        assert (found.state, found.what, found.pid) == ("running", "counting", os.getpid())
        writer.update(message="ten")
    found = read_status(tmp_path / "job")
    assert (found.state, found.message, found.fraction) == ("finished", "ten", 1.0)


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (UserError("the stack has gone"), "failed", "the stack has gone"),
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (Stopped("stopped"), "stopped", ""),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_errors_are_told(tmp_path, error, state, words):
    with pytest.raises(type(error)), StatusWriter(tmp_path):
        raise error
    found = read_status(tmp_path)
    assert (found.state, found.error) == (state, words)


def test_the_heart_beats_and_hears_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "HEARTBEAT_S", 0.01)
    with StatusWriter(tmp_path) as writer:
        first = read_status(tmp_path).heartbeat
        request_stop(tmp_path)
        assert writer.stop.wait(10)
        deadline = time.monotonic() + 10
        while read_status(tmp_path).heartbeat == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert read_status(tmp_path).state == "stopped"


def test_a_stop_of_an_earlier_job_is_forgotten(tmp_path):
    request_stop(tmp_path)
    with StatusWriter(tmp_path) as writer:
        assert not (tmp_path / "stop").exists()
        assert not writer.stop.is_set()


def test_a_folder_that_was_deleted_is_not_brought_back(tmp_path):
    with StatusWriter(tmp_path / "job") as writer:
        (tmp_path / "job" / "status.json").unlink()
        (tmp_path / "job").rmdir()
        writer.update(what="going on")
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "running"),
        ({"process_started": "another"}, "interrupted"),  # the number was given to another process since
        ({"pid": 2**30}, "interrupted"),
        ({"host": "elsewhere"}, "running"),
        ({"host": "elsewhere", "heartbeat": 1.0}, "interrupted"),
        ({"heartbeat": 1.0}, "running"),  # asleep with its computer, but there
        ({"pid": 2**30, "state": "finished"}, "finished"),
    ],
)
def test_who_says_running_must_be_there(tmp_path, changes, state):
    now = Status(
        "running", os.getpid(), socket.gethostname(), process_started(os.getpid()), time.time(), time.time()
    )
    said = dataclasses.asdict(dataclasses.replace(now, **changes)) | {"of a later version": 1}
    (tmp_path / "status.json").write_text(json.dumps(said))
    assert read_status(tmp_path).state == state


@pytest.mark.parametrize("last_word", ["finished", "stopped", "failed"])
def test_a_job_that_ends_while_it_is_looked_at_is_not_taken_for_interrupted(tmp_path, monkeypatch, last_word):
    said = Status("running", 2**30, socket.gethostname(), "then", time.time(), time.time())
    (tmp_path / "status.json").write_text(json.dumps(dataclasses.asdict(said)))

    def ends_now(pid: int) -> str:
        ended = dataclasses.replace(said, state=last_word)
        (tmp_path / "status.json").write_text(json.dumps(dataclasses.asdict(ended)))
        return process_started(pid)

    monkeypatch.setattr("particle_explorer.status.process_started", ends_now)
    assert read_status(tmp_path).state == last_word


def test_processes_are_told_apart():
    assert process_started(os.getpid()) == process_started(os.getpid()) != ""
    assert process_started(2**30) == ""


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_strange_status_is_said_in_a_sentence(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(UserError, match="is not a status file"):
        read_status(tmp_path)


def test_reading_while_writing_never_fails(tmp_path):
    end = threading.Event()

    def read() -> None:
        while not end.is_set():
            assert read_status(tmp_path).state in ("new", "running")

    thread = threading.Thread(target=read)
    thread.start()
    with StatusWriter(tmp_path) as writer:
        for i in range(200):
            writer.update(what=str(i))
        end.set()
        thread.join()


# ---------------------------------------------------------------------- jobs


def test_a_job_runs_apart_and_reports(tmp_path):
    folder = start(
        ["simulate", "--out", str(tmp_path / "out"), "--n", "30", "--pixel-size-A", "4.5", "--box-px", "48"],
        tmp_path / "job",
    )
    found = read_status(folder)
    assert found.pid != os.getpid() and found.state in ("running", "finished")
    found = wait_for(folder)
    assert found.state == "finished", read_log(folder)
    assert found.message == str(tmp_path / "out" / "particles.star") and Path(found.message).is_file()
    assert "simulating" in read_log(folder)


def test_bad_input_of_a_job_is_told_too(tmp_path):
    for words in (["inspect-me"], ["train", str(tmp_path / "nowhere")], ["simulate", "--n", "3"]):
        folder = start(words, tmp_path / words[0])
        found = wait_for(folder)
        assert found.state == "failed" and found.error, words
        assert found.error in read_log(folder)


# ---------------------------------------------------------------------- drawing


def test_the_process_draws_what_the_model_draws(tiny_session):
    run = tiny_run(tiny_session)
    for _ in fit(run):
        pass
    model = load_model(run)

    def drawn(*args: torch.Tensor) -> np.ndarray:
        with torch.no_grad(), autocast(model, torch.device("cpu"), "auto"):
            return model.decode(*args).float().numpy()

    rng = np.random.default_rng(0)
    z = rng.normal(size=(5, 2)).astype(np.float32)
    angle, shift = rng.uniform(-180, 180, 5), rng.normal(size=(5, 2))
    with DecodeClient(run.path) as client:
        client.wait()
        assert client.shape == (1, 32, 32) and client.latent_dim == 2
        np.testing.assert_allclose(client.decode(z), drawn(torch.from_numpy(z)), atol=1e-5)
        posed = drawn(
            torch.from_numpy(z), torch.deg2rad(torch.tensor(angle).float()), torch.tensor(shift).float()
        )
        np.testing.assert_allclose(client.decode(z, angle, shift), posed, atol=1e-5)
        assert client.decode(z[0], 30.0).shape == (1, 1, 32, 32)
        with pytest.raises(UserError, match="3 coordinates, the model has 2"):
            client.decode(np.zeros((1, 3)))
        np.testing.assert_allclose(client.decode(z[:1]), drawn(torch.from_numpy(z[:1])), atol=1e-5)
        begun = time.perf_counter()
        for _ in range(50):
            client.decode(z[:1])
        assert (time.perf_counter() - begun) / 50 < 0.05
        client._stdin.close()
        assert client._process.wait(60) == 0  # it ends with its input: no drawer outlives its window


def test_what_is_held_still_is_drawn_so(tiny_session):
    from particle_explorer.gauge import Gauge

    run = tiny_run(tiny_session)
    for _ in fit(run):
        pass
    z = np.array([[0.3, -0.2], [1.0, 0.5]], np.float32)
    with DecodeClient(run.path) as client:
        with pytest.raises(UserError, match="holds nothing still"):
            client.decode(z, held=True)
        gauges = []
        for turn in (10.0, 25.0):  # what is written anew is taken at once
            coefficients = np.array([[turn, 1.0, -2.0], [0.0, 0.5, 0.0], [3.0, 0.0, 0.0]])
            gauges.append(Gauge(1, (0.0, 0.0), (2.0, 2.0), coefficients, {}))
            run.save_gauge(gauges[-1].to_json())
            angle, shift = gauges[-1].pose_to_draw(z, 40.0, (1.0, 2.0))
            wanted = client.decode(z, angle, shift)
            np.testing.assert_allclose(client.decode(z, 40.0, (1.0, 2.0), held=True), wanted, atol=1e-5)
            time.sleep(0.01)
        angle, shift = gauges[-1].pose_to_draw(z)
        np.testing.assert_allclose(client.decode(z, held=True), client.decode(z, angle, shift), atol=1e-5)


def test_what_cannot_be_drawn_is_said_in_a_sentence(tiny_session, tmp_path):
    for path in (tmp_path / "nowhere", tiny_run(tiny_session).path):
        with DecodeClient(path) as client, pytest.raises(UserError, match=r"is not a run|has no weights"):
            client.wait()


def test_a_drawer_that_died_is_said_in_a_sentence(tiny_session):
    run = tiny_run(tiny_session)
    for _ in fit(run):
        pass
    with DecodeClient(run.path) as client:
        client.wait()
        client._process.kill()
        client._process.wait()
        with pytest.raises(UserError, match="has ended"):
            client.decode(np.zeros((1, 2)))


def test_the_window_side_needs_no_torch():
    import subprocess

    code = (
        "import sys, particle_explorer.jobs, particle_explorer.session, particle_explorer.latents\n"
        "heavy = {'torch', 'sklearn', 'umap', 'napari', 'qtpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this kernel has no scheduling groups")
def test_a_session_of_its_own_gives_way_as_a_group():
    code = (
        "from pathlib import Path; from particle_explorer.status import give_way; give_way();"
        "import os; print(os.nice(0), *Path('/proc/self/autogroup').read_text().split()[-1:])"
    )
    apart, within = (
        subprocess.run(
            [sys.executable, "-c", code], start_new_session=new, capture_output=True, text=True, check=True
        )
        for new in (True, False)
    )
    # the group of whoever started it is not ours to change; some processes of the system are in none
    before = Path("/proc/self/autogroup").read_text().split()[-1:]
    assert apart.stdout.split()[1:] == [str(status.NICE)]
    assert within.stdout.split()[1:] == before
