"""The process of one peer; see `experiments/harness/benchmark_peers.py`.

    python -m experiments.harness.peers.worker MODULE:ARGUMENT

Imports nothing of ours but the module of this folder that is named, for it runs
in whatever Python has the library. Whatever libraries print goes to the error
output, so that answers have the other to themselves.
"""

import importlib
import importlib.metadata
import json
import os
import sys
import traceback

_PACKAGES = ("torch", "transformers", "trl", "google-tunix", "jax")


def main(work: str) -> None:
  """Warms up and then takes one turn a line."""
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)
  # Nothing is to be asked of any server: there is nothing to be had there.
  os.environ |= {
      "HF_HUB_OFFLINE": "1",
      "WANDB_MODE": "disabled",
      "TOKENIZERS_PARALLELISM": "false",
  }
  # Threads that spin wait for one that has no core, a hundred times as long as
  # the work takes, as soon as anything else runs. Who knows better may say so.
  os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
  answer = lambda **fields: answers.write(json.dumps(fields) + "\n")
  try:
    job = json.loads(sys.stdin.readline())
    module, _, argument = work.partition(":")
    module = importlib.import_module(f"{__package__}.{module}")
    made = module.make(argument, job)
    if not callable(made):  # It is a `turns.Loop`.
      _run_loop(made, job["warmups"], answer)
    for _ in range(job["warmups"]):
      made()
    answer(ready=_versions())
    for _ in sys.stdin:
      answer(seconds=made())
  except Exception as error:  # pylint: disable=broad-except
    # Whatever it is, it is told in the result: the others are still measured.
    traceback.print_exc()
    answer(error=f"{type(error).__name__}: {error}".splitlines()[0])


def _run_loop(loop, num_warmups: int, answer) -> None:
  """The same as a function's turns, for what calls back between them."""
  num_turns = 0

  def next_turn(seconds):
    nonlocal num_turns
    if seconds is not None:
      num_turns += 1
    if num_turns == num_warmups:
      answer(ready=_versions())
    elif num_turns > num_warmups:
      answer(seconds={loop.part: seconds})
    if num_turns >= num_warmups and not sys.stdin.readline():
      os._exit(0)  # From within a trainer there is no other way out.

  loop.run(next_turn)


def _versions() -> dict[str, str]:
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


if __name__ == "__main__":
  main(sys.argv[1])
