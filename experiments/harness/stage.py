"""A stage's folder: what it was asked to do, and whether it is done.

    config.json      the whole config, from the first moment; places beside the
                     folder start with `@run/`, so that a run can be moved. Of
                     fields that may change on the way, the latest
    versions.json    packages, commit, device and command
    finished.json    the stage's summary; its presence says that it is done
    lock             held by the run that writes here, see `harness/lock.py`

Of a run's processes the first alone writes, and all may read what is finished.
"""

import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils

from experiments.harness import config as config_lib
from experiments.harness import lock, models, stopping
from rlhf_jax import checkpoint

# What a run may be taken up with another value of: these decide what is kept
# and shown, when it stops, and how much memory it takes, and no result but by
# rounding. They are compared by name, at any depth.
MEMORY_FIELDS = (
    "attention_backend",
    "head_chunk_size",
    "mesh",
    "num_microbatches",
    "num_slots",
    "parallelism",
    "placement",
    "remat",
    "scan_unroll",
    "sharding",
)
FREE_FIELDS = (
    "keep_checkpoints",
    "max_nonfinite_steps",
    "tensorboard",
    "wandb",
    *MEMORY_FIELDS,
)


class Stage:
  """One stage's folder, or a whole run's; see the module's docstring.

  Attributes:
    dir: the folder.
    config: the config as JSON-able dict.
    finished: True if an earlier run of the same config ended well.

  Raises:
    checkpoint.ConfigMismatch: if the folder holds a run of another config, in
      more than `FREE_FIELDS`.
    lock.WorkdirError: if another process is at work there, or nobody can be.
  """

  def __init__(self, workdir: str, config: Any, *, is_run: bool = False):
    self._start = time.monotonic()
    self.dir = pathlib.Path(workdir)
    self.config = (
        json.loads(json.dumps(config_lib.to_dict(config)))
        if is_run
        else _portable(config, self.dir)
    )
    stopping.check()
    self.finished = (self.dir / "finished.json").exists()
    barrier(f"stage {self.dir}")  # Nobody writes before all have looked.
    if not self.finished and is_first():
      # Held while the stage lives.
      self._lock = lock.hold(self.dir)
    path = self.dir / "config.json"
    if path.exists():
      self._compare(path)
    else:
      write_json(path, self.config)
      write_json(self.dir / "versions.json", versions())
    barrier(f"begun {self.dir}")
    if self.finished:
      logging.info("%s is finished already", self.dir)

  def _compare(self, path: pathlib.Path) -> None:
    saved = json.loads(path.read_text())
    refused = _differences(saved, self.config)
    if refused:
      raise checkpoint.ConfigMismatch(
          f"{self.dir} holds a run of another config:\n  "
          + "\n  ".join(refused)
          + "\nuse the saved config, or another --workdir"
      )
    changed = checkpoint.config_differences(saved, self.config)
    if not changed or self.finished:
      return
    logging.info("%s goes on with %s", self.dir, "; ".join(changed))
    found = [x for x in MEMORY_FIELDS if any(f"{x}:" in y for y in changed)]
    if found:
      # Sums are then taken in another order.
      logging.warning(
          "%s: another %s rounds otherwise: from here on the run equals one "
          "of either value up to rounding, no longer bitwise",
          self.dir,
          " and ".join(found),
      )
    write_json(path, self.config)

  def finish(self, summary: dict[str, Any]) -> None:
    """Marks the stage as done; says how long it took, if no loop has."""
    timing = self.dir / "timing.jsonl"
    if is_first() and not timing.exists():
      seconds = round(time.monotonic() - self._start, 3)
      write_jsonl(timing, [{"step": 0, "seconds": seconds}])
    write_json(self.dir / "finished.json", summary)
    barrier(f"finished {self.dir}")


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
  """The config that a stage was run with."""
  return json.loads((pathlib.Path(folder) / "config.json").read_text())


def is_done(folder: pathlib.Path, config: Any) -> bool:
  """Whether `folder` holds a finished stage of this config."""
  path = folder / "config.json"
  if not (folder / "finished.json").exists() or not path.exists():
    return False
  saved = json.loads(path.read_text())
  return not _differences(saved, _portable(config, folder))


def _portable(config: Any, folder: pathlib.Path) -> dict[str, Any]:
  # The folder itself may be a link into another run.
  beside = f"{folder.parent.resolve()}/"
  # Through JSON, so that it compares with what was saved: it has no tuples.
  plain = json.loads(json.dumps(config_lib.to_dict(config)))
  return _replaced(plain, beside, models.RUN)


def _differences(saved: Any, given: Any) -> list[str]:
  return checkpoint.config_differences(saved, given, free_fields=FREE_FIELDS)


def _replaced(value: Any, old: str, new: str) -> Any:
  """`value` with `old` made into `new` in all of its texts."""
  if isinstance(value, str):
    return value.replace(old, new)
  if isinstance(value, list):
    return [_replaced(item, old, new) for item in value]
  if isinstance(value, dict):
    return {name: _replaced(item, old, new) for name, item in value.items()}
  return value


def is_first() -> bool:
  """Whether this process writes what only one of a run's may write."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits for the run's other processes to come to the same place."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes whole or not at all; the first process alone."""
  if not is_first():
    return
  temporary = path.with_name(path.name + ".writing")
  temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  os.replace(temporary, path)


def write_jsonl(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """One JSON object a line; writes as `write_json` does."""
  if not is_first():
    return
  temporary = path.with_name(path.name + ".writing")
  with temporary.open("w", encoding="utf-8") as f:
    for row in rows:
      f.write(json.dumps(row, ensure_ascii=False) + "\n")
  os.replace(temporary, path)


def versions() -> dict[str, str]:
  """What a reader needs to run it again."""
  import flax  # pylint: disable=g-import-not-at-top
  import optax  # pylint: disable=g-import-not-at-top

  device = jax.devices()[0]
  return {
      "python": platform.python_version(),
      "jax": jax.__version__,
      "flax": flax.__version__,
      "optax": optax.__version__,
      "commit": _commit(),
      "device": f"{jax.device_count()} x {device.device_kind}",
      "cpu_cores": str(os.cpu_count()),
      "command": " ".join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
  }


def _commit() -> str:
  here = pathlib.Path(__file__).parent
  git = lambda *args: subprocess.run(
      ["git", "-C", str(here), *args],
      capture_output=True,
      text=True,
      check=False,
  ).stdout.strip()
  try:
    commit = git("rev-parse", "HEAD")
    dirty = git("status", "--porcelain", "--untracked-files=no")
  except OSError:
    return "unknown (git is not installed)"
  if not commit:
    return "unknown (not a git checkout)"
  return commit + (" with local changes" if dirty else "")
