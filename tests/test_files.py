"""A file is the old one or the new one, never half of either."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time

import pytest

from particle_explorer.files import UserError, locked, read_json, replacing, write_text


def test_replaces_at_once(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one\n")
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "one\n"
    assert path.read_text() == "half"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "one\n")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "one\n"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failure_leaves_no_folder_that_it_made(tmp_path):
    (tmp_path / "kept").mkdir()
    for folder in ("kept", "new/within"):
        with pytest.raises(ZeroDivisionError), replacing(tmp_path / folder / "a.txt") as temporary:
            temporary.write_text("new")
            raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


def test_never_overwrites_unless_told(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("precious")
    with pytest.raises(UserError, match="exists already"):
        write_text(path, "new", overwrite=False)
    assert path.read_text() == "precious"


def test_a_file_that_appears_meanwhile_is_kept(tmp_path):
    path = tmp_path / "a.txt"
    with pytest.raises(UserError, match="exists already"), replacing(path, overwrite=False) as temporary:
        temporary.write_text("new")
        path.write_text("came first")
    assert path.read_text() == "came first"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_unwritable_folder_is_said_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into"):
        write_text(tmp_path / "file" / "a.txt", "x")


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX signal")
def test_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = textwrap.dedent(
        f"""
        import time
        from particle_explorer.files import replacing
        with replacing({str(path)!r}) as temporary:
            temporary.write_text("half")
            print("writing", flush=True)
            time.sleep(60)
        """
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "writing\n"
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    worker.stdout.close()
    time.sleep(0.05)
    assert path.read_text() == "old"


def test_new_files_follow_the_umask(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "x")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(os.name != "posix", reason="no umask")
def test_new_files_follow_the_umask_also_when_a_writer_puts_its_own_in_place(tmp_path):
    """As the writer of safetensors does, whose own file is for nobody else to read."""
    old = os.umask(0o027)
    try:
        with replacing(tmp_path / "a") as temporary:
            own = tmp_path / "own"
            own.touch(mode=0o600)
            own.replace(temporary)
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(sys.platform == "win32", reason="Windows locks otherwise")
def test_a_file_system_without_flock_is_locked_otherwise_or_said(tmp_path, monkeypatch):
    import fcntl

    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a+b'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with locked(tmp_path / ".lock"):
        done = subprocess.run([sys.executable, "-c", other, tmp_path / ".lock"], capture_output=True)
        assert b"BlockingIOError" in done.stderr
    monkeypatch.setattr(fcntl, "lockf", missing)
    with pytest.raises(UserError, match="has no locks"), locked(tmp_path / ".lock"):
        pass


def test_a_folder_that_cannot_be_synced_is_written_into(tmp_path, monkeypatch):
    sync, refused = os.fsync, []

    def not_of_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", not_of_folders)
    write_text(tmp_path / "a.txt", "one\n")
    assert refused and (tmp_path / "a.txt").read_text() == "one\n"


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def denied(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr("pathlib.Path.read_text", denied)
    with pytest.raises(UserError, match=r"cannot read .*a\.json: Permission denied"):
        read_json(tmp_path / "a.json")
