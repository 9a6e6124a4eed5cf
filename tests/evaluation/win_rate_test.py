"""Paired comparisons of two policies."""

import math

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from rlhf_jax.evaluation import intervals, win_rate

pairs = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=40
)


@given(pairs)
def test_win_rate_matches_a_loop(scores):
  win = tie = loss = 0
  for a, b in scores:
    win, tie, loss = win + (a > b), tie + (a == b), loss + (a < b)
  a, b = zip(*scores)
  got = win_rate.win_rate(a, b, seed=0)
  for name, count in (("win", win), ("tie", tie), ("loss", loss)):
    assert got[name] == pytest.approx(count / len(scores))
  assert got["interval"].mean == pytest.approx((win + tie / 2) / len(scores))
  points = [(x > y) + 0.5 * (x == y) for x, y in scores]
  wanted = intervals.bootstrap_interval(points, seed=0)
  np.testing.assert_equal(
      (got["interval"].low, got["interval"].high), (wanted.low, wanted.high)
  )
  assert win_rate.win_rate(b, a, seed=0)["win"] == got["loss"]


def test_pairing_sees_through_the_spread_of_prompts():
  rng = np.random.default_rng(0)
  prompts = rng.normal(0, 10, size=50)
  better = prompts + 0.5 + rng.normal(0, 0.1, size=50)
  got = win_rate.paired_difference(better, prompts, seed=0)
  assert got.low > 0.4 and got.high < 0.6


def naive_least_squares(gap, difference):
  """Normal equations of difference = intercept + slope * gap, by loops."""
  n, sx, sy, sxx, sxy = len(gap), 0.0, 0.0, 0.0, 0.0
  for x, y in zip(gap, difference):
    sx, sy, sxx, sxy = sx + x, sy + y, sxx + x * x, sxy + x * y
  determinant = n * sxx - sx * sx
  intercept = (sxx * sy - sx * sxy) / determinant
  slope = (n * sxy - sx * sy) / determinant
  residual = sum(
      (y - intercept - slope * x) ** 2 for x, y in zip(gap, difference)
  )
  return intercept, math.sqrt(residual / (n - 2) * sxx / determinant)


def test_length_control_matches_the_normal_equations():
  rng = np.random.default_rng(1)
  lengths_a, lengths_b = rng.integers(5, 60, size=(2, 11))
  scores_a, scores_b = rng.normal(size=(2, 11))
  got = win_rate.length_controlled_difference(
      scores_a, scores_b, lengths_a, lengths_b
  )
  intercept, error = naive_least_squares(
      list(lengths_a - lengths_b), list(scores_a - scores_b)
  )
  assert got.mean == pytest.approx(intercept)
  # 2.262: Student's t, 9 degrees of freedom, from a printed table.
  assert got.high - got.mean == pytest.approx(2.262 * error, rel=1e-3)
  assert got.mean - got.low == pytest.approx(2.262 * error, rel=1e-3)


def test_length_control_counts_a_repeated_prompt_once():
  rng = np.random.default_rng(2)
  scores, lengths = rng.normal(size=(2, 9)), rng.integers(5, 60, size=(2, 9))
  once = win_rate.length_controlled_difference(*scores, *lengths)
  three = win_rate.length_controlled_difference(
      *np.tile(scores, 3), *np.tile(lengths, 3), groups=np.tile(range(9), 3)
  )
  np.testing.assert_allclose(
      (once.mean, once.low, once.high), (three.mean, three.low, three.high)
  )


def test_a_gain_bought_with_length_does_not_survive_length_control():
  rng = np.random.default_rng(0)
  lengths_b = rng.integers(10, 30, size=80)
  lengths_a = lengths_b + rng.integers(0, 40, size=80)
  noise = rng.normal(0, 0.1, size=(2, 80))
  bought = (0.05 * lengths_a + noise[0], 0.05 * lengths_b + noise[1])
  assert win_rate.paired_difference(*bought, seed=0).low > 0.5
  got = win_rate.length_controlled_difference(*bought, lengths_a, lengths_b)
  assert got.low < 0 < got.high
  honest = (bought[0] + 1.0, bought[1])
  got = win_rate.length_controlled_difference(*honest, lengths_a, lengths_b)
  assert got.low < 1 < got.high and got.low > 0.8


def test_lengths_that_cannot_be_told_apart_from_the_policies():
  same = win_rate.length_controlled_difference([1, 2], [0, 0], [5, 6], [5, 6])
  assert same.mean == 1.5
  shifted = win_rate.length_controlled_difference(
      [1, 2], [0, 0], [9, 9], [5, 5]
  )
  assert math.isnan(shifted.mean)
  two = win_rate.length_controlled_difference([1, 2], [0, 0], [9, 7], [5, 5])
  assert two.mean == pytest.approx(3.0) and math.isnan(two.low)


def test_unpaired_scores_are_refused():
  with pytest.raises(ValueError, match="got 2 and 1"):
    win_rate.win_rate([1.0, 2.0], [1.0], seed=0)
  with pytest.raises(ValueError, match="2 scores but 3 lengths"):
    win_rate.length_controlled_difference([1, 2], [1, 2], [1, 2, 3], [1, 2, 3])
  with pytest.raises(ValueError, match="b: 1 of 2 are NaN"):
    win_rate.win_rate([1.0, 2.0], [1.0, math.nan], seed=0)
