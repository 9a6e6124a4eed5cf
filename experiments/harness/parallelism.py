"""A step of a stage as one program for all devices: by jit or by pmap.

    jit     the arrays are split, and XLA makes of a program for one device one
            for all of them: any mesh, the default
    pmap    every device runs the program on its own rows and sums over the
            others where it says so (`rlhf_jax/devices.py`): replicated data
            parallelism alone

Both take and give the same arrays, rows split and the rest on every device, so
that nothing around a step, and no checkpoint, knows by which it is computed.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf_jax import devices
from rlhf_jax.sharding import DATA_AXIS

Parallelism = Literal["jit", "pmap"]


def check_parallelism(parallelism: Parallelism, mesh: Mesh) -> None:
  """Checks that the mesh is one that pmap can have.

  Raises:
    ValueError: says which axis, or how many processes, it cannot.
  """
  if parallelism == "jit":
    return
  split = [x for x in mesh.axis_names if x != DATA_AXIS and mesh.shape[x] > 1]
  if split:
    raise ValueError(
        f"parallelism='pmap': mesh.{split[0]}={mesh.shape[split[0]]}, but pmap "
        f"has a whole model on every device and splits rows alone, over "
        f"mesh.{DATA_AXIS}; take parallelism='jit'"
    )
  if jax.process_count() > 1:
    raise ValueError(
        f"parallelism='pmap': there are {jax.process_count()} processes, and "
        "their rows would have to be put together; take parallelism='jit'"
    )


def compile_step(
    step: Callable[..., tuple[Any, Any]],
    parallelism: Parallelism,
    mesh: Mesh,
    *,
    rows: tuple[int, ...],
    gives_rows: bool = False,
    donate: tuple[int, ...] = (),
) -> Callable[..., tuple[Any, Any]]:
  """`step` compiled for the devices of `mesh`.

  Args:
    step: of positional arguments; gives two trees.
    rows: the arguments that are rows, split over the devices; the others are
      whole on every device.
    gives_rows: whether the first of the two that `step` gives is rows.
    donate: the arguments whose memory the outputs may take.

  Raises:
    ValueError: if pmap cannot have this mesh.
  """
  check_parallelism(parallelism, mesh)
  if parallelism == "jit":
    return jax.jit(step, donate_argnums=donate)
  num_devices = mesh.size
  whole = NamedSharding(mesh, PartitionSpec())
  split = NamedSharding(mesh, PartitionSpec(DATA_AXIS))

  def on_all_devices(*args):
    each = [
        _by_device(x, num_devices) if i in rows else x
        for i, x in enumerate(args)
    ]
    first, second = jax.pmap(
        step,
        axis_name=devices.AXIS,
        devices=mesh.devices.ravel().tolist(),
        in_axes=tuple(0 if i in rows else None for i in range(len(args))),
        out_axes=(0 if gives_rows else None, None),
    )(*each)
    if gives_rows:
      first = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), first)
    return first, second

  return jax.jit(
      on_all_devices,
      donate_argnums=donate,
      out_shardings=(split if gives_rows else whole, whole),
  )


def _by_device(tree: Any, num_devices: int) -> Any:
  """[B, ...] -> [num_devices, B / num_devices, ...]."""

  def split(x):
    if x.shape[0] % num_devices:
      raise ValueError(
          f"{x.shape[0]} rows do not divide over {num_devices} devices"
      )
    return x.reshape(num_devices, -1, *x.shape[1:])

  return jax.tree.map(split, tree)
