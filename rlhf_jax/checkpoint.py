"""Checkpoints of a running state, and finished models on disk.

A checkpoint is one folder, written in two steps:

    <directory>/step_00000010/arrays/          orbax, asynchronously
    <directory>/step_00000010/checkpoint.json  last, in one atomic rename

A folder without `checkpoint.json` was never finished; one whose files do not
match the checksums in it is damaged. Both are passed over with a warning, and
the checkpoint before is used. A finished folder is never written to again:
saving a step anew makes `step_00000010.2`, and the old folder goes only after
the new one is complete. So a process may be killed at any moment.

Paths are those of a local or mounted file system that all processes share;
process 0 writes `checkpoint.json` and deletes.
"""

from collections.abc import Callable, Collection
import concurrent.futures
import json
import logging
import math
import os
import pathlib
import re
import shutil
from typing import Any, Literal

import flax.traverse_util
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rlhf_jax import array_folder

PyTree = Any

StateMismatch = array_folder.StateMismatch

_DELETED = ".deleted"
_FOLDER = re.compile(r"step_(\d+)(?:\.(\d+))?")

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
  """A checkpoint or model could not be written or read; names the folder."""


class ConfigMismatch(ValueError):
  """The checkpoint was saved by another config; lists the fields."""


class Checkpointer:
  """Saves and restores one run's state; keeps the last and the best.

  All processes of a run must make the same calls. Errors of a save that is
  written in the background are raised by the next `save`, `wait` or `close`.
  Use it in a `with` statement, or close it in a `finally`: a process that ends
  without closing loses the save in progress, as one that is killed does.

  Args:
    directory: made if it is not there.
    keep_last: how many of the latest checkpoints stay, at least 1.
    best_metric: name of the metric whose best checkpoint also stays, or None.
    best_mode: whether the largest or the smallest value is best.
    config: JSON-able; a checkpoint saved under another one is refused.
    free_fields: names of fields of the config, at any depth, that may differ.
  """

  def __init__(
      self,
      directory: str | os.PathLike,
      *,
      keep_last: int,
      best_metric: str | None = None,
      best_mode: Literal["max", "min"] = "max",
      config: dict[str, Any],
      free_fields: Collection[str] = (),
  ):
    if keep_last < 1:
      raise ValueError(f"keep_last must be at least 1, not {keep_last}")
    if best_mode not in ("max", "min"):
      raise ValueError(f"best_mode must be 'max' or 'min', not {best_mode!r}")
    self._directory = pathlib.Path(directory).absolute()
    self._keep_last = keep_last
    self._best_metric = best_metric
    self._best_mode = best_mode
    self._config = json.loads(json.dumps(config))
    self._free_fields = free_fields
    self._damaged: set[str] = set()
    _make_directory(self._directory)
    # Read once: from here on every process counts the attempts alike, however
    # far ahead process 0 is with the files.
    self._attempts: dict[int, int] = {}
    for step, attempt, _ in _folders(self._directory):
      self._attempts[step] = max(attempt, self._attempts.get(step, 0))
    # Folders are made before `save` returns: a folder that cannot be made in
    # the background would leave orbax's threads waiting for it for minutes,
    # and the process could not end.
    self._orbax = ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(),
        async_options=ocp.options.AsyncOptions(
            create_directories_asynchronously=False
        ),
    )
    self._thread = concurrent.futures.ThreadPoolExecutor(
        1, thread_name_prefix="checkpoint"
    )
    self._pending: concurrent.futures.Future | None = None

  def __enter__(self) -> "Checkpointer":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()

  def save(
      self,
      step: int,
      state: PyTree,
      iterator_state: dict[str, Any],
      metrics: dict[str, float] | None = None,
  ) -> None:
    """Saves `state`; returns when it has been copied to host memory.

    So the caller may donate the state's buffers, or change its numpy arrays, as
    soon as this returns. Waits for the save before.

    Args:
      step: a save of the same step replaces the earlier one.
      state: pytree of jax, numpy or typed PRNG key arrays.
      iterator_state: JSON-able.
      metrics: those of an evaluation at this step, with `best_metric` among
        them; None where there was no evaluation. NaN and Inf are never best.

    Raises:
      CheckpointError: this save or the one before could not be written.
    """
    self.wait()
    info = {
        "step": int(step),
        "config": self._config,
        "iterator_state": json.loads(json.dumps(iterator_state)),
        "metrics": self._checked_metrics(metrics),
    }
    arrays, info["leaves"] = array_folder.to_saveable(state)
    attempt = self._attempts.get(info["step"], 0) + 1
    self._attempts[info["step"]] = attempt
    folder = self._directory / _folder_name(info["step"], attempt)
    try:
      if arrays:
        self._orbax.save(
            folder / array_folder.ARRAYS, args=ocp.args.PyTreeSave(arrays)
        )
    except Exception as e:
      raise _write_error(folder, e) from e
    self._pending = self._thread.submit(self._finish, folder, info)

  def restore_latest(
      self, abstract_state: PyTree, *, donate: bool = False
  ) -> tuple[int, PyTree, dict[str, Any]] | None:
    """The newest intact checkpoint: (step, state, iterator_state), or None.

    Args:
      abstract_state: pytree of `jax.ShapeDtypeStruct` or of arrays. A leaf is
        put on the sharding that it names; without one (or with an array that
        is not committed to a device) it is left uncommitted on the default
        device. A numpy leaf gives numpy.
      donate: if one is found, the arrays of `abstract_state` are deleted before
        it is read: two states need not fit side by side.

    Raises:
      ConfigMismatch, StateMismatch: it is another run's; both list what
        differs.
    """
    self.wait()
    for _, _, folder in reversed(_folders(self._directory)):
      info = self._intact(folder)
      if info is not None:
        return self._restore(folder, info, abstract_state, donate)
    return None

  def restore_best(
      self, abstract_state: PyTree
  ) -> tuple[int, PyTree, dict[str, Any]] | None:
    """As `restore_latest`, of the intact checkpoint with the best metric."""
    if self._best_metric is None:
      raise ValueError("restore_best needs a Checkpointer with a best_metric")
    self.wait()
    for folder in self._best_first(self._readable()):
      info = self._intact(folder)
      if info is not None:
        return self._restore(folder, info, abstract_state)
    return None

  def wait(self) -> None:
    """Blocks until the save in the background is complete; raises its error."""
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def close(self) -> None:
    """Waits, then frees the threads. The object is not used again."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._orbax.close()

  def _checked_metrics(self, metrics) -> dict[str, float]:
    if metrics is None:
      return {}
    if self._best_metric is not None and self._best_metric not in metrics:
      raise ValueError(
          f"best_metric {self._best_metric!r} is not among the metrics saved:"
          f" {sorted(metrics)}; pass metrics=None where nothing was evaluated"
      )
    values = {name: float(value) for name, value in metrics.items()}
    return {name: v for name, v in values.items() if math.isfinite(v)}

  def _finish(self, folder: pathlib.Path, info: dict[str, Any]) -> None:
    """In the background: completes `folder`, then deletes what it replaces."""
    try:
      self._orbax.wait_until_finished()
      if jax.process_index() == 0:
        array_folder.write_info(folder, info)
        self._delete_old(folder)
    except Exception as e:
      raise _write_error(folder, e) from e

  def _delete_old(self, newest: pathlib.Path) -> None:
    """Deletes all but the last, the best, and what is not for us to judge."""
    readable = self._readable()
    step = readable[newest]["step"]
    # Another attempt at this step is replaced. Later steps are those of a run
    # that was since taken up at an earlier one: they do not count as last.
    counted = {
        folder: info
        for folder, info in readable.items()
        if folder == newest or info["step"] != step
    }
    last = [f for f, info in counted.items() if info["step"] <= step]
    keep = {f for f, info in counted.items() if info["step"] > step}
    keep.update(last[-self._keep_last :])
    keep.update(self._best_first(counted)[:1])
    for other_step, _, folder in _folders(self._directory):
      # Damaged ones stay, for their owner to look at, until replaced.
      damaged = folder.name in self._damaged and other_step != step
      if folder in keep or damaged and array_folder.is_finished(folder):
        continue
      # Renamed first, so that a kill leaves nothing that looks like a
      # checkpoint with files missing.
      os.rename(folder, folder.with_name(folder.name + _DELETED))
    for folder in self._directory.glob("step_*" + _DELETED):
      shutil.rmtree(folder)

  def _readable(self) -> dict[pathlib.Path, dict[str, Any]]:
    """Finished folders not known to be damaged, oldest first, and their info.

    Files are not compared with their checksums here.
    """
    return _read_infos([
        folder
        for _, _, folder in _folders(self._directory)
        if folder.name not in self._damaged
    ])

  def _best_first(self, infos) -> list[pathlib.Path]:
    return _best_first(infos, self._best_metric, self._best_mode)

  def _intact(self, folder: pathlib.Path) -> dict[str, Any] | None:
    """As `_read_intact`; what is damaged is remembered."""
    info = _read_intact(folder)
    if info is None:
      self._damaged.add(folder.name)
    return info

  def _restore(self, folder, info, abstract_state, donate=False):
    differences = config_differences(
        info["config"], self._config, free_fields=self._free_fields
    )
    if differences:
      raise ConfigMismatch(
          f"checkpoint {folder} was saved with another config:\n  "
          + "\n  ".join(differences)
          + "\nuse the saved config, or another directory"
      )
    state = array_folder.restore_arrays(
        folder, info["leaves"], abstract_state, donate=donate
    )
    return info["step"], state, info["iterator_state"]


def load_params(
    directory: str | os.PathLike,
    which: int | Literal["last", "best"],
    prefixes: tuple[str, ...],
    *,
    best_metric: str | None = None,
    best_mode: Literal["max", "min"] = "max",
) -> tuple[PyTree, dict[str, Any]]:
  """Params and iterator_state of a checkpoint, without the rest of its state.

  What is not intact is passed over with a warning: a run that goes on or was
  killed may leave its newest folder unfinished.

  Args:
    directory: a Checkpointer's.
    which: a step, 'last', or 'best' by `best_metric` and `best_mode`.
    prefixes: where they may be in the state, as dotted paths; the first that
      the checkpoint has counts.

  Raises:
    CheckpointError: if no such checkpoint is intact, with those that there are.
  """
  directory = pathlib.Path(directory)
  found = _folders(directory) if directory.is_dir() else []
  if which == "best":
    infos = _read_infos([folder for _, _, folder in found])
    candidates = _best_first(infos, best_metric, best_mode)
  else:
    candidates = [
        folder
        for step, _, folder in reversed(found)
        if which in ("last", step)
    ]
  for folder in candidates:
    info = _read_intact(folder)
    if info is not None:
      return _read_params(folder, info, prefixes), info["iterator_state"]
  steps = sorted({step for step, _, _ in found})
  of = f" of step {which}" if isinstance(which, int) else ""
  of = f" with its {best_metric!r}" if which == "best" else of
  raise CheckpointError(
      f"{directory} has no checkpoint{of} that is whole; there are folders of "
      f"steps {', '.join(map(str, steps)) or '(none)'}"
  )


def _read_params(
    folder: pathlib.Path, info: dict[str, Any], prefixes: tuple[str, ...]
) -> PyTree:
  for prefix in prefixes:
    names = [x for x in info["leaves"] if x.startswith(prefix + ".")]
    if names:
      arrays = array_folder.read_arrays(
          folder, info["leaves"], dict.fromkeys(info["leaves"])
      )
      return flax.traverse_util.unflatten_dict(
          {tuple(x[len(prefix) + 1 :].split(".")): arrays[x] for x in names}
      )
  raise CheckpointError(f"checkpoint {folder} has none of {prefixes}")


def config_differences(
    saved: Any,
    given: Any,
    path: str = "",
    *,
    free_fields: Collection[str] = (),
) -> list[str]:
  """Lines 'dotted.path: saved x, given y', one for each field that differs.

  Fields with a name in `free_fields`, at any depth, are passed over.
  """
  if isinstance(saved, dict) and isinstance(given, dict):
    lines = []
    for name in sorted((saved.keys() | given.keys()) - set(free_fields)):
      inner = f"{path}.{name}" if path else name
      if name not in saved:
        lines.append(f"{inner}: saved nothing, given {given[name]!r}")
      elif name not in given:
        lines.append(f"{inner}: saved {saved[name]!r}, given nothing")
      else:
        lines += config_differences(
            saved[name], given[name], inner, free_fields=free_fields
        )
    return lines
  # Compared as text: True is not 1, and NaN is NaN.
  if json.dumps(saved) == json.dumps(given):
    return []
  return [f"{path or 'config'}: saved {saved!r}, given {given!r}"]


def save_model(
    directory: str | os.PathLike,
    model_config: dict[str, Any],
    params: PyTree,
    extra: dict[str, Any],
) -> None:
  """Writes a finished model in one atomic step, in place of an earlier one.

  Written beside `directory`, then renamed to it: what carries that name is
  complete.

  Args:
    directory: the model's folder.
    model_config: JSON-able; what builds the module.
    params: nested dicts of arrays, with strings without '/' as keys.
    extra: JSON-able; whatever else belongs to the model.

  Raises:
    CheckpointError: it could not be written; names the folder.
  """
  directory = pathlib.Path(directory).absolute()
  temporary = directory.with_name(f".{directory.name}.writing")
  replaced = directory.with_name(f".{directory.name}.replaced")
  flat = _flat_params(params)
  arrays, leaves = array_folder.to_saveable(flat)
  info = {
      "config": json.loads(json.dumps(model_config)),
      "extra": json.loads(json.dumps(extra)),
      "leaves": leaves,
  }
  first = jax.process_index() == 0
  try:
    if first:
      _make_directory(directory.parent)
      shutil.rmtree(temporary, ignore_errors=True)
    _barrier("save_model")
    if arrays:
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(
            temporary / array_folder.ARRAYS, args=ocp.args.PyTreeSave(arrays)
        )
    if first:
      array_folder.write_info(temporary, info)
      shutil.rmtree(replaced, ignore_errors=True)
      if directory.exists():
        os.rename(directory, replaced)
      os.rename(temporary, directory)
      shutil.rmtree(replaced, ignore_errors=True)
  except Exception as e:
    raise _write_error(directory, e) from e
  _barrier("save_model_done")


def load_model(
    directory: str | os.PathLike,
    place_param: Callable[[str, tuple[int, ...]], Any] | None = None,
) -> tuple[dict[str, Any], PyTree, dict[str, Any]]:
  """(model_config, params, extra) as given to `save_model`.

  Args:
    place_param: (path, shape) -> the sharding that a parameter is read onto;
      None leaves all uncommitted on the default device.

  Raises:
    CheckpointError: no model is there, or its files are damaged.
  """
  directory = pathlib.Path(directory).absolute()
  try:
    info = array_folder.read_info(directory)
    array_folder.verify_files(directory, info)
  except array_folder.Damaged as e:
    raise CheckpointError(f"no usable model in {directory}: {e}") from e
  wanted = dict.fromkeys(info["leaves"])
  if place_param is not None:
    for name, spec in info["leaves"].items():
      shape, dtype = tuple(spec["shape"]), jnp.dtype(spec["dtype"])
      at = place_param(name, shape)
      wanted[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=at)
  flat = array_folder.read_arrays(directory, info["leaves"], wanted)
  params = flax.traverse_util.unflatten_dict(flat, sep="/")
  return info["config"], params, info["extra"]


# ---- Folders -----------------------------------------------------------------


def _folder_name(step: int, attempt: int) -> str:
  return f"step_{step:08d}" + ("" if attempt == 1 else f".{attempt}")


def _parse(name: str) -> tuple[int, int] | None:
  match = _FOLDER.fullmatch(name)
  return match and (int(match[1]), int(match[2] or 1))


def _folders(directory: pathlib.Path) -> list[tuple[int, int, pathlib.Path]]:
  """(step, attempt, folder) of everything named as a checkpoint, in order."""
  found = [
      (*_parse(path.name), path)
      for path in directory.iterdir()
      if _parse(path.name) and path.is_dir()
  ]
  return sorted(found)


def _read_infos(
    folders: list[pathlib.Path],
) -> dict[pathlib.Path, dict[str, Any]]:
  """The info of every finished folder, in the order given."""
  found = {}
  for folder in folders:
    try:
      found[folder] = array_folder.read_info(folder)
    except array_folder.Damaged:
      continue
  return found


def _best_first(
    infos: dict[pathlib.Path, dict[str, Any]],
    metric: str | None,
    mode: Literal["max", "min"],
) -> list[pathlib.Path]:
  """Folders that have the metric, best first; the earlier of a tie."""
  sign = -1 if mode == "max" else 1
  values = {
      folder: sign * info["metrics"][metric]
      for folder, info in infos.items()
      if metric in info["metrics"]
  }
  return sorted(values, key=values.get)


def _read_intact(folder: pathlib.Path) -> dict[str, Any] | None:
  """The info of `folder`, or None and a warning if it is not usable."""
  try:
    info = array_folder.read_info(folder)
    array_folder.verify_files(folder, info)
    return info
  except array_folder.Damaged as e:
    _log.warning("checkpoint %s passed over: %s", folder, e)
    return None


def _make_directory(directory: pathlib.Path) -> None:
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise CheckpointError(
        f"cannot make the checkpoint directory {directory}: {e.strerror}"
    ) from e


def _write_error(folder: pathlib.Path, error: Exception) -> CheckpointError:
  return CheckpointError(
      f"cannot write {folder}: {error or type(error).__name__}; see that the"
      " disk has space and that the directory may be written to"
  )


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


# ---- Params as a flat dict ---------------------------------------------------


def _flat_params(params: PyTree) -> dict[str, Any]:
  flat = flax.traverse_util.flatten_dict(params)
  for path in flat:
    if not all(isinstance(key, str) and "/" not in key for key in path):
      raise ValueError(
          f"params need strings without '/' as keys, not {path}"
      )
  return {"/".join(path): leaf for path, leaf in flat.items()}
