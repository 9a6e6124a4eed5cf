"""Carries tensors between a folder's files and our params, by a family's table.

They stream one at a time from the file to their place on the devices. Beside
the result the host holds, at its peak, one tensor as it is read, in the dtype
of the parameters, and one copy of it on its way to a device: two.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import re
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import device_mesh
from rlhf_jax.models.families.hf_config import FamilyError
from rlhf_jax.models.families.table import Shape, Tensor, linear
from rlhf_jax.models.families.tensor_files import (
    TensorFileError,
    TensorReader,
    TensorSource,
)

SCORE = "score"  # the head of a reward model, which has no bias in a file
_SCORE_BIAS = "head/bias"
_PIECE = 2**20  # elements that are checked at once: no copy of a tensor

Place = Callable[[str, Shape], Any]


def rows_for(
    family: ModuleType, shapes: dict[str, Shape]
) -> tuple[Tensor, ...]:
  """The family's rows for the parameters that there are, head included.

  Args:
    shapes: path -> shape of a LanguageModel's or a ScalarModel's parameters.

  Raises:
    FamilyError: the family has no tensor for a parameter.
  """
  rows = [
      dataclasses.replace(row, paths=tuple(f"trunk/{x}" for x in row.paths))
      for row in family.WEIGHTS
  ]
  is_scalar = shapes.get("head/kernel", ())[1:] == (1,)
  rows.append(linear(SCORE if is_scalar else family.HEAD, "head")[0])
  rows = [row for row in rows if row.paths[0] in shapes]
  found = [path for row in rows for path in row.paths]
  missing = set(shapes) - set(found) - {_SCORE_BIAS}
  if missing or len(found) != len(set(found)):
    raise FamilyError(
        f"{family.__name__}: this model has parameters that the family has no "
        f"tensor for: {', '.join(sorted(missing)) or 'some twice'}"
    )
  return tuple(rows)


# --- reading ------------------------------------------------------------------


def read_params(
    family: ModuleType,
    reader: TensorReader,
    shapes: dict[str, Shape],
    *,
    dtype: str,
    place: Place,
) -> dict[str, Any]:
  """The tree of params of these shapes.

  Args:
    dtype: of the params.
    place: (path, shape) -> sharding or device; None is the default device.

  Raises:
    TensorFileError: a tensor is missing, too many, or of another shape; names
      file and tensor.
  """
  rows, names = rows_for(family, shapes), _file_names(family, reader)
  _refuse_extra(family, rows, shapes, reader, names)
  if "head/kernel" not in shapes:
    _check_tied_head(family, reader, names)
  leaves = {}
  for row in rows:
    read = functools.partial(_read_one, row, reader, names, dtype)
    leaves |= _read_row(row, read, shapes, dtype, place)
  if _SCORE_BIAS in shapes:
    leaves[_SCORE_BIAS] = jnp.zeros(shapes[_SCORE_BIAS], dtype)
  return _unflatten(leaves)


def _file_names(family: ModuleType, reader: TensorReader) -> dict[str, str]:
  """Our name of a tensor -> the file's; old ones leave out the prefix."""
  names = {}
  for name in reader.names():
    top = name.startswith((family.PREFIX, f"{family.HEAD}.", f"{SCORE}."))
    whole = name if top else family.PREFIX + name
    if whole in names:
      raise TensorFileError(
          f"{reader.file(name)}: tensor {name} is also there as {names[whole]}"
      )
    names[whole] = name
  return names


def _check_tied_head(
    family: ModuleType, reader: TensorReader, names: dict[str, str]
) -> None:
  """A head that is said to be the embedding and is in the file must be it."""
  name = f"{family.HEAD}.weight"
  if name not in names:
    return
  head, embedding = names[name], names.get(family.WEIGHTS[0].name)
  if embedding is None or not reader.are_equal(head, embedding):
    raise TensorFileError(
        f"{reader.file(head)}: tensor {head} is another than {embedding}"
        ", and the config says that they are tied"
    )


def _refuse_extra(
    family: ModuleType,
    rows: tuple[Tensor, ...],
    shapes: dict[str, Shape],
    reader: TensorReader,
    names: dict[str, str],
) -> None:
  """What the config has no place for: a layer too many, a bias, anything."""
  known = {
      row.name.format(*index)
      for row in rows
      for index in np.ndindex(*shapes[row.paths[0]][: row.num_indices])
  }
  if "head/kernel" not in shapes:
    known.add(f"{family.HEAD}.weight")  # `_check_tied_head` sees to it
  buffers = re.compile("|".join(family.BUFFERS) or r"\b\B")
  extra = sorted(x for x in set(names) - known if not buffers.fullmatch(x))
  if extra:
    raise TensorFileError(
        f"{reader.file(names[extra[0]])}: tensor {names[extra[0]]} is none of "
        f"the model's in {reader.folder}"
        + (f", nor are {len(extra) - 1} more" if len(extra) > 1 else "")
    )


