import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import masking, value
from tests.losses import ragged
from tests.reference import losses as reference

SHAPE = (ragged.BATCH, ragged.LENGTH)


@hypothesis.given(
    values=ragged.floats(SHAPE),
    old_values=ragged.floats(SHAPE),
    returns=ragged.floats(SHAPE),
    mask=ragged.masks(),
    junk=st.sampled_from(ragged.JUNK),
    cliprange_value=st.sampled_from([0.1, 0.5, 100.0]),
)
def test_losses_match_loops_over_ragged_rows(
    values, old_values, returns, mask, junk, cliprange_value
):
  m = jnp.asarray(mask)
  spoiled = [
      jnp.asarray(ragged.spoil(x, mask, junk))
      for x in (values, old_values, returns)
  ]
  rows = [ragged.rows(x, mask) for x in (values, old_values, returns)]
  clipped = [
      [
          reference.clipped_value(*entry, cliprange_value)
          for entry in zip(*row, strict=True)
      ]
      for row in zip(*rows, strict=True)
  ]
  plain = [
      [(v - r) ** 2 / 2 for v, r in zip(*row, strict=True)]
      for row in zip(rows[0], rows[2], strict=True)
  ]
  np.testing.assert_allclose(
      masking.masked_mean(
          value.clipped_value_loss(*spoiled, cliprange_value=cliprange_value), m
      ),
      reference.mean(clipped),
      rtol=1e-4,
      atol=1e-5,
  )
  np.testing.assert_allclose(
      masking.masked_mean(value.value_loss(spoiled[0], spoiled[2]), m),
      reference.mean(plain),
      rtol=1e-4,
      atol=1e-5,
  )


def test_a_wide_clip_is_no_clip():
  values = jnp.array([[1.0, -2.0]])
  returns = jnp.array([[0.0, 3.0]])
  clipped = value.clipped_value_loss(
      values, jnp.zeros((1, 2)), returns, cliprange_value=10.0
  )
  assert np.array_equal(clipped, value.value_loss(values, returns))


@pytest.mark.parametrize(
    "new, target, learns",
    [
        (0.1, 3.0, True),  # within the range
        (2.0, 3.0, False),  # moved far enough towards the target
        (-2.0, 3.0, True),  # moved away from it
        (2.0, -3.0, True),
    ],
)
def test_a_value_that_moved_far_towards_its_target_stops_learning(
    new, target, learns
):
  gradient = jax.grad(
      lambda v: value.clipped_value_loss(
          jnp.full((1, 1), v),
          jnp.zeros((1, 1)),
          jnp.full((1, 1), target),
          cliprange_value=0.2,
      ).sum()
  )(new)
  np.testing.assert_allclose(gradient, new - target if learns else 0, rtol=1e-6)


@pytest.mark.parametrize("junk", ragged.JUNK)
def test_masked_entries_reach_neither_mean_nor_gradient(junk):
  mask = jnp.array([[1, 0]])

  def mean(values, old_values, returns):
    safe = [masking.zero_masked(x, mask) for x in (values, old_values, returns)]
    return masking.masked_mean(
        value.clipped_value_loss(*safe, cliprange_value=0.2), mask
    )

  spoiled = jnp.array([[1.0, junk]])
  out, gradient = jax.value_and_grad(mean)(
      spoiled, 0.9 * spoiled, 3.0 * spoiled
  )
  np.testing.assert_allclose(out, 2.0, rtol=1e-6)
  assert gradient.tolist() == [[-2.0, 0.0]]


def test_bfloat16_gives_float32_and_extremes_stay_finite():
  big = jnp.full((1, 1), 1e4, jnp.bfloat16)
  loss = lambda v: value.clipped_value_loss(v, -v, -v, cliprange_value=0.2)
  assert loss(big).dtype == jnp.float32
  assert np.all(np.isfinite(loss(big)))
  gradient = jax.grad(lambda v: loss(v).sum())(big)
  assert np.all(np.isfinite(gradient.astype(jnp.float32)))
