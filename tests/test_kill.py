"""kill -9 at any moment: a fit resumes, a parent's death ends nothing, an export is whole or not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch

from particle_explorer.configs import RunConfig, SpatialVAEConfig, TrainConfig
from particle_explorer.jobs import read_log, read_status
from particle_explorer.session import Run, Session

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX signal")


def new_run(session: Session, n_epochs: int) -> Run:
    model = SpatialVAEConfig(hidden=8, layers=1, content_freeze_epochs=0)
    train = TrainConfig(n_epochs=n_epochs, batch_size=20, checkpoint_minutes=0)
    return session.new_run(RunConfig(model=model, train=train, data=session.data_spec(), device="cpu"))


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "particle_explorer.cli", *map(str, words)]


def train(run: Run) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command("train", run.session.path, "--resume", run.name),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_when_it_got_on(run: Run, wait_s: float) -> None:
    """Go on with a run until it has logged something new and `wait_s` more, then kill it."""
    process = train(run)
    before = len(run.metrics())
    wait_until(lambda: len(run.metrics()) > before or process.poll() is not None)
    time.sleep(wait_s)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_training_killed_again_and_again_ends_as_if_it_never_was(tiny_session):
    whole, killed = new_run(tiny_session, 80), new_run(tiny_session, 80)
    assert train(whole).wait() == 0
    for wait_s in np.random.default_rng(0).uniform(
        0, 0.3, 2
    ):  # inside an epoch, between two renames, anywhere
        kill_when_it_got_on(killed, wait_s)
        assert killed.state == "interrupted" and killed.can_resume and not killed.is_encoded
        assert set(safetensors.torch.load_file(killed.path / "model.safetensors"))
        assert not killed.metrics().isna().any(axis=None)
    assert train(killed).wait() == 0
    assert killed.state == "finished"
    first, second = (safetensors.torch.load_file(run.path / "model.safetensors") for run in (whole, killed))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    np.testing.assert_array_equal(whole.latents().z, killed.latents().z)
    assert killed.metrics()["step"].tolist()[-1] == 80 * 6


def test_training_outlives_its_parent(tiny_session):
    run = new_run(tiny_session, 30)
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
                import time
                from pathlib import Path
                from particle_explorer.jobs import start
                words = ["train", {str(tiny_session.path)!r}, "--resume", {run.name!r}]
                start(words, Path({str(run.path)!r}))
                print("started", flush=True)
                time.sleep(600)
            """),
        ],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"started\n"
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    pid = read_status(run.path).pid
    assert os.getpgid(pid) == pid  # a group of its own: a terminal that closes does not reach it
    wait_until(lambda: run.status.is_over)
    assert run.state == "finished" and run.is_encoded, read_log(run.path)


def slow_export(session: Path, out: Path, moment: str) -> subprocess.Popen[bytes]:
    """An export that halts where `moment` is called in the package, so that it can be killed there."""
    code = f"""
        import sys, time
        from pathlib import Path
        import os
        import particle_explorer.files as files
        real = {moment}
        def halting(*args, **kwargs):
            print("here", flush=True)
            time.sleep(600)
        {moment} = halting
        from particle_explorer.cli import main
        sys.exit(main(["export", {str(session)!r}, "--out", {str(out)!r}, "--overwrite"]))
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)


@pytest.mark.parametrize("existing", [None, "precious"])
@pytest.mark.parametrize("moment", ["os.fsync", "Path.replace"])
def test_an_export_that_is_killed_leaves_no_half(tiny_session, tmp_path, moment, existing):
    out = tmp_path / "out" / "particles.star"
    out.parent.mkdir()
    if existing:
        out.write_text(existing)
    process = slow_export(tiny_session.path, out, moment)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (out.read_text() if out.exists() else None) == existing
    assert [path.name for path in out.parent.glob("*.star") if not path.name.startswith(".")] == (
        [out.name] if existing else []
    )


def test_an_import_that_is_killed_leaves_no_session(tiny_stack, tmp_path):
    code = f"""
        import time
        from pathlib import Path
        import particle_explorer.preprocess as preprocess
        def halting(*args, **kwargs):
            print("here", flush=True)
            time.sleep(600)
        preprocess.apply = halting
        from particle_explorer.cli import main
        main(["import", {str(tiny_stack)!r}, "--session", {str(tmp_path / "session")!r}])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "session").exists()
    subprocess.run(command("import", tiny_stack, "--session", tmp_path / "session"), check=True)
    assert len(Session.open(tmp_path / "session").images) == 120


def test_a_column_is_whole_or_not_there(tiny_session):
    run = new_run(tiny_session, 1)
    table = pd.DataFrame({"a": np.arange(120)}, index=tiny_session.table.index)
    (run.path / "columns").mkdir()
    table.to_parquet(run.path / "columns" / "a.parquet")  # killed between the table and its record
    assert run.columns() == [] and list(run.features()) == []
    assert run.write_column("a", table, {}) == "a-2"


def test_a_killed_import_goes_on_and_leaves_no_folder(tiny_stack, tmp_path):
    program = textwrap.dedent("""
        import os, signal, sys
        from particle_explorer import cache, session
        from particle_explorer.io.reading import read

        cache.BLOCK_BYTES, kill = 8 * 4 * 32**2, sys.argv[3] == "kill"
        heard = []

        def progress(what, fraction):
            heard.append(fraction)
            if kill and len(heard) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        session.Session.create(session.Path(sys.argv[2]), read(sys.argv[1]), progress=progress)
        print(len(heard))
    """)

    def start(name: str, how: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", program, str(tiny_stack), str(tmp_path / name), how]
        return subprocess.run(words, capture_output=True, text=True)

    whole = start("whole", "finish")
    assert whole.returncode == 0, whole.stderr
    assert start("s", "kill").returncode == -signal.SIGKILL
    assert not (tmp_path / "s").exists() and len(list(tmp_path.glob(".s-*.part"))) == 1
    again = start("s", "finish")
    assert again.returncode == 0, again.stderr
    assert int(again.stdout) == int(whole.stdout) - 5
    assert not list(tmp_path.glob(".s-*.part"))
    assert (tmp_path / "s" / "images.npy").read_bytes() == (tmp_path / "whole" / "images.npy").read_bytes()
