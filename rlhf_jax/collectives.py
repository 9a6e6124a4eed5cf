"""What is of the whole batch where every device runs a program on its own rows.

That is so under `jax.pmap` over `AXIS`: an update sees a part of the batch, and
what it counts and sums there is a part too. Under `jit` XLA splits the arrays
and a program sees the whole: then all of this does nothing, not even a copy.
Which of the two it is, is known when a program is traced, so updates and losses
are written once.

Rows are in the order of the devices: device d holds the rows d * b ... (d + 1)
* b - 1 of a batch of n * b.

`MEMBERS` is another axis, of `jax.vmap`: runs side by side, each whole. What
they share is nothing but how long a loop goes on, see `any_member`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

AXIS = "devices"
MEMBERS = "members"


def num_devices() -> int:
  """How many devices run this program on their own rows; 1 if none does."""
  try:
    return jax.lax.axis_size(AXIS)
  except NameError:  # the axis is not there: no pmap
    return 1


def sum_over_devices(tree: Any) -> Any:
  """Each array summed over the devices, the same on all of them.

  It belongs behind a gradient and not inside of what is differentiated.
  """
  return tree if num_devices() == 1 else jax.lax.psum(tree, AXIS)


def gather_rows(tree: Any) -> Any:
  """The rows of all devices, on each: [b, ...] -> [n * b, ...]."""
  if num_devices() == 1:
    return tree
  return jax.lax.all_gather(tree, AXIS, tiled=True)


def own_rows(tree: Any) -> Any:
  """A device's part of what all of them hold: [n * b, ...] -> [b, ...].

  The inverse of `gather_rows`.

  Raises:
    ValueError: if the rows do not divide over the devices.
  """
  n = num_devices()
  if n == 1:
    return tree

  def own(x):
    if x.shape[0] % n:
      raise ValueError(f"{x.shape[0]} rows do not divide over {n} devices")
    return x.reshape(n, -1, *x.shape[1:])[jax.lax.axis_index(AXIS)]

  return jax.tree.map(own, tree)


def any_member(flag: Bool[Array, ""]) -> Bool[Array, ""]:
  """Whether it is so of any of the runs side by side; `flag` of a lone one.

  For the condition of a loop whose body leaves alone whoever is done. With a
  condition of each its own, vmap would compare and copy all that the loop
  carries, in every step: of decoding that is the cache.
  """
  try:
    return jax.lax.psum(flag.astype(jnp.int32), MEMBERS) > 0
  except NameError:  # the axis is not there: no vmap over it
    return flag
