import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import returns
from tests.losses import ragged
from tests.reference import losses as reference

SHAPE = (ragged.BATCH, ragged.LENGTH)
fractions = st.sampled_from([0.0, 0.5, 0.9, 1.0])
gae = jax.jit(returns.generalized_advantage_estimation)
discounted = jax.jit(returns.discounted_returns)


@hypothesis.given(
    rewards=ragged.floats(SHAPE),
    values=ragged.floats(SHAPE),
    mask=ragged.masks(),
    junk=st.sampled_from(ragged.JUNK),
    gamma=fractions,
    gae_lambda=fractions,
)
def test_gae_matches_its_definition_on_ragged_rows(
    rewards, values, mask, junk, gamma, gae_lambda
):
  out = gae(
      jnp.asarray(ragged.spoil(rewards, mask, junk)),
      jnp.asarray(ragged.spoil(values, mask, junk)),
      jnp.asarray(mask),
      gamma=gamma,
      gae_lambda=gae_lambda,
  )
  rows = [
      reference.gae(r, v, gamma, gae_lambda)
      for r, v in zip(
          ragged.rows(rewards, mask), ragged.rows(values, mask), strict=True
      )
  ]
  for actual, expected in zip(out, zip(*rows, strict=True), strict=True):
    assert actual.dtype == jnp.float32
    assert np.all(np.asarray(actual)[mask == 0] == 0)
    np.testing.assert_allclose(actual, ragged.pad(expected, mask), atol=2e-5)


@hypothesis.given(
    rewards=ragged.floats(SHAPE),
    mask=ragged.masks(),
    junk=st.sampled_from(ragged.JUNK),
    gamma=fractions,
)
def test_discounted_returns_match_their_definition_on_ragged_rows(
    rewards, mask, junk, gamma
):
  out = discounted(
      jnp.asarray(ragged.spoil(rewards, mask, junk)),
      jnp.asarray(mask),
      gamma=gamma,
  )
  expected = [
      reference.discounted_returns(row, gamma)
      for row in ragged.rows(rewards, mask)
  ]
  np.testing.assert_allclose(out, ragged.pad(expected, mask), atol=2e-5)


@hypothesis.given(
    rewards=ragged.floats(SHAPE),
    values=ragged.floats(SHAPE),
    mask=ragged.masks(),
    gamma=fractions,
)
def test_lambda_one_is_the_monte_carlo_return_less_the_value(
    rewards, values, mask, gamma
):
  rewards, values, mask = map(jnp.asarray, (rewards, values, mask))
  advantages, targets = gae(
      rewards, values, mask, gamma=gamma, gae_lambda=1.0
  )
  monte_carlo = discounted(rewards, mask, gamma=gamma)
  np.testing.assert_allclose(targets, monte_carlo, atol=2e-5)
  np.testing.assert_allclose(
      advantages, monte_carlo - values * mask.astype(jnp.float32), atol=2e-5
  )


@hypothesis.given(
    rewards=ragged.floats(SHAPE),
    values=ragged.floats(SHAPE),
    mask=ragged.masks(),
    gamma=fractions,
)
def test_lambda_zero_is_the_td_error(rewards, values, mask, gamma):
  advantages, targets = gae(
      *map(jnp.asarray, (rewards, values, mask)), gamma=gamma, gae_lambda=0.0
  )
  for row, n in enumerate(mask.sum(1)):
    following = np.append(values[row, 1:n], np.float32(0))[:n]
    target = rewards[row, :n] + gamma * following
    np.testing.assert_allclose(targets[row, :n], target, atol=1e-5)
    np.testing.assert_allclose(
        advantages[row, :n], target - values[row, :n], atol=1e-5
    )


def test_right_values_have_no_advantage():
  rewards = jnp.array([[1.0, 2.0, 4.0, 0.0]])
  mask = jnp.array([[1, 1, 1, 0]])
  values = discounted(rewards, mask, gamma=0.9)
  for gae_lambda in (0.0, 0.5, 1.0):
    advantages, targets = gae(
        rewards, values, mask, gamma=0.9, gae_lambda=gae_lambda
    )
    np.testing.assert_allclose(advantages, jnp.zeros((1, 4)), atol=1e-6)
    np.testing.assert_allclose(targets, values, rtol=1e-6)


def test_mask_equals_shorter_row():
  rng = np.random.default_rng(0)
  rewards = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
  values = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
  mask = jnp.array([[1, 1, 1, 1, 0, 0]] * 2)
  padded = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.8)
  short = gae(
      rewards[:, :4], values[:, :4], mask[:, :4], gamma=0.9, gae_lambda=0.8
  )
  for a, b in zip(padded, short, strict=True):
    assert np.array_equal(a[:, :4], b)


@pytest.mark.parametrize("junk", ragged.JUNK)
def test_junk_on_padding_reaches_no_gradient(junk):
  mask = np.array([[1, 1, 0], [0, 0, 0]])

  def total(rewards, values):
    advantages, targets = gae(
        rewards, values, jnp.asarray(mask), gamma=0.9, gae_lambda=0.8
    )
    return jnp.sum(jnp.square(advantages)) + jnp.sum(targets)

  x = np.arange(6, dtype=np.float32).reshape(2, 3)
  grad = jax.grad(total, (0, 1))
  clean = grad(jnp.asarray(x), jnp.asarray(x))
  spoiled = jnp.asarray(ragged.spoil(x, mask, junk))
  for a, b in zip(grad(spoiled, spoiled), clean, strict=True):
    assert np.array_equal(a, b)
    assert np.all(np.asarray(a)[mask == 0] == 0)


def test_bfloat16_gives_float32():
  x = jnp.ones((1, 2), jnp.bfloat16)
  mask = jnp.ones((1, 2), bool)
  out = gae(x, x, mask, gamma=1.0, gae_lambda=0.95)
  assert {o.dtype for o in out} == {jnp.dtype("float32")}
  assert discounted(x, mask, gamma=1.0).dtype == jnp.float32
