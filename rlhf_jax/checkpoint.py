"""Checkpoints of a running state, and finished models on disk.

A checkpoint is one folder, written in two steps:

    <directory>/step_00000010/arrays/          orbax, asynchronously
    <directory>/step_00000010/checkpoint.json  last, in one atomic rename

`checkpoint.json` names every array, the config, the iterator state, the
metrics, and the size and CRC-32 of each file under `arrays/`. A folder without
it was never finished; a folder whose files do not match it is damaged. Both are
passed over with a warning, and the checkpoint before is used. A finished folder
is never written to again: saving a step anew makes `step_00000010.2`, and the
old folder goes only after the new one is complete. So a process may be killed
at any moment.

Arrays are saved under flat dotted names, so a state may be any pytree. They are
restored onto the shardings of the abstract state given, whatever devices they
were saved on. Paths are those of a local or mounted file system that all
processes share; process 0 writes `checkpoint.json` and deletes.
"""

import concurrent.futures
import json
import logging
import math
import os
import pathlib
import re
import shutil
from typing import Any, Literal
import zlib

import flax.traverse_util
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any

_FORMAT = 1
_INFO = "checkpoint.json"
_ARRAYS = "arrays"
_DELETED = ".deleted"
_FOLDER = re.compile(r"step_(\d+)(?:\.(\d+))?")
_CRC_CHUNK = 1 << 22
_NAMES_IN_ERROR = 8

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
  """A checkpoint or model could not be written or read; names the folder."""


class ConfigMismatch(ValueError):
  """The checkpoint was saved by another config; lists the fields."""


class StateMismatch(ValueError):
  """The checkpoint's arrays are not those of the state given; lists them."""


class _Damaged(Exception):
  """Why a folder is not a usable checkpoint."""


