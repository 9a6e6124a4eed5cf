"""Means with the uncertainty that the number of samples leaves.

Which interval for what: `mean_interval` for a mean over independent values
(seeds, prompts with one completion each); `proportion_interval` for counts of
wins or of right answers; `bootstrap_interval` where the values are skewed or
come in groups that are not independent inside (several completions a prompt).
"""

import dataclasses

from jaxtyping import Array, Float, Int
import numpy as np
import scipy.special

# Bootstrap indices are drawn in slices of at most this many.
_SLICE = 1_000_000


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean and its confidence limits; NaN limits: too few samples for any."""

  mean: float
  low: float
  high: float

  def __format__(self, spec: str) -> str:
    """`f"{interval:.2f}"` is '0.81 [0.78, 0.84]', without limits '0.81'."""
    if not (np.isfinite(self.low) and np.isfinite(self.high)):
      return format(self.mean, spec)
    mean, low, high = (
        format(x, spec) for x in (self.mean, self.low, self.high)
    )
    return f"{mean} [{low}, {high}]"


def checked(values, name: str = "values") -> np.ndarray:
  """`values` as float64 [N], or a ValueError: empty, not 1-D or not finite."""
  array = np.asarray(values, np.float64)
  if array.ndim != 1 or array.size == 0:
    raise ValueError(
        f"{name}: want a non-empty 1-D array, got shape {array.shape}"
    )
  bad = np.flatnonzero(~np.isfinite(array))
  if bad.size:
    raise ValueError(
        f"{name}: {bad.size} of {array.size} are NaN or infinite, "
        f"the first at index {bad[0]}"
    )
  return array


def _check_level(level: float) -> None:
  if not 0 < level < 1:
    raise ValueError(f"level: want a number between 0 and 1, got {level}")


def mean_interval(
    values: Float[Array, "N"] | Float[np.ndarray, "N"], *, level: float = 0.95
) -> Interval:
  """Student's t interval for the mean of independent values.

  mean +- t_{(1+level)/2, N-1} * s / sqrt(N), s with the N - 1 denominator.

  Args:
    values: finite, any sequence of numbers.
    level: share of such intervals that would hold the true mean.

  Returns:
    The interval; with N = 1 its limits are NaN, since one value tells nothing
    about the spread.

  Reference: Student (1908), "The probable error of a mean".
  """
  values = checked(values)
  _check_level(level)
  mean = float(values.mean())
  if values.size == 1:
    return Interval(mean, float("nan"), float("nan"))
  quantile = scipy.special.stdtrit(values.size - 1, (1 + level) / 2)
  half = float(quantile * values.std(ddof=1) / np.sqrt(values.size))
  return Interval(mean, mean - half, mean + half)


def bootstrap_interval(
    values: Float[Array, "N"] | Float[np.ndarray, "N"],
    *,
    seed: int,
    num_samples: int = 2000,
    level: float = 0.95,
    groups: Int[Array, "N"] | Int[np.ndarray, "N"] | None = None,
) -> Interval:
  """Percentile bootstrap interval for the mean; groups are drawn whole.

  Args:
    values: finite numbers.
    seed: of the resampling; the same seed gives the same interval.
    num_samples: resamples.
    level: as in `mean_interval`.
    groups: a label for each value. Values of one group (the completions of one
      prompt) are kept together, so that their likeness is not mistaken for
      evidence. The mean stays the mean over values, not over groups.

  Returns:
    The interval; NaN limits if there is one value or one group only.

  Reference: Efron & Tibshirani (1993), "An introduction to the bootstrap",
    chapter 13; Cameron, Gelbach & Miller (2008) for whole groups.
  """
  values = checked(values)
  _check_level(level)
  if num_samples < 1:
    raise ValueError(f"num_samples: want at least 1, got {num_samples}")
  mean = float(values.mean())
  sums, counts = _group_sums(values, groups)
  if sums.size == 1:
    return Interval(mean, float("nan"), float("nan"))
  rng = np.random.default_rng(seed)
  means = np.empty(num_samples)
  stride = max(1, _SLICE // sums.size)
  for start in range(0, num_samples, stride):
    stop = min(start + stride, num_samples)
    drawn = rng.integers(sums.size, size=(stop - start, sums.size))
    means[start:stop] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
  low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
  return Interval(mean, float(low), float(high))


def group_means(
    values: np.ndarray, groups: Int[np.ndarray, "N"] | None
) -> np.ndarray:
  """The mean of each group's values; without groups, the values."""
  sums, counts = _group_sums(values, groups)
  return sums / counts


def _group_sums(values: np.ndarray, groups) -> tuple[np.ndarray, np.ndarray]:
  """Sum and count of the values of each group; without groups, of each."""
  if groups is None:
    return values, np.ones(values.size)
  groups = np.asarray(groups)
  if groups.shape != values.shape:
    raise ValueError(
        f"groups: want one label a value, got shape {groups.shape} for "
        f"{values.size} values"
    )
  _, index = np.unique(groups, return_inverse=True)
  return np.bincount(index, weights=values), np.bincount(index).astype(float)


def proportion_interval(
    successes: float, total: float, *, level: float = 0.95
) -> Interval:
  """Wilson's score interval for a proportion.

  Stays inside [0, 1] and is honest at 0 and at `total`, where the textbook
  interval has no width.

  Args:
    successes: in [0, total]; fractions are welcome (a tie counts half).
    total: more than 0; with weights, the effective number of samples.
    level: as in `mean_interval`.

  Reference: Wilson (1927), JASA 22(158).
  """
  _check_level(level)
  if not (total > 0 and 0 <= successes <= total and np.isfinite(total)):
    raise ValueError(
        f"want 0 <= successes <= total and total > 0, got successes "
        f"{successes} and total {total}"
    )
  z2 = float(scipy.special.ndtri((1 + level) / 2)) ** 2
  share = successes / total
  center = (share + z2 / (2 * total)) / (1 + z2 / total)
  half = np.sqrt(
      z2 * (share * (1 - share) / total + z2 / (4 * total**2))
  ) / (1 + z2 / total)
  # Rounding must not push a limit past the share itself or out of [0, 1].
  return Interval(
      float(share),
      float(min(max(center - half, 0.0), share)),
      float(max(min(center + half, 1.0), share)),
  )
