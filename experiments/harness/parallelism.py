"""A step of a stage as one program for all devices: by jit or by pmap.

    jit     the arrays are split, and XLA makes of a program for one device one
            for all of them: any mesh, the default
    pmap    every device runs the program on its own rows and sums over the
            others where it says so (`rlhf_jax/collectives.py`): replicated
            data parallelism, over the mesh's `data` alone

Both take and give the same arrays in the same places, so that nothing around a
step knows by which it is computed, and a run may go on by the other.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from rlhf_jax import collectives

Parallelism = Literal["jit", "pmap"]


def check_parallelism(
    parallelism: Parallelism, axes: Mapping[str, int]
) -> None:
  """Checks that a mesh of these axes is one that pmap can have.

  Raises:
    ValueError: says which axis, or how many processes, it cannot.
  """
  if parallelism == "jit":
    return
  for name, size in axes.items():
    if name != "data" and size > 1:
      raise ValueError(
          f"parallelism='pmap': mesh.{name}={size}, but pmap holds a whole "
          "model on every device and splits rows alone, over mesh.data; set "
          "the other axes to 1, or parallelism='jit'"
      )
  if jax.process_count() > 1:
    raise ValueError(
        f"parallelism='pmap': there are {jax.process_count()} processes, and "
        "it runs the devices of one; set parallelism='jit'"
    )


def compile_step(
    step: Callable[..., tuple[Any, Any]],
    parallelism: Parallelism,
    mesh: jax.sharding.Mesh,
    *,
    rows: tuple[int, ...],
    out_shardings: tuple[Any, Any] = (None, None),
    gives_rows: bool = False,
    donate: tuple[int, ...] = (),
) -> Callable[..., tuple[Any, Any]]:
  """`step` compiled for the devices of `mesh`.

  Args:
    step: of positional arguments; gives two trees.
    rows: the arguments that are rows, split over the devices; the others are
      whole on every device.
    out_shardings: where the two trees are to lie; None is where they come up.
    gives_rows: whether the first of the two is rows.
    donate: the arguments whose memory the outputs may take.

  Raises:
    ValueError: if pmap cannot have this mesh.
  """
  check_parallelism(parallelism, mesh.shape)
  if parallelism == "pmap":
    step = _mapped(step, mesh, rows, gives_rows)
  return jax.jit(step, donate_argnums=donate, out_shardings=out_shardings)


def _mapped(step, mesh, rows, gives_rows):
  """The step by pmap, of and to arrays of the whole batch."""

  def mapped(*args):
    args = [
        _by_device(x, mesh.size) if i in rows else x for i, x in enumerate(args)
    ]
    first, second = jax.pmap(
        step,
        axis_name=collectives.AXIS,
        devices=mesh.devices.ravel().tolist(),
        in_axes=tuple(0 if i in rows else None for i in range(len(args))),
        out_axes=(0 if gives_rows else None, None),
    )(*args)
    if gives_rows:
      first = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), first)
    return first, second

  return mapped


def _by_device(tree: Any, num_devices: int) -> Any:
  """[B, ...] -> [num_devices, B / num_devices, ...]."""

  def split(x):
    if x.shape[0] % num_devices:
      raise ValueError(
          f"{x.shape[0]} rows do not divide over {num_devices} devices"
      )
    return x.reshape(num_devices, -1, *x.shape[1:])

  return jax.tree.map(split, tree)
