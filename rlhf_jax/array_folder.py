"""A folder of arrays beside a JSON file that proves it whole.

    <folder>/arrays/          orbax
    <folder>/checkpoint.json  written last, in one atomic rename

The JSON holds whatever its caller put there, a description of every array, and
the size and CRC-32 of each file under `arrays/` and of itself: a folder without
it was never finished, one that does not match it is damaged. Checksums also
catch what a power failure loses, so nothing waits for the disk.

Arrays are saved under flat dotted names, so the state may be any pytree, and
restored onto the shardings of the abstract state given, whatever devices they
were saved on.
"""

import json
import os
import pathlib
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any

ARRAYS = "arrays"
_FORMAT = 1
_INFO = "checkpoint.json"
_CRC_CHUNK = 1 << 22
_NAMES_IN_ERROR = 8


class Damaged(Exception):
  """Why a folder is not a usable checkpoint."""


class StateMismatch(ValueError):
  """The arrays saved are not those of the state given; lists the leaves."""


# ---- checkpoint.json ---------------------------------------------------------


def write_info(folder: pathlib.Path, info: dict[str, Any]) -> None:
  """Completes `folder`: writes `info` and the list of the files there."""
  folder.mkdir(exist_ok=True)
  paths = sorted(p for p in (folder / ARRAYS).rglob("*") if p.is_file())
  files = {
      path.relative_to(folder).as_posix(): [path.stat().st_size, _crc(path)]
      for path in paths
  }
  contents = {**info, "files": files}
  text = json.dumps(
      {"format": _FORMAT, "crc32": _json_crc(contents), "contents": contents},
      indent=1,
  )
  temporary = folder / (_INFO + ".writing")
  temporary.write_text(text)
  os.replace(temporary, folder / _INFO)


def is_finished(folder: pathlib.Path) -> bool:
  """Whether `folder` was once complete; it may have been damaged since."""
  return (folder / _INFO).exists()


def read_info(folder: pathlib.Path) -> dict[str, Any]:
  """What `write_info` was given; raises `Damaged` with the reason."""
  try:
    outer = json.loads((folder / _INFO).read_bytes())
  except FileNotFoundError:
    raise Damaged(f"{_INFO} is missing: it was never finished") from None
  except OSError as e:
    raise Damaged(f"{_INFO} cannot be read: {e.strerror}") from None
  except (ValueError, RecursionError) as e:
    raise Damaged(f"{_INFO} is not valid JSON: {e}") from None
  if not isinstance(outer, dict) or "format" not in outer:
    raise Damaged(f"{_INFO} does not describe a checkpoint")
  if outer["format"] != _FORMAT:
    raise Damaged(
        f"{_INFO} has format {outer['format']!r}, this version reads {_FORMAT}"
    )
  contents = outer.get("contents")
  if outer.get("crc32") != _json_crc(contents):
    raise Damaged(f"the contents of {_INFO} changed since it was written")
  return contents


def verify_files(folder: pathlib.Path, info: dict[str, Any]) -> None:
  """Raises `Damaged` for the first file that is not as it was written."""
  for name, (size, crc) in info["files"].items():
    path = folder / name
    try:
      found = path.stat().st_size
      if found != size:
        raise Damaged(f"{name} has {found} bytes instead of {size}")
      if _crc(path) != crc:
        raise Damaged(f"the contents of {name} changed since it was written")
    except OSError as e:
      raise Damaged(f"{name} cannot be read: {e.strerror}") from None


def _crc(path: pathlib.Path) -> int:
  value = 0
  with path.open("rb") as f:
    while chunk := f.read(_CRC_CHUNK):
      value = zlib.crc32(chunk, value)
  return value


def _json_crc(contents: Any) -> int:
  return zlib.crc32(json.dumps(contents).encode())


# ---- Arrays ------------------------------------------------------------------


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


def to_saveable(tree: PyTree) -> tuple[dict[str, Any], dict[str, Any]]:
  """(arrays that orbax takes, description of all leaves), both by name."""
  arrays, specs = {}, {}
  for name, leaf in _named_leaves(tree).items():
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


def _describe(leaf: Any) -> str:
  if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
    return f"{leaf.dtype}{list(leaf.shape)}"
  return f"a Python {type(leaf).__name__}"


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
      wanted = _describe(given[name])
      if saved != wanted:
        lines.append(f"'{name}': saved {saved}, given {wanted}")
  if lines:
    more = len(lines) - _NAMES_IN_ERROR
    shown = lines[:_NAMES_IN_ERROR] + [f"and {more} more"] * (more > 0)
    raise StateMismatch(
        f"checkpoint {folder} does not fit the state given:\n  "
        + "\n  ".join(shown)
    )


def restore_arrays(
    folder: pathlib.Path,
    specs: dict[str, Any],
    abstract_state: PyTree,
    *,
    donate: bool = False,
) -> PyTree:
  """The arrays of `folder` in the structure of `abstract_state`.

  Each is put on the sharding that its abstract leaf names; without one (or for
  an array that is not committed to a device) it is left uncommitted on the
  default device. A numpy leaf gives numpy.

  Args:
    donate: delete the arrays of `abstract_state` before others are read.

  Raises:
    StateMismatch: lists every leaf that is missing or differs in dtype, shape.
  """
  given = _named_leaves(abstract_state)
  _check_leaves(folder, specs, given)
  if donate:
    given = {name: _abstract(leaf) for name, leaf in given.items()}
    for leaf in jax.tree.leaves(abstract_state):
      if isinstance(leaf, jax.Array) and not leaf.is_deleted():
        leaf.delete()
  arrays = read_arrays(folder, specs, given)
  return jax.tree.unflatten(
      jax.tree.structure(abstract_state), [arrays[name] for name in given]
  )


def _abstract(leaf: Any) -> Any:
  if not isinstance(leaf, jax.Array):
    return leaf
  sharding = _target_sharding(leaf)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def read_arrays(
    folder: pathlib.Path, specs: dict[str, Any], given: dict[str, Any]
) -> dict[str, Any]:
  """Arrays by name, each as its leaf in `given` wants it; None: uncommitted."""
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
          folder / ARRAYS,
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
