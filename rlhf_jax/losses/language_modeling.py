"""Log-probabilities, entropy and cross-entropy of a language model's logits.

`selected_logprobs` is the one log-probability of the library. The sampler, the
scoring of a rollout, the reference policy and the update all call it at the
same temperature, so that the probability ratio of an unchanged policy is 1.

Everything is computed in float32 whatever the dtype of the logits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike, Shaped


def selected_logprobs(
    logits: Float[Array, "*batch V"],
    ids: Int[Array, "*batch"],
    *,
    temperature: ScalarLike = 1.0,
) -> Float[Array, "*batch"]:
  """Log-probability of the given ids: log-softmax in float32, then a gather.

  log p(id) = l_id / tau - log sum_v exp(l_v / tau)

  Args:
    logits: any float dtype.
    ids: in [0, V), one for each distribution.
    temperature: tau > 0.

  Returns:
    float32 of the shape of ids, at most 0, unreduced.

  Reference: Ziegler et al., Fine-Tuning Language Models from Human Preferences,
  arXiv 1909.08593, whose code divides the logits by the sampling temperature
  wherever it computes a log-probability.

  Example:
    >>> logprobs = selected_logprobs(jnp.zeros((1, 2)), jnp.array([0]))
    >>> round(float(logprobs[0]), 4)
    -0.6931
  """
  selected, log_normalizer, _ = _log_softmax_parts(logits, ids, temperature)
  return selected - log_normalizer


def is_likeliest(
    logits: Float[Array, "*batch V"], ids: Int[Array, "*batch"]
) -> Bool[Array, "*batch"]:
  """Whether none of the V ids is likelier than the given one.

  Cheaper beside a log-probability than an argmax: it shares the maximum.

  Args:
    logits: any float dtype.
    ids: in [0, V), one for each distribution.

  Returns:
    bool of the shape of ids, unreduced; True for each of several that are
    equally likely.

  Example:
    >>> logits = jnp.array([[1.0, 3.0], [2.0, 2.0]])
    >>> is_likeliest(logits, jnp.array([0, 1])).tolist()
    [False, True]
  """
  return _log_softmax_parts(logits, ids, 1.0)[0] >= 0


def _log_softmax_parts(logits, ids, temperature):
  """(logit of the id, log sum exp), both less the maximum, and the maximum."""
  scaled = logits.astype(jnp.float32) / temperature
  # The maximum is subtracted before the gather: at logits around 1e4 a float32
  # log-sum-exp is exact to 1e-3 only. Gathering before the final subtraction
  # spares an array of the size of the logits.
  largest = jax.lax.stop_gradient(jnp.max(scaled, axis=-1, keepdims=True))
  shifted = scaled - largest
  log_normalizer = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))
  selected = jnp.take_along_axis(shifted, ids[..., None], axis=-1)[..., 0]
  return selected, log_normalizer, largest[..., 0]


def predictions_and_targets(
    predictions: Shaped[Array, "B N ..."], tokens: Int[Array, "B N"]
) -> tuple[Shaped[Array, "B N-1 ..."], Int[Array, "B N-1"]]:
  """What position i says, beside the token that follows it.

  The place where a text is shifted against itself. Completions need no shift:
  they begin at a static column, and so do the positions before them.

  Args:
    predictions: logits, or the hidden states that they are computed from;
      position i predicts token i + 1.
    tokens: in [0, V).

  Returns:
    predictions of all positions but the last, and all tokens but the first. A
    mask of tokens goes with them as mask[:, 1:].

  Example:
    >>> tokens = jnp.array([[5, 6, 7]])
    >>> predictions_and_targets(jnp.zeros((1, 3, 8)), tokens)[1].tolist()
    [[6, 7]]
  """
  return predictions[:, :-1], tokens[:, 1:]


def token_logprobs(
    logits: Float[Array, "B N V"],
    tokens: Int[Array, "B N"],
    *,
    temperature: ScalarLike = 1.0,
) -> Float[Array, "B N-1"]:
  """Log-probability of each token but the first, given those before it.

  out[:, i] = log p(tokens[:, i + 1] | tokens[:, :i + 1])

  Args:
    logits: position i predicts token i + 1.
    tokens: in [0, V).
    temperature: tau > 0.

  Returns:
    float32; entry i scores token i + 1, from position i; unreduced.

  Example:
    >>> token_logprobs(jnp.zeros((1, 3, 4)), jnp.array([[0, 1, 2]])).shape
    (1, 2)
  """
  return selected_logprobs(
      *predictions_and_targets(logits, tokens), temperature=temperature
  )


def entropy(
    logits: Float[Array, "*batch V"], *, temperature: ScalarLike = 1.0
) -> Float[Array, "*batch"]:
  """Entropy of each distribution, in nats.

  H = -sum_v p_v log p_v, with p = softmax(logits / tau) and 0 log 0 = 0

  Args:
    logits: any float dtype; -inf rules an id out.
    temperature: tau > 0.

  Returns:
    float32 in [0, log V], unreduced.

  Example:
    >>> round(float(jnp.exp(entropy(jnp.zeros((8,))))), 4)
    8.0
  """
  logprobs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
  probs = jnp.exp(logprobs)
  return -jnp.sum(probs * jnp.where(probs > 0, logprobs, 0.0), axis=-1)


def cross_entropy_loss(
    logits: Float[Array, "*batch V"],
    targets: Int[Array, "*batch"],
    *,
    z_loss_coef: ScalarLike = 0.0,
) -> Float[Array, "*batch"]:
  """Cross-entropy, optionally with the z-loss.

  -log p(target) + z_loss_coef * (log Z)^2

  Args:
    logits: any float dtype; of the position *before* each target, see
      `predictions_and_targets`.
    targets: in [0, V).
    z_loss_coef: at least 0; holds the softmax normaliser Z close to 1.

  Returns:
    float32 of the shape of targets, unreduced.

  Reference: z-loss: Chowdhery et al., PaLM, arXiv 2204.02311, section 5.

  Example:
    >>> loss = cross_entropy_loss(jnp.zeros((1, 4)), jnp.array([1]))
    >>> round(float(jnp.exp(loss)[0]), 4)
    4.0
  """
  selected, shifted, largest = _log_softmax_parts(logits, targets, 1.0)
  log_normalizer = shifted + largest
  return z_loss_coef * jnp.square(log_normalizer) - (selected - shifted)
