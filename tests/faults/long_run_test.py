"""A long run takes no more at its end than it took early on."""

import json
import subprocess
import sys

from tests.experiments import tiny

NUM_ITERATIONS = 2000
# Of what is noise: allocators keep what they once had, and pools of threads
# fill up as their work happens to coincide.
SLACK_MIB = 16
SLACK_THREADS = 4


def test_two_thousand_iterations_take_no_more_and_more(
    finished_run, tmp_path
):
  done = subprocess.run(
      [
          sys.executable,
          "-m",
          "tests.faults.long_run",
          str(finished_run),
          str(tmp_path / "run"),
          str(NUM_ITERATIONS),
      ],
      cwd=tiny.REPO,
      env=tiny.environment(),
      capture_output=True,
      text=True,
      timeout=900,
      check=False,
  )
  assert done.returncode == 0, done.stderr
  rows = [json.loads(x) for x in done.stdout.splitlines() if x[:1] == "{"]
  # Before the first iteration, eight on the way, and the stage's own.
  assert len(rows) == 10
  lines = tiny.read_jsonl(tmp_path / "run" / "metrics.jsonl")
  assert lines[-1]["step"] == NUM_ITERATIONS
  # By the second everything has been done once: evaluated, logged, saved.
  early, *later = rows[2:-1]
  for row in later:
    for name in ("compiled", "open_files", "live_arrays"):
      assert row[name] <= early[name], (name, rows)
    assert row["threads"] <= early["threads"] + SLACK_THREADS, rows
    assert row["resident_mib"] < early["resident_mib"] + SLACK_MIB, rows
