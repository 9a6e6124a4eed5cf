"""Discounted returns and advantages of right-padded episodes.

Time index: `rewards[:, t]` is what token t earned, `values[:, t]` the value of
the state before token t. An episode ends at its last real token; the state
after it has value 0, also when a length limit ended it. Real tokens of a row
are contiguous; whatever stands on padding is ignored.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike, Shaped

from rlhf_jax.losses.masking import zero_masked


def _discounted_sum(x: Array, mask: Array, discount: ScalarLike) -> Array:
  """y_t = m_t (x_t + discount * y_{t+1}) along axis 1, from the right."""

  def step(later, x_and_mask):
    x_t, mask_t = x_and_mask
    total = zero_masked(x_t + discount * later, mask_t)
    return total, total

  start = jnp.zeros_like(x[:, 0])
  _, total = jax.lax.scan(step, start, (x.T, mask.T), reverse=True)
  return total.T


def discounted_returns(
    rewards: Float[Array, "B C"],
    mask: Shaped[Array, "B C"],
    *,
    gamma: ScalarLike,
) -> Float[Array, "B C"]:
  """Discounted sum of the rewards from each token on: the Monte Carlo return.

  G_t = r_t + gamma G_{t+1}, 0 after the last real token

  Args:
    rewards: r_t, what token t earned.
    mask: 1 on real tokens.
    gamma: discount in [0, 1].

  Returns:
    float32; 0 on padding; unreduced.

  Reference: Sutton and Barto, Reinforcement Learning (2018), eq. 3.8.

  Differs: our r_t follows token t, the book's R_{t+1}.

  Example:
    >>> rewards, mask = jnp.array([[1.0, 2.0, 9.0]]), jnp.array([[1, 1, 0]])
    >>> discounted_returns(rewards, mask, gamma=0.5).tolist()
    [[2.0, 2.0, 0.0]]
  """
  rewards = zero_masked(rewards, mask).astype(jnp.float32)
  return _discounted_sum(rewards, mask, gamma)


def generalized_advantage_estimation(
    rewards: Float[Array, "B C"],
    values: Float[Array, "B C"],
    mask: Shaped[Array, "B C"],
    *,
    gamma: ScalarLike,
    gae_lambda: ScalarLike,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
  """Exponentially weighted advantages and the value targets that go with them.

  delta_t = r_t + gamma V_{t+1} - V_t
  A_t = delta_t + gamma gae_lambda A_{t+1}
  R_t = A_t + V_t

  gae_lambda = 1 is the Monte Carlo return less the value (unbiased, high
  variance); gae_lambda = 0 is the TD error (biased by the value, low variance).

  Args:
    rewards: r_t, what token t earned.
    values: V_t, of the state before token t; V is 0 after the last real token.
    mask: 1 on real tokens.
    gamma: discount in [0, 1].
    gae_lambda: in [0, 1].

  Returns:
    (advantages, returns), float32, 0 on padding, unreduced. Gradients are not
    stopped: call this outside of what is differentiated.

  Reference: Schulman et al., High-Dimensional Continuous Control Using
  Generalized Advantage Estimation, arXiv 1506.02438, eq. 16.

  Example:
    >>> r, v, mask = jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2), int)
    >>> a, g = generalized_advantage_estimation(
    ...     r, v, mask, gamma=1.0, gae_lambda=1.0)
    >>> a.tolist(), g.tolist()
    ([[1.0, 0.0]], [[2.0, 1.0]])
  """
  rewards = zero_masked(rewards, mask).astype(jnp.float32)
  values = zero_masked(values, mask).astype(jnp.float32)
  next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  delta = rewards + gamma * next_values - values
  advantages = _discounted_sum(delta, mask, gamma * gae_lambda)
  return advantages, zero_masked(advantages + values, mask)
