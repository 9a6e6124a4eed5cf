"""Programs started by the dozen, and what an undisturbed run of each leaves.

A fresh interpreter takes seconds to import jax. A process that has imported the
binaries and computed nothing is forked instead: what it forks is a program like
any other, with a process id of its own to be killed by.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from experiments.harness import metric_writer
from rlhf_jax import array_folder
from tests.experiments import tiny

BINARIES = ("sft", "reward", "ppo")
# What must be equal, byte by byte, where a stage has it.
EXACT = ("metrics.jsonl", "samples.jsonl", "calibration.json", "finished.json")
_PATIENCE = 120  # seconds, of a program that should long have ended


@dataclasses.dataclass
class Program:
  """A running or ended program."""

  pid: int
  log_path: pathlib.Path
  _nursery: "Nursery"
  returncode: int | None = None

  @property
  def log(self) -> str:
    return self.log_path.read_text(errors="replace")

  def is_running(self) -> bool:
    # One that has ended stays as a zombie until `wait`.
    state = pathlib.Path(f"/proc/{self.pid}/stat").read_text()
    return state.rpartition(")")[2].split()[0] not in "ZX"

  def signal(self, number: int) -> None:
    os.kill(self.pid, number)

  def wait(self, seconds: float = _PATIENCE) -> int:
    """The exit code; minus the signal for one that was killed."""
    end = time.monotonic() + seconds
    while self.is_running():
      if time.monotonic() > end:
        self.signal(signal.SIGKILL)
        self._nursery.reap(self.pid)
        raise AssertionError(f"it does not end:\n{self.log}")
      time.sleep(0.005)
    self.returncode = self._nursery.reap(self.pid)
    return self.returncode


class Nursery:
  """A process with everything imported, that forks programs."""

  def __init__(self, folder: pathlib.Path):
    self._folder, self._count = folder, 0
    self._process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.programs"],
        cwd=tiny.REPO,
        # Its threads would be lost in a fork.
        env=tiny.environment() | {"OPENBLAS_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

  def __enter__(self) -> "Nursery":
    return self

  def __exit__(self, *exc_info) -> None:
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()

  def start(self, binary, config, workdir, **how) -> Program:
    """Starts `experiments.<binary>`; `how` is what `_become` takes."""
    self._count += 1
    log = self._folder / f"{self._count}_{binary}.log"
    pid = self._ask(
        argv=[binary, f"--config={config}", f"--workdir={workdir}"],
        log=str(log),
        **how,
    )
    return Program(pid, log, self)

  def reap(self, pid: int) -> int:
    return self._ask(reap=pid)

  def _ask(self, **request) -> int:
    print(json.dumps(request), file=self._process.stdin, flush=True)
    return json.loads(self._process.stdout.readline())


def _serve() -> None:
  """The nursery's own process."""
  import experiments.ppo
  import experiments.reward
  import experiments.sft  # noqa: F401

  # One thread, or a fork would leave what the others hold locked.
  assert len(os.listdir("/proc/self/task")) == 1
  for line in sys.stdin:
    request = json.loads(line)
    if "reap" in request:
      _, status = os.waitpid(request["reap"], 0)
      answer = os.waitstatus_to_exitcode(status)
    else:
      answer = os.fork()
      if answer == 0:
        _become(**request)
    print(json.dumps(answer), flush=True)


def _become(argv, log, *, clock="", user=None) -> None:
  """Runs a binary as this process, to its end."""
  fd = os.open(log, os.O_WRONLY | os.O_CREAT, 0o666)
  for number in (1, 2):
    os.dup2(fd, number)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  if user is not None:
    os.setuid(user)
  if clock == "backwards":
    wall, start = time.time(), time.monotonic()
    time.time = lambda: wall - 3600 * (time.monotonic() - start)
  module = sys.modules[f"experiments.{argv[0]}"]
  sys.argv = argv
  sys.modules["experiments.harness.cli"].launch(module.Config, module.run)


# ---- Runs --------------------------------------------------------------------


def make_config(binary: str, run: pathlib.Path, path: pathlib.Path):
  """A run of twelve steps (PPO: six iterations) that saves every second."""
  settings = tiny.stage(binary, run)
  loop = settings.train.loop if binary == "sft" else settings.loop
  num_steps = 6 if binary == "ppo" else 12
  loop.update(tiny.loop(num_steps, eval_every=2, checkpoint_every=2))
  return tiny.write_config(path, settings)


class Undisturbed:
  """One undisturbed run of each binary, made when it is first asked for."""

  def __init__(self, run, start, folder):
    self._run, self._start, self._folder = run, start, folder
    self._made = {}

  def __call__(self, binary: str) -> tuple[pathlib.Path, pathlib.Path, float]:
    if binary not in self._made:
      folder = self._folder / binary
      folder.mkdir()
      config = make_config(binary, self._run, folder / "config.py")
      for name in ("first", "whole"):  # The first compiles for all others.
        begin = time.monotonic()
        program = self._start(binary, config, folder / name)
        assert program.wait() == 0, program.log
        seconds = time.monotonic() - begin
      self._made[binary] = config, folder / "whole", seconds
    return self._made[binary]


def assert_same_run(found: pathlib.Path, wanted: pathlib.Path) -> None:
  """What two runs left is the same, bit by bit."""
  for name in EXACT:
    assert (found / name).exists() == (wanted / name).exists(), name
    if (wanted / name).exists():
      assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
  tiny.assert_bitwise(tiny.model_arrays(found), tiny.model_arrays(wanted))
  tiny.assert_bitwise(
      tiny.last_checkpoint(found), tiny.last_checkpoint(wanted)
  )


def whole_checkpoints(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Folders of finished checkpoints whose files are as they were written."""
  found = []
  for folder in sorted((workdir / "checkpoints").glob("step_*")):
    try:
      array_folder.verify_files(folder, array_folder.read_info(folder))
    except array_folder.Damaged:
      continue
    found.append(folder)
  return found


def last_step(workdir: pathlib.Path) -> int:
  """The step of the last whole line of metrics.jsonl, -1 without one."""
  path = workdir / metric_writer.METRICS
  rows = metric_writer.read_metrics(path) if path.exists() else []
  return rows[-1]["step"] if rows else -1


if __name__ == "__main__":
  _serve()
