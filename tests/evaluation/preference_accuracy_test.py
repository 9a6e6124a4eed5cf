"""Accuracy and calibration of margins against loops."""

import math

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from rlhf_jax.evaluation import preference_accuracy

margin_lists = st.lists(
    st.one_of(st.just(0.0), st.floats(-8, 8), st.sampled_from([-900.0, 900.0])),
    min_size=1, max_size=40,
)


@given(margin_lists, st.data())
def test_accuracy_matches_a_loop_with_ties_half(margins, data):
  weights = data.draw(
      st.lists(st.floats(0.01, 10), min_size=len(margins),
               max_size=len(margins))
  )
  right = total = 0.0
  for margin, weight in zip(margins, weights):
    total += weight
    if margin > 0:
      right += weight
    elif margin == 0:
      right += weight / 2
  got = preference_accuracy.accuracy(margins, weights)
  assert got.mean == pytest.approx(right / total)
  assert got.low <= got.mean <= got.high


def test_weights_widen_the_interval_and_zero_weights_drop_pairs():
  margins = [1.0, 1.0, -1.0, 1.0] * 10
  plain = preference_accuracy.accuracy(margins)
  assert preference_accuracy.accuracy(margins, [3.0] * 40).low == (
      pytest.approx(plain.low)
  )
  uneven = preference_accuracy.accuracy(margins, [1.0] * 36 + [20.0] * 4)
  assert uneven.high - uneven.low > 1.5 * (plain.high - plain.low)
  kept = preference_accuracy.accuracy(
      margins + [-1.0] * 9, [1.0] * 40 + [0.0] * 9
  )
  assert kept.low == pytest.approx(plain.low)


def test_swapping_every_pair_mirrors_the_accuracy():
  margins = np.array([0.3, -2.0, 0.0, 1.0, 4.0])
  got = preference_accuracy.accuracy(margins)
  mirrored = preference_accuracy.accuracy(-margins)
  assert got.mean == pytest.approx(1 - mirrored.mean)
  assert got.low == pytest.approx(1 - mirrored.high)


@given(margin_lists, st.integers(1, 12))
def test_calibration_matches_a_loop(margins, num_bins):
  expected = {}
  for margin in margins:
    probability = 1 / (1 + math.exp(-abs(margin)))
    place = min(int((2 * probability - 1) * num_bins), num_bins - 1)
    hit = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
    expected.setdefault(place, []).append((probability, hit))
  bins = preference_accuracy.calibration(margins, num_bins)
  assert len(bins) == len(expected)
  error = 0.0
  for place, got in zip(sorted(expected), bins):
    inside = expected[place]
    predicted = sum(p for p, _ in inside) / len(inside)
    observed = sum(hit for _, hit in inside) / len(inside)
    assert got["count"] == len(inside)
    assert got["predicted"] == pytest.approx(predicted)
    assert got["observed"] == pytest.approx(observed)
    error += len(inside) * abs(predicted - observed)
  assert preference_accuracy.expected_calibration_error(bins) == (
      pytest.approx(error / len(margins))
  )


def test_choices_drawn_from_the_model_are_calibrated():
  rng = np.random.default_rng(0)
  scale = np.abs(rng.normal(0, 2, size=20_000))
  chosen = rng.random(scale.size) < 1 / (1 + np.exp(-scale))
  margins = np.where(chosen, scale, -scale)
  error = lambda margins: preference_accuracy.expected_calibration_error(
      preference_accuracy.calibration(margins)
  )
  assert error(margins) < 0.02
  # Scores twice as sharp as the truth claim too much.
  assert error(2 * margins) > 0.05


@pytest.mark.parametrize("weights, match", [
    ([1.0], "got 1 for 2"),
    ([1.0, -1.0], "negative"),
    ([0.0, 0.0], "at least one positive"),
])
def test_bad_weights_are_named(weights, match):
  with pytest.raises(ValueError, match=match):
    preference_accuracy.accuracy([1.0, 2.0], weights)


def test_nan_margins_are_refused_not_counted_as_losses():
  with pytest.raises(ValueError, match="margins: 1 of 2 are NaN"):
    preference_accuracy.accuracy([1.0, math.nan])
  with pytest.raises(ValueError, match="num_bins"):
    preference_accuracy.calibration([1.0], 0)
