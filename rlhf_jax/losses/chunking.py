"""Measures of distributions, without all of the distributions at once.

A vocabulary of 128k makes the logits of one row of 8k tokens 4 GiB in float32,
and their softmax and gradient as much again. What a loss wants of them is a few
numbers a position, so the head can run on some positions at a time, and again
in the backward pass.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from rlhf_jax.losses import masking


def map_positions(
    fn: Callable[..., Any],
    arrays: tuple[Shaped[Array, "B N ..."], ...],
    mask: Shaped[Array, "B N"],
    *,
    chunk_size: int,
) -> Any:
  """fn(*arrays), at most `chunk_size` positions of each row at a time.

  Only positions where the mask is set are computed: each row's are brought to
  its front first, and chunks in which no row has any are passed over. The
  backward pass computes each chunk again instead of keeping what is in it.

  Args:
    fn: of positions, each on its own: arrays of [B, n, ...] to a tree of
      [B, n]. It may use traced values from outside, parameters for instance.
    arrays: one entry a position.
    mask: 1 where the result is needed.
    chunk_size: memory alone. Rows that are no longer go through `fn` whole,
      with nothing computed twice.

  Returns:
    The tree of [B, N], 0 where the mask is 0.

  Example:
    >>> x = jnp.arange(4.0)[None]
    >>> mask = jnp.array([[1, 0, 1, 1]])
    >>> map_positions(jnp.square, (x,), mask, chunk_size=2).tolist()
    [[0.0, 0.0, 4.0, 9.0]]
  """
  num_positions = mask.shape[1]
  if num_positions <= chunk_size:
    return _zero_masked(fn(*arrays), mask)
  num_chunks = -(-num_positions // chunk_size)
  # As even as they can be: less is wasted on filling up the last.
  size = -(-num_positions // num_chunks)
  order = jnp.argsort(mask == 0, axis=1, stable=True)
  chunks = jax.tree.map(
      lambda x: _split(_take(x, order), num_chunks, size), (arrays, mask)
  )

  # A loop cannot be merged with its own recomputation. Twice: what is computed
  # again is then kept neither by the branch nor, once a chunk, by the loop.
  remat = functools.partial(jax.checkpoint, prevent_cse=False)
  fn = remat(fn)

  def one_chunk(_, chunk):
    part, part_mask = chunk
    nothing = lambda *part: jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, *part)
    )
    return None, jax.lax.cond(jnp.any(part_mask != 0), fn, nothing, *part)

  _, out = jax.lax.scan(remat(one_chunk), None, chunks)
  place = jnp.argsort(order, axis=1)
  out = jax.tree.map(lambda x: _take(_join(x), place), out)
  return _zero_masked(out, mask)


def _take(x: Shaped[Array, "B N ..."], index: Shaped[Array, "B M"]):
  index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def _split(x: Shaped[Array, "B N ..."], num_chunks: int, size: int):
  missing = num_chunks * size - x.shape[1]
  x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
  x = x.reshape(x.shape[0], num_chunks, size, *x.shape[2:])
  return jnp.swapaxes(x, 0, 1)


def _join(x: Shaped[Array, "chunks B n"]):
  return jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1)


def _zero_masked(tree: Any, mask: Shaped[Array, "B N"]) -> Any:
  return jax.tree.map(lambda x: masking.zero_masked(x, mask), tree)
