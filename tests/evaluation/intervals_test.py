"""Intervals against tables, loops and simulated coverage."""

import math
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from rlhf_jax.evaluation import intervals

# Two-sided 95% quantiles of Student's t, from a printed table.
T_95 = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 29: 2.045}

values_lists = st.lists(
    st.floats(-1e3, 1e3, allow_nan=False), min_size=2, max_size=30
)


def naive_bootstrap(values, groups, seed, num_samples, level):
  """One resample at a time, one group at a time."""
  names = sorted(set(groups))
  rng = np.random.default_rng(seed)
  means = []
  for _ in range(num_samples):
    total, count = 0.0, 0
    for index in rng.integers(len(names), size=len(names)):
      for value, group in zip(values, groups):
        if group == names[index]:
          total, count = total + value, count + 1
    means.append(total / count)
  means.sort()
  return [
      float(np.quantile(means, q)) for q in ((1 - level) / 2, (1 + level) / 2)
  ]


@pytest.mark.parametrize("freedom", sorted(T_95))
def test_mean_interval_matches_the_printed_t_table(freedom):
  values = np.random.default_rng(freedom).normal(size=freedom + 1)
  mean = sum(values) / len(values)
  variance = sum((v - mean) ** 2 for v in values) / freedom
  half = T_95[freedom] * math.sqrt(variance / len(values))
  got = intervals.mean_interval(values)
  assert got.mean == pytest.approx(mean)
  assert got.low == pytest.approx(mean - half, rel=1e-3, abs=1e-3)
  assert got.high == pytest.approx(mean + half, rel=1e-3, abs=1e-3)


def test_one_value_says_nothing_about_the_spread():
  got = intervals.mean_interval([3.0])
  assert got.mean == 3.0
  assert math.isnan(got.low) and math.isnan(got.high)
  got = intervals.bootstrap_interval([3.0, 4.0], seed=0, groups=[7, 7])
  assert got.mean == 3.5 and math.isnan(got.low)


@given(values_lists, st.floats(0.5, 0.98))
def test_intervals_hold_their_mean_and_grow_with_the_level(values, level):
  narrow = intervals.mean_interval(values, level=level)
  wide = intervals.mean_interval(values, level=level + 0.01)
  assert wide.low <= narrow.low <= narrow.mean <= narrow.high <= wide.high


@given(values_lists, st.floats(-10, 10), st.floats(0.1, 10))
def test_mean_interval_moves_and_stretches(values, shift, scale):
  plain = intervals.mean_interval(values)
  moved = intervals.mean_interval([scale * v + shift for v in values])
  assert moved.low == pytest.approx(scale * plain.low + shift, abs=1e-6)
  assert moved.high == pytest.approx(scale * plain.high + shift, abs=1e-6)


def test_t_interval_covers_as_often_as_it_says():
  rng = np.random.default_rng(0)
  samples = rng.normal(1.0, 2.0, size=(2000, 6))
  held = [
      got.low <= 1.0 <= got.high
      for got in map(intervals.mean_interval, samples)
  ]
  assert abs(np.mean(held) - 0.95) < 0.015


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)),
             min_size=3, max_size=12),
    st.integers(0, 100),
)
def test_bootstrap_matches_a_loop_over_groups(pairs, seed):
  values, groups = (list(each) for each in zip(*pairs))
  if len(set(groups)) < 2:
    groups[0], groups[1] = 5, 6
  got = intervals.bootstrap_interval(
      values, seed=seed, num_samples=40, level=0.9, groups=groups
  )
  low, high = naive_bootstrap(values, groups, seed, 40, 0.9)
  assert got.mean == pytest.approx(sum(values) / len(values))
  assert got.low == pytest.approx(low, abs=1e-9)
  assert got.high == pytest.approx(high, abs=1e-9)


def test_bootstrap_does_not_depend_on_how_its_draws_are_sliced(monkeypatch):
  values = np.random.default_rng(0).normal(size=20)
  whole = intervals.bootstrap_interval(values, seed=1)
  monkeypatch.setattr(intervals, "_SLICE", 70)
  assert intervals.bootstrap_interval(values, seed=1) == whole


def test_copies_within_a_group_are_not_taken_for_evidence():
  values = np.random.default_rng(0).normal(size=25)
  copies, groups = np.repeat(values, 10), np.repeat(np.arange(25), 10)
  width = lambda x: x.high - x.low
  once = intervals.bootstrap_interval(values, seed=0)
  fooled = intervals.bootstrap_interval(copies, seed=0)
  grouped = intervals.bootstrap_interval(copies, seed=0, groups=groups)
  assert width(grouped) == pytest.approx(width(once))
  assert width(fooled) < 0.5 * width(once)


@given(st.integers(1, 200), st.data())
def test_wilson_limits_solve_its_quadratic(total, data):
  successes = data.draw(st.integers(0, total))
  got = intervals.proportion_interval(successes, total)
  share = successes / total
  assert 0 <= got.low <= got.mean <= got.high <= 1
  for limit in (got.low, got.high):
    z2 = 1.959964**2
    if 0 < limit < 1:
      assert (share - limit) ** 2 == pytest.approx(
          z2 * limit * (1 - limit) / total, abs=1e-6
      )


def test_wilson_published_example():
  # 8 of 10 at 95%: Newcombe (1998) method 3.
  got = intervals.proportion_interval(8, 10)
  assert got.low == pytest.approx(0.4902, abs=1e-4)
  assert got.high == pytest.approx(0.9433, abs=1e-4)


@pytest.mark.parametrize("bad, match", [
    ([], "non-empty"),
    ([[1.0]], r"shape \(1, 1\)"),
    ([1.0, math.nan, math.inf], "2 of 3 are NaN or infinite.*index 1"),
])
def test_bad_values_are_named(bad, match):
  with pytest.raises(ValueError, match=match):
    intervals.mean_interval(bad)
  with pytest.raises(ValueError, match=match):
    intervals.bootstrap_interval(bad, seed=0)


def test_bad_arguments_are_named():
  with pytest.raises(ValueError, match="level"):
    intervals.mean_interval([1.0, 2.0], level=95)
  with pytest.raises(ValueError, match="groups"):
    intervals.bootstrap_interval([1.0, 2.0], seed=0, groups=[1])
  with pytest.raises(ValueError, match="successes 3"):
    intervals.proportion_interval(3, 2)


def test_format():
  assert f"{intervals.Interval(0.5, 0.25, 0.75):.2f}" == "0.50 [0.25, 0.75]"
  assert f"{intervals.Interval(0.5, math.nan, math.nan):.1f}" == "0.5"


def test_importing_intervals_does_not_load_matplotlib():
  code = (
      "import sys; from rlhf_jax.evaluation import intervals; "
      "assert 'matplotlib' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
