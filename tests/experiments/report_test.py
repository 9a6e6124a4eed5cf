"""experiments.report: the report of runs that are over, and of broken ones."""

import shutil
import subprocess
import sys

from tests.experiments import tiny


def call(run, *code) -> subprocess.CompletedProcess:
  """Runs the binary; or `code`, with its flag."""
  start = code or ("-m", "experiments.report")
  return subprocess.run(
      [sys.executable, *start, f"--run={run}"],
      cwd=tiny.REPO,
      env=tiny.environment(),
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
  )


def test_the_report_of_a_finished_run_is_what_the_run_wrote(
    finished_run, tmp_path
):
  shutil.copytree(finished_run, tmp_path / "run")
  (tmp_path / "run" / "report.html").unlink()
  done = call(tmp_path / "run")
  assert done.returncode == 0, done.stderr
  page = (tmp_path / "run" / "report.html").read_bytes()
  assert page == (finished_run / "report.html").read_bytes()
  assert "True reward" in done.stdout
  assert done.stdout.endswith(f"\nreport: {tmp_path}/run/report.html\n")


def test_a_run_that_died_half_way_has_a_report(finished_run, tmp_path):
  shutil.copytree(finished_run / "sft", tmp_path / "sft")
  (tmp_path / "sft" / "finished.json").unlink()
  with (tmp_path / "sft" / "metrics.jsonl").open("a") as f:
    f.write('{"step": 9, "sft/lo')
  # No device is started: it may be busy with that very run.
  code = (
      "import atexit; from absl import app; from experiments import report;"
      "from jax._src import xla_bridge;"
      "atexit.register(lambda: print(xla_bridge.backends_are_initialized()));"
      "app.run(report.main)"
  )
  done = call(tmp_path, "-c", code)
  assert done.returncode == 0, done.stderr
  assert "have not been evaluated yet" in " ".join(done.stdout.split())
  assert done.stdout.endswith("\nFalse\n")
  assert "is half-written" in (tmp_path / "report.html").read_text()


def test_a_folder_that_is_not_there_is_told(tmp_path):
  done = call(tmp_path / "nothing")
  tiny.assert_one_message(done, f"{tmp_path}/nothing: no such run folder")
