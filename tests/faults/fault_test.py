"""What a disk, a clock or a user can do to a run, and what becomes of it."""

import os
import resource
import shutil
import signal
import tempfile
import time

import pytest

from rlhf_jax import array_folder
from tests.experiments import tiny
from tests.faults import programs


@pytest.fixture
def interrupted(whole, start, tmp_path):
  """A run of SFT that was killed after its second checkpoint, and before."""
  config, wanted, _ = whole("sft")
  workdir = tmp_path / "run"
  program = start("sft", config, workdir)
  while program.is_running() and (
      len(programs.whole_checkpoints(workdir)) < 2
      if (workdir / "checkpoints").is_dir()
      else True
  ):
    time.sleep(0.002)
  program.signal(signal.SIGKILL)
  assert program.wait() == -signal.SIGKILL, program.log
  newest = programs.whole_checkpoints(workdir)[-1]
  for path in (workdir / "checkpoints").iterdir():
    if path.name > newest.name:  # what was half written
      shutil.rmtree(path)
  return config, wanted, workdir


def goes_on(interrupted, start, *, wanted_in_log: str) -> None:
  """The same command goes on, says so, and ends bitwise the same."""
  config, wanted, workdir = interrupted
  program = start("sft", config, workdir)
  assert program.wait() == 0, program.log
  assert wanted_in_log in program.log
  programs.assert_same_run(workdir, wanted)


# ---- Checkpoints -------------------------------------------------------------


def _truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def _empty(path):
  os.truncate(path, 0)


def _delete(path):
  path.unlink()


@pytest.mark.parametrize("which", ["largest", "checkpoint.json"])
@pytest.mark.parametrize("damage", [_truncate, _empty, _delete])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    interrupted, start, which, damage
):
  _, _, workdir = interrupted
  before, newest = programs.whole_checkpoints(workdir)[-2:]
  files = [x for x in newest.rglob("*") if x.is_file()]
  damage(
      max(files, key=lambda x: x.stat().st_size)
      if which == "largest"
      else newest / which
  )
  assert programs.whole_checkpoints(workdir)[-1] == before
  goes_on(
      interrupted,
      start,
      wanted_in_log=f"resumed at step {int(before.name[5:13])}",
  )


def test_without_a_whole_checkpoint_a_run_begins_anew(interrupted, start):
  _, _, workdir = interrupted
  for folder in programs.whole_checkpoints(workdir):
    _empty(folder / "checkpoint.json")
  goes_on(interrupted, start, wanted_in_log="passed over")


def test_a_disk_that_fills_up_while_saving_costs_only_that_checkpoint(
    whole, start, tmp_path
):
  """Files may suddenly not grow past a limit, which fails as a full disk."""
  config, wanted, _ = whole("sft")
  workdir = tmp_path / "run"
  program = start("sft", config, workdir)
  while program.is_running() and not (
      (workdir / "checkpoints").is_dir()
      and programs.whole_checkpoints(workdir)
  ):
    time.sleep(0.002)
  # More than the files of metrics and the log have, less than one of arrays.
  limit = 60_000
  resource.prlimit(program.pid, resource.RLIMIT_FSIZE, (limit, limit))
  assert program.wait() == 1, program.log
  assert f"error: cannot write {workdir}/checkpoints/step_" in program.log
  # The last words, whatever orbax has logged before.
  assert "see that the disk has space" in program.log.splitlines()[-1]
  assert programs.whole_checkpoints(workdir)
  goes_on((config, wanted, workdir), start, wanted_in_log="resumed at step")


# ---- Metrics -----------------------------------------------------------------


def test_a_line_cut_by_a_kill_is_written_again(interrupted, start):
  _, _, workdir = interrupted
  with (workdir / "metrics.jsonl").open("a") as f:
    f.write('{"step": 9, "sft/lo')
  goes_on(interrupted, start, wanted_in_log="resumed at step")


def test_lines_lost_from_before_the_checkpoint_are_told_and_stay_lost(
    interrupted, start
):
  config, wanted, workdir = interrupted
  step = int(programs.whole_checkpoints(workdir)[-1].name[5:13])
  path = workdir / "metrics.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"".join(lines[:2]) + lines[2][:10])
  program = start("sft", config, workdir)
  assert program.wait() == 0, program.log
  assert f"{path} has lost lines of steps up to {step}" in program.log
  tiny.assert_bitwise(tiny.model_arrays(workdir), tiny.model_arrays(wanted))
  whole_lines = (wanted / "metrics.jsonl").read_bytes().splitlines()
  found = path.read_bytes().splitlines()
  assert found == whole_lines[:2] + whole_lines[-(len(found) - 2) :]


def test_a_file_of_metrics_that_holds_something_else_is_told(
    interrupted, start
):
  config, _, workdir = interrupted
  path = workdir / "metrics.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(b"\0\0\0\n" + b"".join(lines[1:]))
  program = start("sft", config, workdir)
  assert program.wait() == 1, program.log
  assert f"error: {path}:1: not a line of this file" in program.log
  assert "Traceback" not in program.log


# ---- Clocks and folders ------------------------------------------------------


def test_a_clock_that_goes_backwards_changes_nothing(
    interrupted, start, tmp_path
):
  config, wanted, workdir = interrupted
  for folder in (workdir, tmp_path / "anew"):
    program = start("sft", config, folder, clock="backwards")
    assert program.wait() == 0, program.log
    programs.assert_same_run(folder, wanted)
    for row in tiny.read_jsonl(folder / "timing.jsonl"):
      assert row["seconds_per_step"] >= 0


@pytest.fixture
def readable():
  """A folder that everybody may read, as pytest's own are not."""
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    yield folder


def test_a_workdir_that_is_read_only_is_told_at_the_start(
    whole, start, readable
):
  config, _, _ = whole("sft")
  config = shutil.copy(config, readable)
  workdir = f"{readable}/run"
  os.mkdir(workdir)
  os.chmod(workdir, 0o555)
  # To root nothing is read-only.
  user = 65534 if os.getuid() == 0 else None
  program = start("sft", config, workdir, user=user)
  assert program.wait() == 1, program.log
  assert f"error: cannot write to the workdir {workdir}" in program.log
  assert "Traceback" not in program.log
  assert not os.listdir(workdir)


def test_what_is_saved_is_whole_or_is_not_there(whole):
  """The tests above ask for whole checkpoints; this is what they mean."""
  _, workdir, _ = whole("sft")
  folders = programs.whole_checkpoints(workdir)
  assert [array_folder.read_info(x)["step"] for x in folders] == [10, 12]