def _read_row(
    row: Tensor,
    read: Callable[[str, tuple[Shape, ...]], tuple[np.ndarray, ...]],
    shapes: dict[str, Shape],
    dtype: str,
    place: Place,
) -> dict[str, jax.Array]:
  """The parameters of one row of the table, all layers of it."""
  num = row.num_indices
  whole = {path: shapes[path] for path in row.paths}
  each = tuple(shape[num:] for shape in whole.values())
  shardings = {path: place(path, shape) for path, shape in whole.items()}
  if not num:
    parts = zip(whole, read(row.name, each), strict=True)
    return {path: _put(part, shardings[path]) for path, part in parts}
  stacked = {
      path: jnp.zeros(shape, dtype, device=shardings[path])
      for path, shape in whole.items()
  }
  for index in np.ndindex(*shapes[row.paths[0]][:num]):
    parts = zip(whole, read(row.name.format(*index), each), strict=True)
    for path, part in parts:
      part = _put(part, _of_a_part(shardings[path], num))
      stacked[path] = _set_part(stacked[path], part, index)
    del part, parts  # before the next is read
  return stacked


def _put(x: np.ndarray, sharding: Any) -> jax.Array:
  # To its end: until then the host's array is kept.
  if isinstance(sharding, jax.sharding.NamedSharding):
    return device_mesh.put(x, sharding).block_until_ready()
  return jax.device_put(x, sharding).block_until_ready()


@functools.partial(jax.jit, donate_argnums=0)
def _set_part(
    stacked: jax.Array, part: jax.Array, index: tuple[int, ...]
) -> jax.Array:
  starts = (*index, *([0] * part.ndim))
  part = part.reshape((1,) * len(index) + part.shape)
  return jax.lax.dynamic_update_slice(stacked, part, starts)


def _of_a_part(sharding: Any, num_indices: int) -> Any:
  """How one layer of a stacked parameter is spread over the same devices."""
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return sharding
  spec = jax.sharding.PartitionSpec(*sharding.spec[num_indices:])
  return jax.sharding.NamedSharding(sharding.mesh, spec)


def _read_one(
    row: Tensor,
    reader: TensorReader,
    names: dict[str, str],
    dtype: str,
    name: str,
    shapes: tuple[Shape, ...],
) -> tuple[np.ndarray, ...]:
  if name not in names:
    raise TensorFileError(f"{reader.folder}: tensor {name} is missing")
  in_file, wanted = names[name], row.file_shape(shapes)
  where = f"{reader.file(in_file)}: tensor {in_file}"
  if reader.shape(in_file) != wanted:
    raise TensorFileError(
        f"{where} has shape {list(reader.shape(in_file))}, and by config.json "
        f"it is {list(wanted)}"
    )
  if not jnp.issubdtype(reader.dtype(in_file), jnp.floating):
    raise TensorFileError(
        f"{where} holds {reader.dtype(in_file)}, and quantized weights are not "
        "implemented"
    )
  array = reader.read(in_file, dtype)
  if not _is_finite(array):
    raise TensorFileError(f"{where} holds NaN or Inf")
  return row.to_ours(array, shapes)


def _is_finite(array: np.ndarray) -> bool:
  flat = array.reshape(-1)
  return all(
      np.isfinite(flat[i : i + _PIECE]).all()
      for i in range(0, flat.size, _PIECE)
  )


def _unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


# --- writing ------------------------------------------------------------------


def sources(
    table: tuple[Tensor, ...], flat: dict[str, Any]
) -> Iterator[TensorSource]:
  """The tensors of `table` from params by path; each is made when written."""
  for row in table:
    leaves = [flat[path] for path in row.paths]
    num = row.num_indices
    shape = row.file_shape(tuple(tuple(x.shape[num:]) for x in leaves))
    dtype = np.dtype(leaves[0].dtype)
    for index in np.ndindex(*leaves[0].shape[:num]):
      yield TensorSource(
          row.name.format(*index),
          shape,
          dtype,
          functools.partial(_to_theirs, row, leaves, index),
      )


def _to_theirs(
    row: Tensor, leaves: list[Any], index: tuple[int, ...]
) -> np.ndarray:
  parts = [leaf[index] if index else leaf for leaf in leaves]
  return row.to_theirs(tuple(np.asarray(part) for part in parts))
