"""Policy-gradient losses, per token.

Advantages and old log-probabilities are data: take no gradient through them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from rlhf_jax.losses.kl import MAX_LOG_RATIO


def policy_gradient_loss(
    logprobs: Float[Array, "B C"], advantages: Float[Array, "B C"]
) -> Float[Array, "B C"]:
  """The score-function loss (REINFORCE), whose gradient is the policy's.

  -advantage_t * log pi(a_t | s_t)

  Args:
    logprobs: of the sampled tokens under the policy being trained.
    advantages: of the same tokens.

  Returns:
    float32, unreduced.

  Reference: Williams, Simple Statistical Gradient-Following Algorithms (1992);
  Mnih et al., arXiv 1602.01783, section 4 (A3C).

  Differs: the sign, as this is minimised.

  Example:
    >>> policy_gradient_loss(jnp.array([[-0.5]]), jnp.array([[2.0]])).tolist()
    [[1.0]]
  """
  return -logprobs.astype(jnp.float32) * advantages.astype(jnp.float32)


def importance_ratio(
    logprobs: Float[Array, "*shape"], old_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
  """Probability of each token now over its probability when it was sampled.

  ratio_t = exp(log pi(a_t | s_t) - log pi_old(a_t | s_t))

  Args:
    logprobs: under the policy being trained.
    old_logprobs: under the policy that sampled.

  Returns:
    float32, at least 0, unreduced.

  Reference: Schulman et al., Proximal Policy Optimization Algorithms,
  arXiv 1707.06347, section 3.

  Differs: a log-ratio above 20 is held at 20 (with zero gradient), where the
  exponential would overflow and turn the gradient of a clipped token to NaN.

  Example:
    >>> importance_ratio(jnp.array([-1.0]), jnp.array([-1.0])).tolist()
    [1.0]
  """
  log_ratio = logprobs.astype(jnp.float32) - old_logprobs.astype(jnp.float32)
  return jnp.exp(jnp.minimum(log_ratio, MAX_LOG_RATIO))


def clipped_surrogate_loss(
    logprobs: Float[Array, "B C"],
    old_logprobs: Float[Array, "B C"],
    advantages: Float[Array, "B C"],
    *,
    cliprange: ScalarLike,
) -> Float[Array, "B C"]:
  """PPO's clipped surrogate: no gain from leaving the trust region.

  -min(ratio_t A_t, clip(ratio_t, 1 - cliprange, 1 + cliprange) A_t)

  Args:
    logprobs: of the sampled tokens under the policy being trained.
    old_logprobs: of the same tokens under the policy that sampled them.
    advantages: A_t.
    cliprange: the paper's epsilon, > 0.

  Returns:
    float32, unreduced.

  Reference: Schulman et al., Proximal Policy Optimization Algorithms,
  arXiv 1707.06347, eq. 7.

  Differs: the sign, as this is minimised; log-ratios are held at 20, see
  `importance_ratio`.

  Example:
    >>> zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    >>> clipped_surrogate_loss(one, zero, one, cliprange=0.25).tolist()
    [[-1.25]]
  """
  advantages = advantages.astype(jnp.float32)
  ratio = importance_ratio(logprobs, old_logprobs)
  clipped = jnp.clip(ratio, 1.0 - cliprange, 1.0 + cliprange)
  return -jnp.minimum(ratio * advantages, clipped * advantages)


def truncated_importance_weight(
    logprobs: Float[Array, "*shape"],
    behavior_logprobs: Float[Array, "*shape"],
    *,
    cap: ScalarLike,
) -> Float[Array, "*shape"]:
  """What a token counts that another policy has sampled, but no more than cap.

  min(pi(a_t | s_t) / mu(a_t | s_t), cap)

  Args:
    logprobs: under the policy pi that the loss is meant for.
    behavior_logprobs: under the policy mu that sampled.
    cap: > 0; the lower, the less variance and the more bias.

  Returns:
    float32, at least 0, unreduced; take no gradient through it.

  Reference: Espeholt et al., IMPALA, arXiv 1802.01561, section 4.1 (rho_t).

  Differs: nothing; both are of one token, not of the tokens before it.

  Example:
    >>> two = jnp.log(jnp.array([2.0, 0.5, 1.0]))
    >>> truncated_importance_weight(two, jnp.zeros(3), cap=1.5).tolist()
    [1.5, 0.5, 1.0]
  """
  return jnp.minimum(importance_ratio(logprobs, behavior_logprobs), cap)
