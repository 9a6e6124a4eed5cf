"""What a run measures, as lines of JSON, and as TensorBoard and wandb if asked.

    metrics.jsonl   {"step": 10, "ppo/kl": 0.02, ...}   no wall clock: two equal
                    runs write equal bytes
    timing.jsonl    {"step": 10, "seconds": 1.5, ...}
    samples.jsonl   {"step": 10, "prompt": "...", "completion": "...", ...}

JSON has no NaN and no infinities, so these are written as the strings "NaN",
"Infinity" and "-Infinity"; `read_metrics` gives floats back.

Lines reach the operating system as they are written. A run that is killed may
have written lines beyond the checkpoint it resumes from, and half of a last
one: `truncate_after` drops them.
"""

from collections.abc import Mapping, Sequence
import importlib
import json
import math
import os
import pathlib
import secrets
from typing import Any

import jax

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
SAMPLES = "samples.jsonl"

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class MetricsFileError(ValueError):
  """A file of metrics holds something else, or cannot be written to."""


class MetricWriter:
  """Appends to the files of one workdir, in the first process alone.

  In others it does nothing: what is written is the same in all.

  Attributes:
    num_lines: of each file, since `truncate_after`: a checkpoint may keep it,
      to be compared when a run goes on.

  Args:
    workdir: made if it is not there.
    tensorboard: also write event files to `workdir/tensorboard`.
    wandb: also log to Weights & Biases (project and mode by its environment
      variables); a resumed run continues the same wandb run.

  Raises:
    ImportError: wandb was asked for and is not installed.
  """

  def __init__(
      self, workdir: str | os.PathLike, *, tensorboard: bool, wandb: bool
  ):
    self._workdir = pathlib.Path(workdir)
    self._writes = jax.process_index() == 0
    self._workdir.mkdir(parents=True, exist_ok=True)
    self._files: dict[str, Any] = {}
    self._use_tensorboard = tensorboard and self._writes
    self._tensorboard = None
    self._purge_step: int | None = None
    self.num_lines = dict.fromkeys((METRICS, TIMING, SAMPLES), 0)
    self._wandb = None
    if wandb and self._writes:
      self._wandb = _start_wandb(self._workdir)

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends one line to metrics.jsonl; values are scalars of any kind."""
    values = _scalars(metrics)
    self._append(METRICS, step, values)
    self._mirror(step, values)

  def timing(self, step: int, seconds: Mapping[str, float]) -> None:
    """Appends one line to timing.jsonl: everything that the clock decides."""
    values = _scalars(seconds)
    self._append(TIMING, step, values)
    self._mirror(step, {f"timing/{name}": v for name, v in values.items()})

  def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends a line to samples.jsonl for each row of JSON-able values."""
    for row in rows:
      self._append(SAMPLES, step, row)
    writer = self._events()
    if writer is not None:
      for i, row in enumerate(rows):
        text = "\n\n".join(f"**{name}**: {row[name]}" for name in row)
        writer.add_text(f"samples/{i}", text, step)

  def sync(self) -> None:
    """All lines so far are on the disk, or in the bucket, when this returns."""
    for file in self._files.values():
      os.fsync(file.fileno())

  def truncate_after(self, step: int) -> None:
    """Drops all lines of later steps, as if the run had stopped at `step`.

    Call it after restoring a checkpoint and before writing; with step -1 a
    workdir starts afresh.

    Raises:
      MetricsFileError: a line other than the last is not JSON.
    """
    self._close_files()
    if not self._writes:
      return
    for name in (METRICS, TIMING, SAMPLES):
      self.num_lines[name] = _truncate(self._workdir / name, step)
    self._purge_step = step + 1

  def close(self) -> None:
    """Closes all files; the object is not used again."""
    self._close_files()
    if self._tensorboard is not None:
      self._tensorboard.close()
    if self._wandb is not None:
      self._wandb.finish()

  def _append(self, name: str, step: int, values: Mapping[str, Any]) -> None:
    if "step" in values:
      raise ValueError(f"{name}: 'step' is given apart, not among the values")
    if not self._writes:
      return
    if name not in self._files:
      path = self._workdir / name
      self._files[name] = path.open("ab", buffering=0)
    row = {"step": int(step), **{key: values[key] for key in sorted(values)}}
    line = (json.dumps(_encode(row), allow_nan=False) + "\n").encode()
    # One write call a line, so that a kill can only cut the last one.
    try:
      whole = self._files[name].write(line) == len(line)
    except OSError as e:
      raise _write_error(self._workdir / name, e.strerror) from e
    if not whole:
      raise _write_error(self._workdir / name, "only a part of a line fitted")
    self.num_lines[name] += 1

  def _mirror(self, step: int, values: Mapping[str, float]) -> None:
    writer = self._events()
    if writer is not None:
      for name, value in values.items():
        writer.add_scalar(name, value, step)
      writer.flush()
    if self._wandb is not None:
      self._wandb.log(dict(values), step=step)

  def _events(self):
    """TensorBoard's writer, made when first needed: by then it is known which
    steps of an earlier run it is to hide."""
    if self._use_tensorboard and self._tensorboard is None:
      import tensorboardX  # pylint: disable=g-import-not-at-top

      self._tensorboard = tensorboardX.SummaryWriter(
          str(self._workdir / "tensorboard"), purge_step=self._purge_step
      )
    return self._tensorboard

  def _close_files(self) -> None:
    for file in self._files.values():
      file.close()
    self._files = {}


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl or timing.jsonl: step as int, rest floats.

  A last line that was cut off by a kill is left out.

  Raises:
    MetricsFileError: another line is not JSON.
  """
  rows = []
  for _, row in _read_lines(pathlib.Path(path)):
    values = {name: float(v) for name, v in row.items() if name != "step"}
    rows.append({"step": row["step"], **values})
  return rows


def _read_lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
  """(raw line, parsed line) of every whole line."""
  lines = path.read_bytes().split(b"\n")
  # What follows the last newline is nothing, or half a line.
  found = []
  for number, line in enumerate(lines[:-1], start=1):
    try:
      row = json.loads(line)
      row["step"] = int(row["step"])
    except (ValueError, TypeError, KeyError) as e:
      raise MetricsFileError(
          f"{path}:{number}: not a line of this file: {line[:80]!r}; delete"
          " the line or the file"
      ) from e
    found.append((line, row))
  return found


def _write_error(path: pathlib.Path, reason: str) -> MetricsFileError:
  return MetricsFileError(
      f"cannot write {path}: {reason}; see that the disk has space. The same "
      "command goes on from the last checkpoint"
  )


def _truncate(path: pathlib.Path, step: int) -> int:
  """Returns how many lines are left."""
  if not path.exists():
    return 0
  kept = [line for line, row in _read_lines(path) if row["step"] <= step]
  contents = b"".join(line + b"\n" for line in kept)
  if contents != path.read_bytes():
    temporary = path.with_name(path.name + ".writing")
    temporary.write_bytes(contents)
    os.replace(temporary, path)
  return len(kept)


def _scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
  values = {}
  for name, value in metrics.items():
    try:
      values[name] = float(value)
    except (TypeError, ValueError) as e:
      raise ValueError(
          f"metric '{name}' is not a scalar: {type(value).__name__}"
          f" of shape {getattr(value, 'shape', None)}"
      ) from e
  return values


def _encode(value: Any) -> Any:
  """`value` with floats that JSON cannot write replaced by their names."""
  if isinstance(value, Mapping):
    return {name: _encode(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_encode(item) for item in value]
  if hasattr(value, "tolist"):
    return _encode(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    nan, infinity, minus_infinity = _NOT_FINITE
    if math.isnan(value):
      return nan
    return infinity if value > 0 else minus_infinity
  return value


def _start_wandb(workdir: pathlib.Path):
  try:
    wandb = importlib.import_module("wandb")
  except ImportError as e:
    raise ImportError(
        "wandb=True, but wandb is not installed: pip install"
        " 'rlhf-jax[wandb]', or set wandb=False"
    ) from e
  path = workdir / "wandb_id"
  if not path.exists():
    path.write_text(secrets.token_hex(4))
  return wandb.init(
      dir=str(workdir), id=path.read_text().strip(), resume="allow"
  )
