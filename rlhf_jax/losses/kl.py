"""Estimates of KL(policy || ref_policy) and the controller of its coefficient.

With x ~ policy and d = log policy(x) - log ref_policy(x):

  estimator  formula             bias          variance
  k1         d                   none          high, may be negative
  k2         d^2 / 2             some          low
  k3         exp(-d) - 1 + d     none          low, never negative
  exact      sum over the vocabulary           none, needs both logits

"Unbiased" is said of the value. As a loss whose gradient is taken through d,
k1 has a gradient of mean zero and k2 has that of the KL; as a penalty in the
reward, where no gradient passes, the table is what counts.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

# exp(20) = 5e8: far outside any trust region, and its square fits a float32.
MAX_LOG_RATIO = 20.0


def _log_ratio(logprobs: Array, ref_logprobs: Array) -> Array:
  return logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)


def kl_k1(
    logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
  """The log-ratio itself: unbiased, of high variance.

  k1 = log policy(x) - log ref_policy(x)

  Args:
    logprobs: of tokens sampled from the policy.
    ref_logprobs: of the same tokens under the reference policy.

  Returns:
    float32, any sign, unreduced.

  Reference: Ziegler et al., arXiv 1909.08593, eq. 2; named k1 by Schulman,
  Approximating KL Divergence (2020), joschu.net/blog/kl-approx.html.

  Example:
    >>> kl_k1(jnp.array([-1.0]), jnp.array([-1.5])).tolist()
    [0.5]
  """
  return _log_ratio(logprobs, ref_logprobs)


def kl_k2(
    logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
  """Half the squared log-ratio: biased, of low variance.

  k2 = (log policy(x) - log ref_policy(x))^2 / 2

  Args:
    logprobs: of tokens sampled from the policy.
    ref_logprobs: of the same tokens under the reference policy.

  Returns:
    float32, at least 0, unreduced.

  Reference: Schulman, Approximating KL Divergence (2020),
  joschu.net/blog/kl-approx.html.

  Example:
    >>> kl_k2(jnp.array([-1.0]), jnp.array([-1.5])).tolist()
    [0.125]
  """
  return 0.5 * jnp.square(_log_ratio(logprobs, ref_logprobs))


def kl_k3(
    logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
  """The log-ratio with a control variate: unbiased and never negative.

  k3 = exp(-d) - 1 + d,  d = log policy(x) - log ref_policy(x)

  Args:
    logprobs: of tokens sampled from the policy.
    ref_logprobs: of the same tokens under the reference policy.

  Returns:
    float32, at least 0 up to rounding, unreduced.

  Reference: Schulman, Approximating KL Divergence (2020),
  joschu.net/blog/kl-approx.html; Shao et al., DeepSeekMath, arXiv 2402.03300,
  eq. 4.

  Differs: d below -20 is held at -20 (with zero gradient), where the
  exponential would overflow.

  Example:
    >>> round(float(kl_k3(jnp.array([-1.0]), jnp.array([-1.5]))[0]), 4)
    0.1065
  """
  log_ratio = jnp.maximum(_log_ratio(logprobs, ref_logprobs), -MAX_LOG_RATIO)
  return jnp.expm1(-log_ratio) + log_ratio


def kl_exact(
    logits: Float[Array, "*batch V"],
    ref_logits: Float[Array, "*batch V"],
    *,
    temperature: ScalarLike = 1.0,
) -> Float[Array, "*batch"]:
  """KL divergence summed over the vocabulary: no sampling noise.

  KL = sum_v p_v (log p_v - log q_v), p and q the softmax of logits / tau

  Args:
    logits: of the policy.
    ref_logits: of the reference policy, same vocabulary.
    temperature: tau > 0, for both.

  Returns:
    float32, at least 0 up to rounding, unreduced.

  Reference: Kullback and Leibler, On Information and Sufficiency (1951).

  Example:
    >>> logits = jnp.log(jnp.array([0.75, 0.25]))
    >>> round(float(kl_exact(logits, jnp.zeros((2,)))), 4)
    0.1308
  """
  logprobs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  ref_logprobs = jax.nn.log_softmax(
      ref_logits.astype(jnp.float32) / temperature
  )
  probs = jnp.exp(logprobs)
  # 0 log 0 = 0, also for ids that both policies rule out with -inf.
  log_ratio = jnp.where(probs > 0, logprobs - ref_logprobs, 0.0)
  return jnp.sum(probs * log_ratio, axis=-1)


def adaptive_kl_coef(
    kl_coef: ScalarLike,
    kl: ScalarLike,
    *,
    target: ScalarLike,
    horizon: ScalarLike,
    num_episodes: ScalarLike,
) -> Float[Array, ""]:
  """Next coefficient of a proportional controller in log space.

  e = clip((kl - target) / target, -0.2, 0.2)
  kl_coef' = kl_coef * (1 + e * num_episodes / horizon)

  Args:
    kl_coef: the coefficient that was used, > 0.
    kl: the measured KL of a whole completion, mean over episodes, in nats.
    target: the KL to hold, > 0, same unit.
    horizon: episodes over which the controller acts; keep it well above
      num_episodes.
    num_episodes: completions that went into this measurement.

  Returns:
    float32 scalar.

  Reference: Ziegler et al., arXiv 1909.08593, section 2.2.

  Differs: the paper's gain K_beta = 0.1 is num_episodes / horizon, as in its
  code.

  Example:
    >>> run = dict(target=6, horizon=100, num_episodes=50)
    >>> round(float(adaptive_kl_coef(0.1, 9.0, **run)), 4)
    0.11
  """
  kl_coef, kl, target, horizon, num_episodes = (
      jnp.asarray(x, jnp.float32)
      for x in (kl_coef, kl, target, horizon, num_episodes)
  )
  error = jnp.clip((kl - target) / target, -0.2, 0.2)
  return kl_coef * (1.0 + error * num_episodes / horizon)
