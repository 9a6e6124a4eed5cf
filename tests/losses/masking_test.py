import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import masking
from tests.losses import ragged
from tests.reference import losses as reference

SHAPE = (ragged.BATCH, ragged.LENGTH)
REDUCTIONS = {
    "sum": masking.masked_sum,
    "mean": masking.masked_mean,
    "var": masking.masked_var,
    "whiten": masking.masked_whiten,
    "whiten_keep": lambda x, m: masking.masked_whiten(x, m, shift_mean=False),
    "gather_last": masking.gather_last,
}


@hypothesis.given(
    x=ragged.floats(SHAPE),
    mask=ragged.masks(side="any"),
    junk=st.sampled_from(ragged.JUNK),
)
def test_reductions_match_loops_over_ragged_rows(x, mask, junk):
  spoiled = jnp.asarray(ragged.spoil(x, mask, junk))
  real = ragged.rows(x, mask)
  total = sum(v for row in real for v in row)
  for dtype in (jnp.int32, jnp.bool_, jnp.float32):
    m = jnp.asarray(mask).astype(dtype)
    np.testing.assert_allclose(masking.masked_sum(spoiled, m), total, atol=1e-5)
    np.testing.assert_allclose(
        masking.masked_mean(spoiled, m), reference.mean(real), atol=1e-5
    )
    np.testing.assert_allclose(
        masking.masked_var(spoiled, m), reference.var(real), atol=1e-4
    )
  np.testing.assert_allclose(
      masking.masked_mean(spoiled, m, axis=1),
      [reference.mean([row]) for row in real],
      atol=1e-5,
  )


@hypothesis.given(
    x=ragged.floats(SHAPE),
    mask=ragged.masks(side="any"),
    junk=st.sampled_from(ragged.JUNK),
    shift_mean=st.booleans(),
)
def test_whiten_matches_loops_over_ragged_rows(x, mask, junk, shift_mean):
  out = masking.masked_whiten(
      jnp.asarray(ragged.spoil(x, mask, junk)),
      jnp.asarray(mask),
      shift_mean=shift_mean,
      epsilon=1e-2,
  )
  expected = reference.whiten(ragged.rows(x, mask), shift_mean, 1e-2)
  np.testing.assert_allclose(out, ragged.pad(expected, mask), atol=2e-4)
  assert np.all(np.asarray(out)[mask == 0] == 0)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("junk", ragged.JUNK)
def test_junk_on_padding_reaches_neither_value_nor_gradient(name, junk):
  mask = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]], np.int32)
  x = np.arange(9, dtype=np.float32).reshape(3, 3)

  def run(x):
    out = REDUCTIONS[name](x, jnp.asarray(mask))
    # Unequal weights: the plain sum of whitened entries has no gradient.
    weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
    return jnp.sum(out * weight.reshape(out.shape))

  clean, clean_gradient = jax.value_and_grad(run)(jnp.asarray(x))
  value, gradient = jax.value_and_grad(run)(
      jnp.asarray(ragged.spoil(x, mask, junk))
  )
  assert np.isfinite(value)
  assert np.array_equal(value, clean)
  assert np.all(np.isfinite(gradient))
  assert np.array_equal(gradient, clean_gradient)
  assert np.all(np.asarray(gradient)[mask == 0] == 0)


def test_mask_equals_subset():
  rng = np.random.default_rng(0)
  x = rng.normal(size=12).astype(np.float32)
  mask = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0])
  subset = x[mask == 1]
  m = jnp.asarray(mask)
  np.testing.assert_allclose(
      masking.masked_mean(jnp.asarray(x), m), subset.mean(), rtol=1e-6
  )
  np.testing.assert_allclose(
      masking.masked_var(jnp.asarray(x), m), subset.var(), rtol=1e-6
  )
  np.testing.assert_allclose(
      np.asarray(masking.masked_whiten(jnp.asarray(x), m))[mask == 1],
      (subset - subset.mean()) / subset.std(),
      rtol=1e-5,
  )


@pytest.mark.parametrize("name", REDUCTIONS)
def test_nothing_real_gives_zero(name):
  x = jnp.full((2, 3), jnp.nan)
  mask = jnp.zeros((2, 3), jnp.int32)
  assert np.all(np.asarray(REDUCTIONS[name](x, mask)) == 0)


def test_whitening_a_constant_gives_finite_zeros():
  x = jnp.full((2, 3), 7.0)
  mask = jnp.ones((2, 3), jnp.int32)
  gradient = jax.grad(lambda x: jnp.sum(masking.masked_whiten(x, mask)))(x)
  assert np.all(np.asarray(masking.masked_whiten(x, mask)) == 0)
  assert np.all(np.isfinite(gradient))


def test_whitening_rewards_keeps_their_mean():
  x = jnp.array([[1.0, 5.0, 9.0]])
  mask = jnp.ones((1, 3), jnp.int32)
  kept = masking.masked_whiten(x, mask, shift_mean=False)
  np.testing.assert_allclose(masking.masked_mean(kept, mask), 5.0, rtol=1e-6)
  np.testing.assert_allclose(masking.masked_var(kept, mask), 1.0, rtol=1e-6)


@hypothesis.given(mask=ragged.masks(side="any"))
def test_last_index_is_that_of_a_loop(mask):
  expected = [
      max([t for t, m in enumerate(row) if m], default=0) for row in mask
  ]
  index = masking.last_index(jnp.asarray(mask))
  assert index.dtype == jnp.int32
  assert index.tolist() == expected
  assert masking.last_index(jnp.asarray(mask != 0)).tolist() == expected


@hypothesis.given(
    row=ragged.floats((ragged.LENGTH,)),
    n=st.integers(1, ragged.LENGTH),
    left=st.integers(0, 8),
)
def test_score_does_not_depend_on_padding_side_or_amount(row, n, left):
  padded = np.full((1, 1, 13), np.nan, np.float32)
  mask = np.zeros((1, 1, 13), np.int32)
  padded[..., left : left + n] = row[:n]
  mask[..., left : left + n] = 1
  score = masking.gather_last(jnp.asarray(padded), jnp.asarray(mask))
  assert score.shape == (1, 1)
  assert score[0, 0] == row[n - 1]


def test_low_precision_and_integers_are_reduced_in_float32():
  mask = jnp.ones((300,), jnp.int32)
  ones = jnp.ones((300,), jnp.bfloat16)
  assert masking.masked_sum(ones, mask) == 300  # bfloat16 would stop at 256
  for x in (ones, mask, mask.astype(bool)):
    for name in ("sum", "mean", "var", "whiten"):
      assert REDUCTIONS[name](x, mask).dtype == jnp.float32
