"""Thousands of tiny PPO iterations, and what they take of the machine.

    python -m tests.faults.long_run RUN WORKDIR [NUM_ITERATIONS]

RUN is a finished run of the tiny pipeline. Prints one line of JSON at every
evaluation: the iteration, resident memory, open files, threads, live arrays,
and how often something was compiled so far.
"""

import json
import os
import pathlib
import sys

import jax

from experiments import ppo
from experiments.harness import evaluator
from experiments.harness.config import from_config
from tests.experiments import tiny

# Each is recorded once for every program that is traced or compiled.
_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/backend_compile_duration",
)


def make_config(run: pathlib.Path, num_iterations: int):
  """Saves and evaluates often enough for a leak of either to show."""
  config = tiny.stage("ppo", run)
  config.rollout_batch_size = 4
  config.heldout_prompts.limit = 4
  config.ppo.update(num_epochs=1, num_minibatches=1)
  config.loop.update(
      tiny.loop(
          num_iterations,
          log_every=10,
          eval_every=num_iterations // 8,
          checkpoint_every=num_iterations // 40,
          best_metric="",
      )
  )
  return from_config(ppo.Config, config)


def main(run: str, workdir: str, num_iterations: str = "2000") -> None:
  counts = dict.fromkeys(_EVENTS, 0)

  def count(event, *args, **kwargs):
    if event in counts:
      counts[event] += 1

  jax.monitoring.register_event_duration_secs_listener(count)
  rows, calls = evaluator.Evaluator.rows, []

  def measured_rows(self, params):
    found = rows(self, params)
    calls.append(0)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    measured = {
        "evaluation": len(calls) - 1,
        "resident_mib": pages * os.sysconf("SC_PAGESIZE") / 2**20,
        "open_files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "live_arrays": len(jax.live_arrays()),
        "compiled": sum(counts.values()),
    }
    print(json.dumps(measured), flush=True)
    return found

  evaluator.Evaluator.rows = measured_rows
  ppo.run(make_config(pathlib.Path(run), int(num_iterations)), workdir)


if __name__ == "__main__":
  main(*sys.argv[1:])
