"""Seconds from the start of a process to its first finished PPO iteration.

The process imports what a binary does, makes random models instead of reading
them, and runs one iteration, so they are compilation most of all. It has a
compilation cache of its own, in which every program is kept: empty for the cold
start, and what that left for the warm ones.

    python -m experiments.harness.benchmark_start

reads the benchmark's config as JSON from its input, and writes a line when the
iteration is finished.
"""

from collections.abc import Callable
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from experiments.harness import config as config_lib
from experiments.harness.benchmark_config import Config
from experiments.harness.benchmark_timing import Measure, Part

_DONE = "finished"
_REPO = pathlib.Path(__file__).resolve().parents[2]


class StartError(RuntimeError):
  """The process did not come to its end."""


def startup(config: Config) -> Measure:
  """The first run of it is cold, those after it are warm."""
  part = lambda name: Part(name=name, unit="s", amount=None)
  return Measure(
      name="startup",
      run=_Starts(config),
      parts=(part("startup/cold"), part("startup/warm")),
      has_warmup=False,
  )


class _Starts:
  """A cold start and a warm one after it, in a fresh cache each time."""

  def __init__(self, config: Config, start: Callable | None = None):
    self._config = json.dumps(config_lib.to_dict(config))
    self._start = start or _seconds_to_finish

  def __call__(self) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache:
      return {
          "startup/cold": self._start(self._config, cache),
          "startup/warm": self._start(self._config, cache),
      }


def _seconds_to_finish(config: str, cache: str) -> float:
  environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": cache,
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  start = time.perf_counter()
  with subprocess.Popen(
      [sys.executable, "-m", "experiments.harness.benchmark_start"],
      cwd=_REPO,
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
  ) as process:
    process.stdin.write(config)
    process.stdin.close()
    line = process.stdout.readline().strip()
    seconds = time.perf_counter() - start
  if line != _DONE:
    raise StartError(
        f"the process that was to be timed said {line!r} and ended with "
        f"{process.returncode}; what it wrote is above"
    )
  return seconds


def main() -> None:
  """One iteration of the config that is read."""
  import jax  # pylint: disable=g-import-not-at-top

  from experiments.harness import (  # pylint: disable=g-import-not-at-top
      benchmark_ppo,
  )

  config = config_lib.from_config(Config, json.load(sys.stdin))
  made = benchmark_ppo.make_iteration(config)
  jax.block_until_ready(made.whole(made.state, made.batch))
  print(_DONE, flush=True)


if __name__ == "__main__":
  main()
