"""SIGTERM: saved where it is, exit code 0, and the same command goes on."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

from experiments.harness import stopping
from tests.experiments import tiny
from tests.experiments.loop_test import config, make_task, rows, train


class TellingAt:
  """Batches during one of which the signal comes."""

  def __init__(self, batches, step, tell):
    self._batches, self._step, self._tell = batches, step, tell

  def __next__(self):
    batch = next(self._batches)
    if self._batches.position == self._step:
      self._tell()
    return batch

  def __getattr__(self, name):
    return getattr(self._batches, name)


@pytest.fixture
def told(monkeypatch):
  """Call it, and it is as if the signal had come."""
  monkeypatch.setattr(stopping, "_told", "")
  return lambda: monkeypatch.setattr(stopping, "_told", "SIGTERM")


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_what_was_not_logged_yet_is_in_the_checkpoint(
    tmp_path, told, monkeypatch, step
):
  cfg = config(7, log_every=3, checkpoint_every=6)
  whole = train(make_task(), cfg, tmp_path / "whole")
  task = make_task()
  task.batches = TellingAt(task.batches, step, told)
  with pytest.raises(
      stopping.Stopped, match=f"by SIGTERM at step {step} of 7, which is saved"
  ):
    train(task, cfg, tmp_path / "stopped")
  assert (
      tmp_path / "stopped" / "checkpoints" / f"step_{step:08d}"
  ).is_dir()
  monkeypatch.setattr(stopping, "_told", "")
  state = train(make_task(), cfg, tmp_path / "stopped")
  assert state.params["w"].tobytes() == whole.params["w"].tobytes()
  # Means of three steps, of which some were before and some after.
  assert rows(tmp_path / "stopped", "toy/x") == rows(
      tmp_path / "whole", "toy/x"
  )
  found, wanted = (
      (tmp_path / name / "metrics.jsonl").read_bytes()
      for name in ("stopped", "whole")
  )
  assert found == wanted


def test_before_its_first_step_there_is_nothing_to_save(tmp_path, told):
  task = make_task(evaluate=lambda state: (told() or {"eval/w": 0.0}, []))
  with pytest.raises(stopping.Stopped, match="before its first step"):
    train(task, config(3), tmp_path)
  assert not list((tmp_path / "checkpoints").iterdir())


def test_a_loop_that_does_not_run_is_not_waited_for(monkeypatch):
  monkeypatch.setattr(stopping, "_told", "")
  before = signal.getsignal(signal.SIGTERM)
  stopping.listen()
  try:
    with pytest.raises(stopping.Stopped, match="the same command goes on"):
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(5)
    with stopping.between_steps():
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(0.1)
      assert stopping.requested()
  finally:
    signal.signal(signal.SIGTERM, before)


# ---- Processes ---------------------------------------------------------------

NUM_STEPS = 200


def _sft_config(run, folder):
  """Long, and nothing is saved before the end unless it is told to stop."""
  settings = tiny.stage("sft", run)
  settings.train.loop.update(
      tiny.loop(NUM_STEPS, log_every=8, checkpoint_every=NUM_STEPS)
  )
  return tiny.write_config(folder / "config.py", settings)


def _steps(workdir) -> int:
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines() if path.exists() else []
  return json.loads(lines[-1])["step"] if lines else -1


def _stop(process: subprocess.Popen) -> str:
  process.send_signal(signal.SIGTERM)
  _, log = process.communicate(timeout=60)
  assert process.returncode == 0, log
  return log


def test_a_program_saves_ends_well_and_goes_on_bitwise(finished_run, tmp_path):
  path = _sft_config(finished_run, tmp_path)
  workdir = tmp_path / "run"
  stops = []
  for beyond in (8, 80):
    process = tiny.start("sft", path, workdir)
    while process.poll() is None and _steps(workdir) < beyond:
      time.sleep(0.01)
    log = _stop(process)
    found = re.search(r"sft: stopped by SIGTERM at step (\d+) of 200", log)
    assert found, log
    assert "the same command goes on from there" in log
    assert "Traceback" not in log
    stops.append(int(found[1]))
  assert 8 <= stops[0] < 80 <= stops[1] < NUM_STEPS
  done = tiny.call("sft", path, workdir)
  assert done.returncode == 0, done.stderr
  assert f"resumed at step {stops[1]}" in done.stderr
  whole = tmp_path / "whole"
  done = tiny.call("sft", path, whole)
  assert done.returncode == 0, done.stderr
  for name in ("metrics.jsonl", "samples.jsonl", "finished.json"):
    assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
  tiny.assert_bitwise(tiny.model_arrays(workdir), tiny.model_arrays(whole))


def test_a_program_that_has_not_begun_to_train_ends_well_too(
    finished_run, tmp_path
):
  path = _sft_config(finished_run, tmp_path)
  process = tiny.start("sft", path, tmp_path / "run")
  while process.poll() is None and not (tmp_path / "run/lock").exists():
    time.sleep(0.001)
  log = _stop(process)
  assert "stopped by SIGTERM" in log and "the same command goes on" in log
  assert "Traceback" not in log


def test_a_second_run_is_refused_and_the_first_goes_on(finished_run, tmp_path):
  path = _sft_config(finished_run, tmp_path)
  first = tiny.start("sft", path, tmp_path / "run")
  while first.poll() is None and _steps(tmp_path / "run") < 8:
    time.sleep(0.01)
  first.send_signal(signal.SIGSTOP)  # while the second starts
  tiny.assert_one_message(
      tiny.call("sft", path, tmp_path / "run"),
      f"{tmp_path}/run is in use by process {first.pid} on ",
      "another --workdir",
  )
  first.send_signal(signal.SIGCONT)
  assert "at step" in _stop(first)