class Checkpointer:
  """Saves and restores one run's state; keeps the last and the best.

  All processes of a run must make the same calls. Errors of a save that is
  written in the background are raised by the next `save`, `wait` or `close`.

  Args:
    directory: made if it is not there.
    keep_last: how many of the latest checkpoints stay, at least 1.
    best_metric: name of the metric whose best checkpoint also stays, or None.
    best_mode: whether the largest or the smallest value is best.
    config: JSON-able; a checkpoint saved under another one is refused.
  """

  def __init__(
      self,
      directory: str | os.PathLike,
      *,
      keep_last: int,
      best_metric: str | None = None,
      best_mode: Literal["max", "min"] = "max",
      config: dict[str, Any],
  ):
    if keep_last < 1:
      raise ValueError(f"keep_last must be at least 1, not {keep_last}")
    if best_mode not in ("max", "min"):
      raise ValueError(f"best_mode must be 'max' or 'min', not {best_mode!r}")
    self._directory = pathlib.Path(directory).absolute()
    self._keep_last = keep_last
    self._best_metric = best_metric
    self._best_sign = 1 if best_mode == "max" else -1
    self._config = json.loads(json.dumps(config))
    self._damaged: set[str] = set()
    _make_directory(self._directory)
    # Read once: from here on every process counts the attempts alike, however
    # far ahead process 0 is with the files.
    self._attempts: dict[int, int] = {}
    for step, attempt, _ in _folders(self._directory):
      self._attempts[step] = max(attempt, self._attempts.get(step, 0))
    self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
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
        "format": _FORMAT,
        "step": int(step),
        "config": self._config,
        "iterator_state": json.loads(json.dumps(iterator_state)),
        "metrics": self._checked_metrics(metrics),
    }
    arrays, info["leaves"] = _to_saveable(state)
    attempt = self._attempts.get(info["step"], 0) + 1
    self._attempts[info["step"]] = attempt
    folder = self._directory / _folder_name(info["step"], attempt)
    try:
      if arrays:
        self._orbax.save(
            folder / _ARRAYS, args=ocp.args.PyTreeSave(arrays)
        )
    except Exception as e:
      raise _write_error(folder, e) from e
    self._pending = self._thread.submit(self._finish, folder, info)

  def restore_latest(
      self, abstract_state: PyTree
  ) -> tuple[int, PyTree, dict[str, Any]] | None:
    """The newest intact checkpoint: (step, state, iterator_state), or None.

    Args:
      abstract_state: pytree of `jax.ShapeDtypeStruct` or of arrays. A leaf is
        put on the sharding that it names; without one (or with an array that
        is not committed to a device) it is left uncommitted on the default
        device. A numpy leaf gives numpy.

    Raises:
      ConfigMismatch, StateMismatch: it is another run's; both list what
        differs.
    """
    self.wait()
    for _, _, folder in reversed(_folders(self._directory)):
      info = self._intact(folder)
      if info is not None:
        return self._restore(folder, info, abstract_state)
    return None

  def restore_best(
      self, abstract_state: PyTree
  ) -> tuple[int, PyTree, dict[str, Any]] | None:
    """As `restore_latest`, of the intact checkpoint with the best metric."""
    if self._best_metric is None:
      raise ValueError("restore_best needs a Checkpointer with a best_metric")
    self.wait()
    for folder, _ in self._by_metric(self._readable()):
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
        _write_info(folder, info)
        self._delete_old(folder)
    except Exception as e:
      raise _write_error(folder, e) from e

  def _delete_old(self, newest: pathlib.Path) -> None:
    readable = self._readable()
    step = readable[newest]["step"]
    # Another attempt at the same step is replaced. Later steps are those of a
    # run that was since taken up at an earlier one: they do not count.
    earlier = [f for f, i in readable.items() if i["step"] < step]
    later = [f for f, i in readable.items() if i["step"] > step]
    keep = {newest, *later, *earlier[len(earlier) - self._keep_last + 1 :]}
    for folder, _ in self._by_metric({f: readable[f] for f in
                                      [*earlier, newest, *later]})[:1]:
      keep.add(folder)
    damaged = [self._directory / name for name in self._damaged]
    for _, _, folder in _folders(self._directory):
      same_step = _parse(folder.name)[0] == step
      if folder in keep or (folder in damaged and not same_step):
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
    found = {}
    for _, _, folder in _folders(self._directory):
      if folder.name not in self._damaged:
        try:
          found[folder] = _read_info(folder)
        except _Damaged:
          continue
    return found

  def _by_metric(self, infos) -> list[tuple[pathlib.Path, float]]:
    """Folders that have the best metric, best first; the earlier of a tie."""
    if self._best_metric is None:
      return []
    values = [
        (folder, info["metrics"][self._best_metric])
        for folder, info in infos.items()
        if self._best_metric in info["metrics"]
    ]
    return sorted(values, key=lambda item: -self._best_sign * item[1])

  def _intact(self, folder: pathlib.Path) -> dict[str, Any] | None:
    """The info of `folder`, or None and a warning if it is not usable."""
    try:
      info = _read_info(folder)
      _verify_files(folder, info)
      return info
    except _Damaged as e:
      self._damaged.add(folder.name)
      _log.warning("checkpoint %s passed over: %s", folder, e)
      return None

  def _restore(self, folder, info, abstract_state):
    differences = config_differences(info["config"], self._config)
    if differences:
      raise ConfigMismatch(
          f"checkpoint {folder} was saved with another config:\n  "
          + "\n  ".join(differences)
          + "\nuse the saved config, or another directory"
      )
    state = _restore_arrays(folder, info["leaves"], abstract_state)
    return info["step"], state, info["iterator_state"]


