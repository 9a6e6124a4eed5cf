"""Where arrays live: one mesh, batches split over it, models by their rules.

The updates are written for one device. Given a batch whose rows are split over
the mesh and params that lie on it by rule, XLA computes the same sums over all
devices: the counts that losses divide by are counts of the whole batch, so 1
device equals 8.

    replica    copies on other slices, over the slow network between them
    data       copies
    fsdp       rows are split, and so are params, each gathered where it is used
    tensor     heads, feed-forward and vocabulary are split
    sequence   positions of a row are split

Any of them may be 1, and all are on a laptop.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ("replica", "data", "fsdp", "tensor", "sequence")
# A batch's rows are split over all of these.
ROWS = ("replica", "data", "fsdp")

# Bytes of an array that are gathered from other processes at a time.
_BLOCK = 2**28

# What one dimension is split over.
Split = str | tuple[str, ...] | None
# (regular expression, a Split for each dimension), searched for in a
# parameter's path 'trunk/layers/attention/query/kernel'; the first that is
# found counts. Missing dimensions are not split.
Rule = tuple[str, tuple[Split, ...]]
Rules = tuple[Rule, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """How many devices each axis has; one may be -1, for all that are left."""

  replica: int = 1
  data: int = 1
  fsdp: int = 1
  tensor: int = 1
  sequence: int = 1

  def __post_init__(self):
    sizes = self._named()
    wrong = {name: n for name, n in sizes.items() if n < 1 and n != -1}
    if wrong or list(sizes.values()).count(-1) > 1:
      raise ValueError(
          f"{self}: each axis is 1 or more, and one of them may be -1 for all "
          "devices that are left"
      )

  def __str__(self) -> str:
    named = [f"{name}: {n}" for name, n in self._named().items() if n != 1]
    return "mesh {" + ", ".join(named) + "}"

  def _named(self) -> dict[str, int]:
    return {
        "replica": self.replica,
        "data": self.data,
        "fsdp": self.fsdp,
        "tensor": self.tensor,
        "sequence": self.sequence,
    }

  def sizes(self, num_devices: int) -> dict[str, int]:
    """The size of each axis on so many devices, -1 filled in.

    Raises:
      ValueError: there are too few, or the rest does not divide.
    """
    sizes = self._named()
    known = math.prod(n for n in sizes.values() if n != -1)
    if -1 in sizes.values() and num_devices % known:
      raise ValueError(
          f"{self}: {num_devices} devices do not divide by the {known} of the "
          "other axes"
      )
    if known > num_devices:
      raise ValueError(
          f"{self} has {known} devices, and there are {num_devices}"
      )
    rest = num_devices // known
    return {name: rest if n == -1 else n for name, n in sizes.items()}

  def num_row_shards(self, num_devices: int) -> int:
    """Into how many parts a batch's rows are split."""
    sizes = self.sizes(num_devices)
    return math.prod(sizes[axis] for axis in ROWS)


def make_mesh(
    config: MeshConfig, devices: Sequence[Any] | None = None
) -> Mesh:
  """A mesh over the first of `devices` (None: of all there are).

  Neighbours on the mesh are neighbours in the machine as far as jax knows it,
  and `replica` goes over slices where there are several.

  Raises:
    ValueError: if there are not so many, or some are left over that other
      processes would wait with.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = config.sizes(len(devices))
  shape, num = tuple(sizes.values()), math.prod(sizes.values())
  if num < len(devices) and len({x.process_index for x in devices}) > 1:
    raise ValueError(
        f"{config} has {num} of the {len(devices)} devices of all processes: "
        "it must have them all (-1 is all that are left)"
    )
  types = (AxisType.Auto,) * len(AXES)
  return Mesh(_arranged(devices[:num], shape), AXES, axis_types=types)


def _arranged(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
  if devices[0].platform != "tpu":
    return np.asarray(devices).reshape(shape)
  num_slices = len({getattr(x, "slice_index", 0) for x in devices})
  if num_slices > 1 and shape[0] == num_slices:
    return mesh_utils.create_hybrid_device_mesh(
        (1, *shape[1:]),
        (shape[0], *(1,) * (len(shape) - 1)),
        devices,
        allow_split_physical_axes=True,
    )
  return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
  )


# --- arrays -------------------------------------------------------------------


def replicate(tree: Any, mesh: Mesh) -> Any:
  """A copy of every array on every device."""
  sharding = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda x: put(x, sharding), tree)


def put(x: Any, sharding: NamedSharding, *, copy: bool = False) -> jax.Array:
  """`x` on that sharding, which may be of several processes.

  What no process but this one knows of must be the same in all.

  Args:
    copy: also if it lies there already, so that it may be donated.
  """
  if sharding.is_fully_addressable or (
      isinstance(x, jax.Array) and not x.is_fully_addressable
  ):
    return jax.device_put(x, sharding, may_alias=False if copy else None)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    data = put(jax.random.key_data(x), sharding)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  host = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: host[i])


def rows(mesh: Mesh) -> NamedSharding:
  """Leading axes split over the mesh's row axes."""
  return NamedSharding(mesh, PartitionSpec(ROWS))


