"""Regression losses of the value function, per token.

Returns and old values are data: take no gradient through them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike


def value_loss(
    values: Float[Array, "B C"], returns: Float[Array, "B C"]
) -> Float[Array, "B C"]:
  """Half the squared error of the value.

  (V_t - R_t)^2 / 2

  Args:
    values: V_t, of the state before token t.
    returns: R_t, the regression target.

  Returns:
    float32, at least 0, unreduced.

  Reference: Schulman et al., arXiv 1707.06347, section 5.

  Differs: the factor 1/2.

  Example:
    >>> value_loss(jnp.array([[3.0]]), jnp.array([[1.0]])).tolist()
    [[2.0]]
  """
  error = values.astype(jnp.float32) - returns.astype(jnp.float32)
  return 0.5 * jnp.square(error)


def clipped_value_loss(
    values: Float[Array, "B C"],
    old_values: Float[Array, "B C"],
    returns: Float[Array, "B C"],
    *,
    cliprange_value: ScalarLike,
) -> Float[Array, "B C"]:
  """Half the larger squared error of the value and of the clipped value.

  max((V_t - R_t)^2, (V_old + clip(V_t - V_old, -c, c) - R_t)^2) / 2

  A value that moved more than c from the old one *towards* its target stops
  learning; one that moved away still does.

  Args:
    values: V_t, of the state before token t.
    old_values: the values when the rollout was scored.
    returns: R_t, the regression target.
    cliprange_value: c > 0, in units of the return.

  Returns:
    float32, at least 0, unreduced.

  Reference: Ziegler et al., arXiv 1909.08593 (code); Huang et al., The N+
  Implementation Details of RLHF with PPO, arXiv 2403.17031. Not in the PPO
  paper.

  Example:
    >>> new, old, target = jnp.array([[[2.0]], [[0.0]], [[3.0]]])
    >>> clipped_value_loss(new, old, target, cliprange_value=1.0).tolist()
    [[2.0]]
  """
  old_values = old_values.astype(jnp.float32)
  step = jnp.clip(
      values.astype(jnp.float32) - old_values,
      -cliprange_value,
      cliprange_value,
  )
  return jnp.maximum(
      value_loss(values, returns), value_loss(old_values + step, returns)
  )
