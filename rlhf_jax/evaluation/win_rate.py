"""Two policies on the same prompts: how often, and by how much, one is better.

Scores are paired by prompt: index i of both arrays is the same prompt. Pairing
removes the spread between easy and hard prompts from the comparison. A prompt
that occurs several times is one group: what is drawn for the intervals is
groups.
"""

from jaxtyping import Array, Float, Int
import numpy as np
import scipy.special

from rlhf_jax.evaluation import intervals


def win_rate(
    scores_a: Float[Array, "N"] | Float[np.ndarray, "N"],
    scores_b: Float[Array, "N"] | Float[np.ndarray, "N"],
    *,
    seed: int,
    groups: Int[np.ndarray, "N"] | None = None,
    level: float = 0.95,
) -> dict[str, float | intervals.Interval]:
  """Shares of prompts on which `a` scored higher, equal and lower than `b`.

  Returns:
    `win`, `tie`, `loss` (they sum to 1) and `interval`: the bootstrap interval
    of the win rate with ties counted half, win + tie / 2.
  """
  a, b = _paired(scores_a, scores_b)
  return {
      "win": float((a > b).mean()),
      "tie": float((a == b).mean()),
      "loss": float((a < b).mean()),
      "interval": intervals.bootstrap_interval(
          (a > b) + 0.5 * (a == b), seed=seed, groups=groups, level=level
      ),
  }


def paired_difference(
    scores_a: Float[Array, "N"] | Float[np.ndarray, "N"],
    scores_b: Float[Array, "N"] | Float[np.ndarray, "N"],
    *,
    seed: int,
    groups: Int[np.ndarray, "N"] | None = None,
    level: float = 0.95,
) -> intervals.Interval:
  """Mean of a - b with its bootstrap interval over prompts."""
  a, b = _paired(scores_a, scores_b)
  return intervals.bootstrap_interval(
      a - b, seed=seed, groups=groups, level=level
  )


def length_controlled_difference(
    scores_a: Float[Array, "N"] | Float[np.ndarray, "N"],
    scores_b: Float[Array, "N"] | Float[np.ndarray, "N"],
    lengths_a: Float[Array, "N"] | Float[np.ndarray, "N"],
    lengths_b: Float[Array, "N"] | Float[np.ndarray, "N"],
    *,
    groups: Int[np.ndarray, "N"] | None = None,
    level: float = 0.95,
) -> intervals.Interval:
  """Mean of a - b that is left when both completions are equally long.

  The intercept of a least-squares fit, with N - 2 degrees of freedom, of
  (score_a - score_b) on (length_a - length_b). An honest gain survives it; a
  gain that was bought with length does not. A group counts once, by its mean.

  Returns:
    The interval. Lengths that always differ by the same amount cannot be told
    from the difference itself: if that amount is not 0, all three numbers are
    NaN. N = 2 leaves no freedom: NaN limits.

  Reference: the idea of Dubois et al. (2024), arXiv 2404.04475, with a linear
    model of scores in place of a logistic one of wins.
  """
  a, b = _paired(scores_a, scores_b)
  longer_a, longer_b = _paired(lengths_a, lengths_b)
  if longer_a.size != a.size:
    raise ValueError(f"got {a.size} scores but {longer_a.size} lengths")
  gap, difference = (
      intervals.group_means(x, groups) for x in (longer_a - longer_b, a - b)
  )
  size = gap.size
  if gap.min() == gap.max():
    if gap[0] == 0.0:
      return intervals.mean_interval(difference, level=level)
    return intervals.Interval(float("nan"), float("nan"), float("nan"))
  spread = float(((gap - gap.mean()) ** 2).sum())
  slope = float(((gap - gap.mean()) * difference).sum()) / spread
  intercept = float(difference.mean() - slope * gap.mean())
  if size == 2:
    return intervals.Interval(intercept, float("nan"), float("nan"))
  residual = difference - intercept - slope * gap
  variance = float((residual**2).sum()) / (size - 2)
  error = np.sqrt(variance * (1 / size + gap.mean() ** 2 / spread))
  half = float(scipy.special.stdtrit(size - 2, (1 + level) / 2) * error)
  return intervals.Interval(intercept, intercept - half, intercept + half)


def _paired(a, b) -> tuple[np.ndarray, np.ndarray]:
  a, b = intervals.checked(a, "a"), intervals.checked(b, "b")
  if a.size != b.size:
    raise ValueError(
        f"paired by prompt: want as many values of a as of b, got {a.size} "
        f"and {b.size}"
    )
  return a, b