def config_differences(
    saved: Any, given: Any, path: str = ""
) -> list[str]:
  """Lines 'dotted.path: saved x, given y', one for each field that differs."""
  if isinstance(saved, dict) and isinstance(given, dict):
    lines = []
    for name in sorted(saved.keys() | given.keys()):
      inner = f"{path}.{name}" if path else name
      if name not in saved:
        lines.append(f"{inner}: saved nothing, given {given[name]!r}")
      elif name not in given:
        lines.append(f"{inner}: saved {saved[name]!r}, given nothing")
      else:
        lines += config_differences(saved[name], given[name], inner)
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
  arrays, leaves = _to_saveable(flat, names=list(flat))
  info = {
      "format": _FORMAT,
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
            temporary / _ARRAYS, args=ocp.args.PyTreeSave(arrays)
        )
    if first:
      _write_info(temporary, info)
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
) -> tuple[dict[str, Any], PyTree, dict[str, Any]]:
  """(model_config, params, extra) as given to `save_model`.

  Params are uncommitted arrays on the default device.

  Raises:
    CheckpointError: no model is there, or its files are damaged.
  """
  directory = pathlib.Path(directory).absolute()
  try:
    info = _read_info(directory)
    _verify_files(directory, info)
  except _Damaged as e:
    raise CheckpointError(f"no usable model in {directory}: {e}") from e
  flat = _read_arrays(
      directory, info["leaves"], {name: None for name in info["leaves"]}
  )
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


# ---- checkpoint.json ---------------------------------------------------------


def _write_info(folder: pathlib.Path, info: dict[str, Any]) -> None:
  """Completes `folder`: the list of its files and everything but the arrays."""
  folder.mkdir(exist_ok=True)
  paths = sorted(p for p in (folder / _ARRAYS).rglob("*") if p.is_file())
  files = {
      path.relative_to(folder).as_posix(): [path.stat().st_size, _crc(path)]
      for path in paths
  }
  temporary = folder / (_INFO + ".writing")
  temporary.write_text(json.dumps({**info, "files": files}, indent=1))
  os.replace(temporary, folder / _INFO)


def _read_info(folder: pathlib.Path) -> dict[str, Any]:
  """The parsed `checkpoint.json`; raises `_Damaged` with the reason."""
  try:
    info = json.loads((folder / _INFO).read_bytes())
  except FileNotFoundError:
    raise _Damaged(f"{_INFO} is missing: it was never finished") from None
  except OSError as e:
    raise _Damaged(f"{_INFO} cannot be read: {e.strerror}") from None
  except ValueError as e:
    raise _Damaged(f"{_INFO} is not valid JSON: {e}") from None
  if not isinstance(info, dict) or "format" not in info:
    raise _Damaged(f"{_INFO} does not describe a checkpoint")
  if info["format"] != _FORMAT:
    raise _Damaged(
        f"{_INFO} has format {info['format']!r}, this version reads {_FORMAT}"
    )
  return info


def _verify_files(folder: pathlib.Path, info: dict[str, Any]) -> None:
  for name, (size, crc) in info["files"].items():
    path = folder / name
    try:
      found = path.stat().st_size
      if found != size:
        raise _Damaged(f"{name} has {found} bytes instead of {size}")
      if _crc(path) != crc:
        raise _Damaged(f"the contents of {name} changed since it was written")
    except OSError as e:
      raise _Damaged(f"{name} cannot be read: {e.strerror}") from None


def _crc(path: pathlib.Path) -> int:
  value = 0
  with path.open("rb") as f:
    while chunk := f.read(_CRC_CHUNK):
      value = zlib.crc32(chunk, value)
  return value


# ---- Arrays ------------------------------------------------------------------


def _flat_params(params: PyTree) -> dict[str, Any]:
  flat = flax.traverse_util.flatten_dict(params)
  for path in flat:
    if not all(isinstance(key, str) and "/" not in key for key in path):
      raise ValueError(
          f"params need strings without '/' as keys, not {path}"
      )
  return {"/".join(path): leaf for path, leaf in flat.items()}


