"""SIGKILL at random moments: the run that goes on ends bitwise the same."""

import os
import random
import shutil
import signal
import time

import pytest

from tests.faults import programs

# Of each; three binaries make 21.
NUM_KILLS = int(os.environ.get("RLHF_JAX_NUM_KILLS", "7"))


@pytest.mark.parametrize("binary", programs.BINARIES)
def test_a_run_killed_at_random_moments_ends_bitwise_the_same(
    binary, whole, start, tmp_path
):
  config, wanted, seconds = whole(binary)
  rng, workdir = random.Random(binary), tmp_path / "run"
  moments, num_ended = [], 0
  # Of all parts of a run, not of its beginning alone.
  while len(moments) < NUM_KILLS or len({step for _, step in moments}) < 3:
    moment = rng.uniform(0, seconds)
    is_new = not workdir.exists()
    begin = time.monotonic()
    program = start(binary, config, workdir)
    end = begin + moment
    while time.monotonic() < end and program.is_running():
      time.sleep(0.002)
    program.signal(signal.SIGKILL)
    if program.wait() == -signal.SIGKILL:
      moments.append((round(moment, 3), programs.last_step(workdir)))
      continue
    took = time.monotonic() - begin
    # It was over before, having gone on from where it was killed.
    assert program.returncode == 0, (moments, program.log)
    programs.assert_same_run(workdir, wanted)
    if is_new:  # The machine is quicker than it was.
      seconds = took
    num_ended += 1
    shutil.rmtree(workdir)
  program = start(binary, config, workdir)
  assert program.wait() == 0, (moments, program.log)
  programs.assert_same_run(workdir, wanted)
  print(binary, num_ended + 1, "ended;", moments)
