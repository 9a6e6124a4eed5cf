"""Losses of a reward model on comparisons and rankings, per row.

A model of choice turns scores into the probability of what the annotator said;
each loss is the negative logarithm of it. Only differences of scores within a
row matter: adding a constant to a row changes nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from rlhf_jax.losses.masking import masked_mean, masked_sum, zero_masked


def bradley_terry_loss(
    chosen_scores: Float[Array, "B"],
    rejected_scores: Float[Array, "B"],
    *,
    margin: Float[Array, "B"] | ScalarLike = 0.0,
    label_smoothing: ScalarLike = 0.0,
) -> Float[Array, "B"]:
  """Negative log-likelihood of a comparison under Bradley-Terry.

  d = chosen - rejected - margin
  -(1 - e) log sigmoid(d) - e log sigmoid(-d), e = label_smoothing

  Args:
    chosen_scores: scores of the preferred completions.
    rejected_scores: scores of the others.
    margin: how much better the chosen one should score, at least 0.
    label_smoothing: the share of labels believed to be wrong, in [0, 0.5).

  Returns:
    float32, at least 0, log 2 for equal scores without margin; unreduced.

  Reference: Bradley and Terry (1952); Ouyang et al., InstructGPT,
  arXiv 2203.02155, eq. 1 for K = 2. Margin: Touvron et al., Llama 2,
  arXiv 2307.09288, eq. 2. Label smoothing: Mitchell, A Note on DPO with Noisy
  Preferences (2023).

  Example:
    >>> loss = bradley_terry_loss(jnp.array([2.0]), jnp.array([2.0]))
    >>> jnp.exp(loss).tolist()
    [2.0]
  """
  difference = chosen_scores.astype(jnp.float32) - rejected_scores.astype(
      jnp.float32
  )
  difference = difference - margin
  # log sigmoid(d) = -softplus(-d), without overflow for any d.
  right = jax.nn.softplus(-difference)
  wrong = jax.nn.softplus(difference)
  return (1.0 - label_smoothing) * right + label_smoothing * wrong


def pairwise_ranking_loss(
    scores: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    valid: Bool[Array, "B K"],
) -> Float[Array, "B"]:
  """Mean Bradley-Terry loss over the ordered pairs of a ranking.

  mean over {(i, j) : rank_i < rank_j} of -log sigmoid(s_i - s_j)

  Args:
    scores: one for each of K completions.
    ranks: smaller is better, equal is a tie.
    valid: False for what fills a shorter ranking up to K.

  Returns:
    float32, at least 0; 0 for a row without an ordered pair; unreduced.

  Reference: Ouyang et al., InstructGPT, arXiv 2203.02155, eq. 1, where all
  pairs of one ranking are one element of the batch.

  Differs: the mean is over the pairs that are ordered (K choose 2 without
  ties); tied pairs are skipped.

  Example:
    >>> s, ranks = jnp.zeros((1, 3)), jnp.array([[2, 1, 1]])
    >>> loss = pairwise_ranking_loss(s, ranks, jnp.ones((1, 3), bool))
    >>> jnp.exp(loss).tolist()
    [2.0]
  """
  scores = zero_masked(scores, valid).astype(jnp.float32)
  valid = valid.astype(bool)
  ordered = ranks[:, :, None] < ranks[:, None, :]
  ordered = ordered & valid[:, :, None] & valid[:, None, :]
  difference = scores[:, :, None] - scores[:, None, :]
  return masked_mean(jax.nn.softplus(-difference), ordered, axis=(1, 2))


def plackett_luce_loss(
    scores: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    valid: Bool[Array, "B K"],
) -> Float[Array, "B"]:
  """Negative log-likelihood of a ranking under Plackett-Luce.

  sum_i [log sum_{j : rank_j >= rank_i} exp(s_j) - s_i]

  The best is chosen from all, the second from the rest, and so on. Ties are
  Breslow's: each of several tied completions is chosen from all that are not
  better, the other tied ones included, so a tie is best met by equal scores.

  Args:
    scores: one for each of K completions.
    ranks: smaller is better, equal is a tie.
    valid: False for what fills a shorter ranking up to K.

  Returns:
    float32, at least 0 up to rounding; 0 for a row of fewer than two
    completions; a sum over the row, so it grows with K; unreduced.

  Reference: Plackett, The Analysis of Permutations (1975); Luce (1959); ties:
  Breslow (1974), as in Cox regression.

  Differs: for two completions it is `bradley_terry_loss`, without margin.

  Example:
    >>> s, ranks = jnp.zeros((1, 3)), jnp.array([[2, 0, 1]])
    >>> loss = plackett_luce_loss(s, ranks, jnp.ones((1, 3), bool))
    >>> round(float(jnp.exp(loss)[0]), 4)
    6.0
  """
  num = scores.shape[1]
  scores = zero_masked(scores, valid).astype(jnp.float32)
  valid = valid.astype(bool)
  at_choice = ranks[:, None, :] >= ranks[:, :, None]
  # Each completion stays in its own choice, also an invalid one, so that no
  # log-sum-exp is over nothing.
  at_choice = (at_choice & valid[:, None, :]) | jnp.eye(num, dtype=bool)[None]
  log_normalizer = jax.nn.logsumexp(
      jnp.broadcast_to(scores[:, None, :], at_choice.shape),
      axis=-1,
      where=at_choice,
  )
  return masked_sum(log_normalizer - scores, valid, axis=1)


def best_of_k_loss(
    scores: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    valid: Bool[Array, "B K"],
) -> Float[Array, "B"]:
  """Negative log-likelihood of the pick of the best of K completions.

  -log (sum_{i best} exp(s_i) / sum_i exp(s_i))

  Args:
    scores: one for each of K completions.
    ranks: the smallest is the pick; how the others are ranked does not matter.
      Of several smallest, it was one or another.
    valid: False for what fills a shorter ranking up to K.

  Returns:
    float32, at least 0, log K for equal scores; 0 for a row that is one tie or
    has no valid completion; unreduced.

  Reference: Ziegler et al., Fine-Tuning Language Models from Human Preferences,
  arXiv 1909.08593, eq. 1.

  Differs: the sign, as this is minimised.

  Example:
    >>> ranks, valid = jnp.array([[1, 1, 1, 0]]), jnp.ones((1, 4), bool)
    >>> loss = best_of_k_loss(jnp.zeros((1, 4)), ranks, valid)
    >>> round(float(jnp.exp(loss)[0]), 4)
    4.0
  """
  scores = zero_masked(scores, valid).astype(jnp.float32)
  valid = valid.astype(bool)
  largest = jnp.iinfo(ranks.dtype).max
  first = jnp.min(ranks, axis=1, keepdims=True, where=valid, initial=largest)
  # In a row of nothing valid all count, so that no log-sum-exp is over nothing.
  counted = valid | ~valid.any(axis=1, keepdims=True)
  best = counted & ((ranks == first) | ~valid)
  total, picked = (
      jax.nn.logsumexp(scores, axis=1, where=where) for where in (counted, best)
  )
  return total - picked
