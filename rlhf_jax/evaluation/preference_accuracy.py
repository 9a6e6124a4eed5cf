"""How well a reward model predicts which of two completions people choose.

Everything is computed from margins: score of the chosen completion minus score
of the rejected one, one number a pair. A tie (margin 0) counts as half right.
"""

from collections.abc import Mapping, Sequence

from jaxtyping import Array, Float
import numpy as np

from rlhf_jax.evaluation import intervals


def accuracy(
    margins: Float[Array, "N"] | Float[np.ndarray, "N"],
    weights: Float[Array, "N"] | Float[np.ndarray, "N"] | None = None,
    *,
    level: float = 0.95,
) -> intervals.Interval:
  """Share of pairs in which the chosen completion scored higher.

  Args:
    margins: chosen minus rejected score, finite.
    weights: non-negative, not all 0; None weighs each pair once.
    level: of the Wilson interval. With weights it stands on Kish's effective
      number of pairs, (sum w)^2 / sum w^2.
  """
  margins = intervals.checked(margins, "margins")
  right = (margins > 0) + 0.5 * (margins == 0)
  if weights is None:
    weights = np.ones_like(right)
  weights = intervals.checked(weights, "weights")
  if weights.shape != margins.shape:
    raise ValueError(
        f"weights: got {weights.size} for {margins.size} margins"
    )
  if (weights < 0).any() or not weights.any():
    raise ValueError("weights: want none negative and at least one positive")
  # Scaled first: squares of tiny or huge weights would under- or overflow.
  weights = weights / weights.max()
  effective = weights.sum() ** 2 / (weights**2).sum()
  share = min(float((weights * right).sum() / weights.sum()), 1.0)
  return intervals.proportion_interval(
      share * effective, effective, level=level
  )


def calibration(
    margins: Float[Array, "N"] | Float[np.ndarray, "N"], num_bins: int = 10
) -> list[dict[str, float]]:
  """Is a stated probability of 80% right 80% of the time?

  Under Bradley-Terry the higher-scored side of a pair is chosen with
  probability sigmoid(|margin|). Pairs are binned by that number, in `num_bins`
  bins of equal width over [0.5, 1].

  Returns:
    For each bin that holds a pair, in order: `predicted` (mean of the stated
    probabilities), `observed` (share of pairs whose higher-scored side was
    chosen, ties half) and `count`.

  Reference: Guo et al. (2017), arXiv 1706.04599, section 2.
  """
  margins = intervals.checked(margins, "margins")
  if num_bins < 1:
    raise ValueError(f"num_bins: want at least 1, got {num_bins}")
  # exp of minus a magnitude cannot overflow.
  predicted = 1 / (1 + np.exp(-np.abs(margins)))
  right = (margins > 0) + 0.5 * (margins == 0)
  # A probability of 1 belongs to the last bin.
  index = np.minimum((2 * predicted - 1) * num_bins, num_bins - 1).astype(int)
  bins = []
  for i in range(num_bins):
    inside = index == i
    if inside.any():
      bins.append({
          "predicted": float(predicted[inside].mean()),
          "observed": float(right[inside].mean()),
          "count": int(inside.sum()),
      })
  return bins


def expected_calibration_error(bins: Sequence[Mapping[str, float]]) -> float:
  """Mean over pairs of |predicted - observed| of their bin; 0 is perfect.

  Biased upwards when bins hold few pairs: compare at equal numbers of pairs
  and bins only.

  Args:
    bins: of `calibration`.

  Reference: Guo et al. (2017), arXiv 1706.04599, equation 3.
  """
  total = sum(each["count"] for each in bins)
  return sum(
      each["count"] / total * abs(each["predicted"] - each["observed"])
      for each in bins
  )
