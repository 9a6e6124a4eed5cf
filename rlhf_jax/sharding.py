"""Where arrays live: one mesh, batches split over it, states on every device.

The updates are written for one device. Given a batch that is split over the
mesh's 'data' axis and a state that is replicated, XLA computes the same sums
over all devices: the counts that losses divide by are counts of the whole
batch, so 1 device equals 8.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

DATA_AXIS = "data"


def make_mesh(num_devices: int = -1) -> Mesh:
  """A mesh over the first `num_devices` devices, -1 for all of them.

  Raises:
    ValueError: if there are not so many.
  """
  devices = jax.devices()
  if num_devices == -1:
    num_devices = len(devices)
  if not 1 <= num_devices <= len(devices):
    raise ValueError(
        f"num_devices={num_devices}, but {len(devices)} devices of kind "
        f"{devices[0].device_kind!r} are there"
    )
  return Mesh(np.asarray(devices[:num_devices]), (DATA_AXIS,))


def replicate(tree: Any, mesh: Mesh) -> Any:
  """A copy of every array on every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_rows(tree: Any, mesh: Mesh) -> Any:
  """Splits every array's leading axis over the mesh's 'data' axis.

  Raises:
    ValueError: if the rows do not divide over the devices.
  """
  num_devices = mesh.shape[DATA_AXIS]
  for x in jax.tree.leaves(tree):
    if x.shape[0] % num_devices:
      raise ValueError(
          f"{x.shape[0]} rows do not divide over {num_devices} devices"
      )
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(DATA_AXIS)))
