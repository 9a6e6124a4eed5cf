"""Sums, means and gathers over the real entries of padded arrays.

Every reduction replaces masked entries by zero with `where` *before* any
arithmetic, so padding may hold anything, NaN and Inf included, and leaks
neither into a value nor into a gradient. A product with the mask would not do:
`0 * nan` is `nan`.

A mask is 1 (or True) on real entries and has the shape of what it masks. It
may be bool, integer or 0/1 float; anything that is not zero counts as real.

The elementwise losses of this package take no mask: their inputs on padding are
expected to be finite. Pass them through `zero_masked` when they may not be, and
reduce the result with `masked_mean` or `masked_sum`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from rlhf_jax import collectives

Axis = int | tuple[int, ...] | None


def zero_masked(
    x: Shaped[Array, "*shape"], mask: Shaped[Array, "*shape"]
) -> Shaped[Array, "*shape"]:
  """x where the mask is set, 0 elsewhere; the dtype stays.

  Args:
    x: any array.
    mask: 1 on real entries.

  Returns:
    x with its masked entries replaced by zero; their gradient is zero too.

  Example:
    >>> zero_masked(jnp.array([1.0, jnp.nan]), jnp.array([1, 0])).tolist()
    [1.0, 0.0]
  """
  return jnp.where(mask.astype(bool), x, jnp.zeros_like(x))


def masked_sum(
    x: Shaped[Array, "*shape"],
    mask: Shaped[Array, "*shape"],
    axis: Axis = None,
) -> Float[Array, "..."]:
  """Sum of the real entries, in float32.

  sum_i m_i x_i

  Args:
    x: any numeric array.
    mask: 1 on real entries.
    axis: the axes to sum over; None is all of them.

  Returns:
    The sum over `axis`; 0 where nothing is real.

  Example:
    >>> float(masked_sum(jnp.array([1.0, 2.0, 9.0]), jnp.array([1, 1, 0])))
    3.0
  """
  return jnp.sum(zero_masked(x, mask).astype(jnp.float32), axis=axis)


def masked_mean(
    x: Shaped[Array, "*shape"],
    mask: Shaped[Array, "*shape"],
    axis: Axis = None,
) -> Float[Array, "..."]:
  """Mean of the real entries, in float32.

  sum_i m_i x_i / max(1, sum_i m_i)

  Args:
    x: any numeric array.
    mask: 1 on real entries.
    axis: the axes to average over; None is all of them, each entry with the
      same weight whatever row it is in and whatever device holds it.

  Returns:
    The mean over `axis`; 0 where nothing is real.

  Example:
    >>> float(masked_mean(jnp.array([1.0, 2.0, 9.0]), jnp.array([1, 1, 0])))
    1.5
  """
  total = masked_sum(x, mask, axis)
  count = jnp.sum(mask.astype(bool).astype(jnp.float32), axis=axis)
  if axis is None:
    total, count = collectives.sum_over_devices((total, count))
  return total / jnp.maximum(count, 1.0)


def masked_var(
    x: Shaped[Array, "*shape"], mask: Shaped[Array, "*shape"]
) -> Float[Array, ""]:
  """Biased variance of the real entries, in float32.

  sum_i m_i (x_i - mean)^2 / max(1, sum_i m_i)

  Args:
    x: any numeric array.
    mask: 1 on real entries.

  Returns:
    A scalar; 0 where fewer than two entries are real.

  Differs: divides by n, as TensorFlow's `moments` does in the original RLHF
  code, where torch's `var` divides by n - 1.

  Example:
    >>> float(masked_var(jnp.array([1.0, 3.0, 9.0]), jnp.array([1, 1, 0])))
    1.0
  """
  deviation = x.astype(jnp.float32) - masked_mean(x, mask)
  # Zeroed before the square: its derivative at a masked NaN would be NaN.
  return masked_mean(jnp.square(zero_masked(deviation, mask)), mask)


def masked_whiten(
    x: Shaped[Array, "*shape"],
    mask: Shaped[Array, "*shape"],
    *,
    shift_mean: bool = True,
    epsilon: float = 1e-8,
) -> Float[Array, "*shape"]:
  """Scales the real entries to variance 1 and, unless told not to, mean 0.

  (x_i - mean) / sqrt(var + epsilon) [+ mean if not shift_mean]

  Args:
    x: any numeric array, e.g. advantages or rewards, Float[B, C].
    mask: 1 on real entries.
    shift_mean: False keeps the mean (for rewards, whose mean has meaning).
    epsilon: added to the variance.

  Returns:
    float32 of x's shape; 0 on masked entries.

  Reference: Huang et al., The N+ Implementation Details of RLHF with PPO,
  arXiv 2403.17031; biased variance and kept mean as in the code of Ziegler et
  al., arXiv 1909.08593.

  Example:
    >>> masked_whiten(jnp.array([1.0, 3.0, 9.0]), jnp.array([1, 1, 0])).tolist()
    [-1.0, 1.0, 0.0]
  """
  mean = masked_mean(x, mask)
  scale = jax.lax.rsqrt(masked_var(x, mask) + epsilon)
  whitened = (zero_masked(x, mask).astype(jnp.float32) - mean) * scale
  if not shift_mean:
    whitened = whitened + mean
  return zero_masked(whitened, mask)


def last_index(mask: Shaped[Array, "*batch T"]) -> Int[Array, "*batch"]:
  """Index of the last real entry of each row, wherever the padding is.

  max {t : m_t != 0}

  Args:
    mask: 1 on real entries; padding may be on the left, the right or both.

  Returns:
    int32; 0 for a row with no real entry, as there is no better answer.

  Example:
    >>> last_index(jnp.array([[1, 1, 0], [0, 1, 1]])).tolist()
    [1, 2]
  """
  position = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
  return jnp.max(zero_masked(position, mask), axis=-1)


def gather_last(
    x: Shaped[Array, "*batch T"], mask: Shaped[Array, "*batch T"]
) -> Shaped[Array, "*batch"]:
  """The entry of each row at its last real position.

  x[last_index(mask)]

  Args:
    x: one entry a position, e.g. the outputs of a reward model's scalar head.
    mask: 1 on real entries; padding may be on the left, the right or both.

  Returns:
    One entry a row, in x's dtype; 0 for a row with no real entry.

  Example:
    >>> gather_last(jnp.array([[5.0, 7.0]]), jnp.array([[1, 0]])).tolist()
    [5.0]
  """
  index = last_index(mask)[..., None]
  return jnp.take_along_axis(zero_masked(x, mask), index, axis=-1)[..., 0]