def num_row_shards(mesh: Mesh) -> int:
  """Into how many parts the mesh splits rows."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def put_rows(tree: Any, mesh: Mesh) -> Any:
  """Rows that every process knows, split over this mesh."""
  return jax.tree.map(lambda x: put(x, rows(mesh)), tree)


def local_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
  """Which rows of a batch lie on this process's devices, in order.

  With one process these are all; where processes share the splits of one row,
  each has it.

  Raises:
    ValueError: if the rows do not divide over the devices.
  """
  _check_rows(num_rows, mesh)
  parts = {
      index[0].indices(num_rows)[:2]
      for index in rows(mesh).addressable_devices_indices_map(
          (num_rows,)
      ).values()
  }
  return np.concatenate([np.arange(*part) for part in sorted(parts)])


def shard_rows(tree: Any, mesh: Mesh) -> Any:
  """Splits every array's leading axis over the mesh's row axes.

  Args:
    tree: of the batch's rows those that `local_rows` names.

  Raises:
    ValueError: if the rows do not divide over the devices.
  """
  num = num_row_shards(mesh)
  held = len(local_rows(mesh, num))
  for x in jax.tree.leaves(tree):
    if x.shape[0] % held:
      raise ValueError(f"{x.shape[0]} rows do not divide over {held} devices")
  if held == num:
    return put_rows(tree, mesh)
  return jax.tree.map(lambda x: _from_parts(x, mesh, num // held), tree)


def _from_parts(x: Any, mesh: Mesh, num_parts: int) -> jax.Array:
  """An array of all processes, of which this one has the rows `x`."""
  num_rows = x.shape[0] * num_parts
  mine = local_rows(mesh, num_rows)

  def part(index):
    start, stop, _ = index[0].indices(num_rows)
    return x[np.searchsorted(mine, start) :][: stop - start]

  return jax.make_array_from_callback(
      (num_rows, *x.shape[1:]), rows(mesh), part
  )


def _check_rows(num_rows: int, mesh: Mesh) -> None:
  num = num_row_shards(mesh)
  if num_rows % num:
    raise ValueError(f"{num_rows} rows do not divide over {num} devices")


def to_host(tree: Any) -> Any:
  """Every array as a whole, in numpy; all processes must ask alike."""

  def whole(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      blocks = list(host_blocks(x))
      return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    return jax.device_get(x)

  return jax.tree.map(whole, tree)


def host_blocks(x: Any) -> Iterator[np.ndarray]:
  """An array in numpy, a block of leading indices after the other.

  Of an array of several processes each block is gathered by itself: what all
  devices hold of it meanwhile is a block, and not the whole.
  """
  is_here = not isinstance(x, jax.Array) or x.is_fully_addressable
  if is_here or x.nbytes <= _BLOCK or not x.ndim:
    host = jax.device_get(x) if is_here else _gathered(x)
    yield np.asarray(host)
    return
  size = max(_BLOCK * x.shape[0] // x.nbytes, 1)
  for start in range(0, x.shape[0], size):
    stop = min(start + size, x.shape[0])
    yield _gathered(jax.lax.slice_in_dim(x, start, stop))


def _gathered(x: jax.Array) -> np.ndarray:
  return multihost_utils.process_allgather(x, tiled=True)


# --- rules --------------------------------------------------------------------


def spec_of(
    path: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh
) -> PartitionSpec:
  """How a parameter is split; scalars are not.

  Raises:
    ValueError: no rule matches, or a dimension does not divide.
  """
  if not shape:
    return PartitionSpec()
  for pattern, splits in rules:
    if re.search(pattern, path):
      _check_divides(path, shape, pattern, splits, mesh)
      return PartitionSpec(*splits)
  raise ValueError(
      f"{path} {shape}: no sharding rule matches; the last could be "
      "('.*', ()), a copy on every device"
  )


def _check_divides(path, shape, pattern, splits, mesh) -> None:
  if len(splits) > len(shape):
    raise ValueError(
        f"{path} {shape} has fewer dimensions than its sharding rule "
        f"{pattern!r} {splits}"
    )
  for i, split in enumerate(splits):
    axes = _axes(split)
    unknown = [axis for axis in axes if axis not in mesh.shape]
    if unknown:
      raise ValueError(
          f"sharding rule {pattern!r} {splits}: {unknown[0]!r} is none of the "
          f"mesh's axes {', '.join(mesh.shape)}"
      )
    num = math.prod(mesh.shape[axis] for axis in axes)
    if shape[i] % num:
      raise ValueError(
          f"{path} {shape}: its dimension {i} of {shape[i]} does not divide "
          f"over {' x '.join(axes)} = {num}; choose another mesh, or another "
          f"rule than {pattern!r} {splits}"
      )


def shardings_of(
    tree: Any, rules: Rules | Mapping[str, Rules], mesh: Mesh
) -> Any:
  """The sharding of every leaf of params, of a state, or of their shapes.

  What belongs to a parameter and has its path at its end, as an optimizer's
  moments do, goes where the parameter goes.

  Args:
    rules: of one model, or of several by the name that their part of the tree
      has: {'policy': ..., 'value': ...}.

  Raises:
    ValueError: see `spec_of`.
  """

  def sharding(key_path, leaf):
    path = jax.tree_util.keystr(key_path, simple=True, separator="/")
    own, rest = rules, path
    if isinstance(rules, Mapping):
      names = path.split("/")
      found = [i for i, name in enumerate(names) if name in rules]
      own = rules[names[found[0]]] if found else ()
      rest = "/".join(names[found[0] + 1 :]) if found else path
    try:
      return NamedSharding(mesh, spec_of(rest, leaf.shape, own, mesh))
    except ValueError as error:
      where = f"{path}: " if rest != path else ""
      raise ValueError(f"{where}{error}") from error

  return jax.tree_util.tree_map_with_path(sharding, tree)


def place(
    tree: Any,
    rules: Rules | Mapping[str, Rules],
    mesh: Mesh,
    *,
    copy: bool = False,
) -> Any:
  """Every array of the tree where its rule puts it.

  Args:
    copy: also what lies there already, so that it may be donated.
  """
  shardings = shardings_of(tree, rules, mesh)
  return jax.tree.map(lambda x, y: put(x, y, copy=copy), tree, shardings)


def of(tree: Any) -> Any:
  """Where each array of the tree is."""
  return jax.tree.map(lambda x: x.sharding, tree)


def loader(
    rules: Rules, mesh: Mesh
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
  """(path, shape) -> where a parameter goes while it is read."""
  return lambda path, shape: NamedSharding(
      mesh, spec_of(path, shape, rules, mesh)
  )


# --- activations --------------------------------------------------------------


def mesh_of(x: jax.Array) -> Any | None:
  """The mesh that a traced array is on, or None where it is on one device.

  None too under pmap and shard_map, where each device sees its own part alone.
  """
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty or mesh.size == 1:
    return None
  return None if AxisType.Manual in mesh.axis_types else mesh


def constrain(x: jax.Array, splits: tuple[Split, ...]) -> jax.Array:
  """Says how an activation lies on its mesh; without one it does nothing.

  A dimension that does not divide is not split: one token of a decode step has
  no sequence to split.
  """
  mesh = mesh_of(x)
  if mesh is None:
    return x
  spec = fitting_spec(x.shape, splits, mesh)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def fitting_spec(
    shape: tuple[int, ...], splits: tuple[Split, ...], mesh: Any
) -> PartitionSpec:
  """`splits` without axes that the mesh has not, or that do not divide."""
  fitting = []
  for size, split in zip(shape, splits, strict=True):
    axes = tuple(axis for axis in _axes(split) if axis in mesh.shape)
    divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
    fitting.append(axes if axes and divides else None)
  return PartitionSpec(*fitting)


def _axes(split: Split) -> tuple[str, ...]:
  if split is None:
    return ()
  return (split,) if isinstance(split, str) else tuple(split)
