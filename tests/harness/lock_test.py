"""One run a workdir, whoever had it before."""

import os
import signal
import subprocess
import sys

import pytest

from experiments.harness import lock

_HOLD = """
import sys, time
from experiments.harness import lock
held = lock.hold(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that has the lock of `tmp_path / "run"`."""
  process = subprocess.Popen(
      [sys.executable, "-c", _HOLD, str(tmp_path / "run")],
      stdout=subprocess.PIPE,
      text=True,
  )
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.communicate()


def test_the_second_is_refused_and_told_who_is_first(holder, tmp_path):
  with pytest.raises(lock.WorkdirError) as error:
    lock.hold(tmp_path / "run")
  assert f"{tmp_path}/run is in use by process {holder.pid} on " in str(
      error.value
  )
  assert "--workdir" in str(error.value)
  # By another name too.
  (tmp_path / "link").symlink_to("run")
  with pytest.raises(lock.WorkdirError, match=f"process {holder.pid} "):
    lock.hold(tmp_path / "link")


def test_a_dead_owner_holds_nothing(holder, tmp_path):
  os.kill(holder.pid, signal.SIGKILL)
  holder.wait()
  held = lock.hold(tmp_path / "run")
  assert f'"pid": {os.getpid()}' in (tmp_path / "run" / "lock").read_text()
  held.release()


def test_it_goes_with_the_last_who_refers_to_it(tmp_path):
  first = lock.hold(tmp_path)
  second = lock.hold(tmp_path)  # A run after another, in one process.
  assert _is_refused(tmp_path)
  del first
  assert _is_refused(tmp_path)
  del second
  assert not _is_refused(tmp_path)


def _is_refused(folder) -> bool:
  code = (
      "import sys; from experiments.harness import lock;"
      " lock.hold(sys.argv[1])"
  )
  done = subprocess.run(
      [sys.executable, "-c", code, str(folder)],
      capture_output=True,
      text=True,
      check=False,
  )
  if done.returncode:
    assert f"is in use by process {os.getpid()}" in done.stderr
  return bool(done.returncode)


def test_a_file_system_without_locks_is_warned_of(
    tmp_path, monkeypatch, caplog
):
  def flock(fd, how):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(lock.fcntl, "flock", flock)
  with caplog.at_level("WARNING", logger="absl"):
    lock.hold(tmp_path)
  assert "cannot be locked" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  with pytest.raises(lock.WorkdirError, match="cannot write to the workdir"):
    lock.hold(tmp_path / "file" / "run")
  # As a read-only file system has it, which a test cannot mount.
  monkeypatch.setattr(lock.os, "access", lambda *_: False)
  with pytest.raises(lock.WorkdirError, match="read-only"):
    lock.hold(tmp_path / "there")
