"""The devices of a run as one mesh, and a batch's rows split over them.

The updates are written for one device. Given a batch whose rows are split over
the mesh and params that lie on it by rule (`sharding.py`), XLA computes the
same sums over all devices: the counts that losses divide by are counts of the
whole batch, so 1 device equals 8.

    replica    copies on other slices, over the slow network between them
    data       copies
    fsdp       rows are split, and so are params, each gathered where it is used
    tensor     heads, feed-forward and vocabulary are split
    sequence   positions of a row are split

Any of them may be 1, and all are on a laptop.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
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