def _named_leaves(tree: PyTree) -> dict[str, Any]:
  """Leaves by dotted path, in the order of the tree."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  named = {
      jax.tree_util.keystr(path, simple=True, separator=".") or "state": leaf
      for path, leaf in leaves
  }
  if len(named) != len(leaves):
    raise ValueError("two leaves of the state have the same dotted name")
  return named


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_saveable(
    tree: PyTree, names: list[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """(arrays that orbax takes, description of all leaves), both by name."""
  named = _named_leaves(tree) if names is None else dict(tree)
  arrays, specs = {}, {}
  for name, leaf in named.items():
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
      raise TypeError(
          f"leaf '{name}' is a Python {type(leaf).__name__}; a state holds"
          " arrays only: wrap it in jnp.asarray with its dtype"
      )
    specs[name] = {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    if isinstance(leaf, jax.Array) and _is_key(leaf):
      specs[name]["key_impl"] = str(jax.random.key_impl(leaf))
      leaf = jax.random.key_data(leaf)
      specs[name]["key_data_shape"] = list(leaf.shape)
    if leaf.size == 0:  # Nothing to write, and orbax refuses it.
      continue
    # Orbax writes numpy arrays from the caller's memory, in the background.
    arrays[name] = leaf if isinstance(leaf, jax.Array) else np.array(leaf)
  return arrays, specs


def _check_leaves(folder, specs, given: dict[str, Any]) -> None:
  """Raises one `StateMismatch` that names every leaf that does not fit."""
  lines = []
  for name in [*given, *(n for n in specs if n not in given)]:
    if name not in specs:
      lines.append(f"'{name}': not in the checkpoint")
    elif name not in given:
      lines.append(f"'{name}': not in the state given")
    else:
      saved = f"{specs[name]['dtype']}{specs[name]['shape']}"
      wanted = f"{given[name].dtype}{list(given[name].shape)}"
      if saved != wanted:
        lines.append(f"'{name}': saved {saved}, given {wanted}")
  if lines:
    more = len(lines) - _NAMES_IN_ERROR
    shown = lines[:_NAMES_IN_ERROR] + [f"and {more} more"] * (more > 0)
    raise StateMismatch(
        f"checkpoint {folder} does not fit the state given:\n  "
        + "\n  ".join(shown)
    )


def _restore_arrays(folder, specs, abstract_state: PyTree) -> PyTree:
  given = _named_leaves(abstract_state)
  _check_leaves(folder, specs, given)
  arrays = _read_arrays(folder, specs, given)
  return jax.tree.unflatten(
      jax.tree.structure(abstract_state), [arrays[name] for name in given]
  )


def _read_arrays(folder, specs, given: dict[str, Any]) -> dict[str, Any]:
  """Arrays by name, each as the leaf of `given` wants it (None: uncommitted)."""
  wanted = {name: _target_sharding(leaf) for name, leaf in given.items()}
  restore_args = {}
  for name, sharding in wanted.items():
    if 0 in specs[name]["shape"]:
      continue
    if sharding is None:
      restore_args[name] = ocp.RestoreArgs(restore_type=np.ndarray)
    else:
      restore_args[name] = ocp.ArrayRestoreArgs(sharding=sharding)
  raw = {}
  if restore_args:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      raw = checkpointer.restore(
          folder / _ARRAYS,
          args=ocp.args.PyTreeRestore(
              item=dict.fromkeys(restore_args, 0), restore_args=restore_args
          ),
      )
  return {
      name: _as_wanted(raw.get(name), specs[name], leaf, wanted[name])
      for name, leaf in given.items()
  }


def _target_sharding(leaf: Any) -> jax.sharding.Sharding | None:
  """The sharding that an abstract leaf names, None if it does not care."""
  if isinstance(leaf, jax.Array):
    return leaf.sharding if leaf.committed else None
  return getattr(leaf, "sharding", None)


def _as_wanted(array, spec, leaf, sharding):
  """One array read by orbax (None: it has no elements), made into its leaf."""
  if array is None:
    is_key = "key_impl" in spec
    array = np.zeros(
        spec["key_data_shape" if is_key else "shape"],
        np.uint32 if is_key else jnp.dtype(spec["dtype"]),
    )
  if isinstance(leaf, (np.ndarray, np.generic)):
    return array
  if not isinstance(array, jax.Array):
    # A copy: the buffer may be donated, so it must not be numpy's.
    array = jnp.array(array, copy=True)
  if "key_impl" in spec:
    array = jax.random.wrap_key_data(array, impl=spec["key_impl"])
  return array if sharding is None else jax.device_put(array, sharding)
