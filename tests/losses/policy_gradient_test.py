import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import language_modeling, masking, policy_gradient
from tests.losses import ragged
from tests.reference import losses as reference

SHAPE = (ragged.BATCH, ragged.LENGTH)


@hypothesis.given(
    logprobs=ragged.floats(SHAPE),
    old_logprobs=ragged.floats(SHAPE),
    advantages=ragged.floats(SHAPE),
    mask=ragged.masks(),
    junk=st.sampled_from(ragged.JUNK),
    cliprange=st.sampled_from([0.1, 0.2, 0.5]),
)
def test_surrogate_matches_a_loop_over_ragged_rows(
    logprobs, old_logprobs, advantages, mask, junk, cliprange
):
  arrays = (logprobs, old_logprobs, advantages)
  out = policy_gradient.clipped_surrogate_loss(
      *(jnp.asarray(ragged.spoil(x, mask, junk)) for x in arrays),
      cliprange=cliprange,
  )
  expected = [
      [
          reference.clipped_surrogate(*entry, cliprange)
          for entry in zip(*row, strict=True)
      ]
      for row in zip(*(ragged.rows(x, mask) for x in arrays), strict=True)
  ]
  np.testing.assert_allclose(
      masking.zero_masked(out, jnp.asarray(mask)),
      ragged.pad(expected, mask),
      rtol=1e-4,
      atol=1e-6,
  )


@hypothesis.given(
    logprobs=ragged.floats(SHAPE),
    other=ragged.floats(SHAPE),
    mask=ragged.masks(),
    junk=st.sampled_from(ragged.JUNK),
)
def test_policy_gradient_and_ratio_match_loops_over_ragged_rows(
    logprobs, other, mask, junk
):
  arrays = [
      jnp.asarray(ragged.spoil(x, mask, junk)) for x in (logprobs, other)
  ]
  pairs = [
      list(zip(*row, strict=True))
      for row in zip(
          ragged.rows(logprobs, mask), ragged.rows(other, mask), strict=True
      )
  ]
  for loss, expected in (
      (policy_gradient.policy_gradient_loss, lambda x, y: -x * y),
      (policy_gradient.importance_ratio, lambda x, y: math.exp(x - y)),
      (
          functools.partial(
              policy_gradient.truncated_importance_weight, cap=1.5
          ),
          lambda x, y: min(math.exp(x - y), 1.5),
      ),
  ):
    np.testing.assert_allclose(
        masking.zero_masked(loss(*arrays), jnp.asarray(mask)),
        ragged.pad([[expected(*pair) for pair in row] for row in pairs], mask),
        rtol=1e-5,
        atol=1e-6,
    )


@hypothesis.given(
    logprobs=ragged.floats(SHAPE), advantages=ragged.floats(SHAPE)
)
def test_ratio_one_gives_the_policy_gradient(logprobs, advantages):
  logprobs, advantages = jnp.asarray(logprobs), jnp.asarray(advantages)

  def surrogate(x):
    return policy_gradient.clipped_surrogate_loss(
        x, logprobs, advantages, cliprange=0.2
    )

  def plain(x):
    return policy_gradient.policy_gradient_loss(x, advantages)

  # XLA flushes subnormal numbers to zero, hence atol.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-37)
  close(surrogate(logprobs), -advantages)
  gradients = [
      jax.grad(lambda x, f=f: jnp.sum(f(x)))(logprobs)
      for f in (surrogate, plain)
  ]
  close(*gradients)
  close(gradients[1], -advantages)


def test_policy_gradient_ascends_the_expected_reward():
  logits = jnp.array([0.3, -1.0, 2.0])
  rewards = jnp.array([1.0, 5.0, -2.0])
  probs = jax.nn.softmax(logits)  # the sampler: data, no gradient

  def loss(x):
    logprobs = language_modeling.selected_logprobs(
        jnp.broadcast_to(x, (3, 3)), jnp.arange(3)
    )
    per_token = policy_gradient.policy_gradient_loss(
        logprobs[None], rewards[None]
    )
    return jnp.sum(probs * per_token[0])

  expected = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * rewards))(logits)
  np.testing.assert_allclose(jax.grad(loss)(logits), -expected, atol=1e-6)


@pytest.mark.parametrize(
    "log_ratio, advantage, learns",
    [
        (0.1, 1.0, True),
        (0.5, 1.0, False),  # gained enough already
        (0.5, -1.0, True),  # a bad token became likelier: push it back
        (-0.5, -1.0, False),
        (-0.5, 1.0, True),
    ],
)
def test_no_gradient_beyond_the_trust_region(log_ratio, advantage, learns):
  gradient = jax.grad(
      lambda x: policy_gradient.clipped_surrogate_loss(
          jnp.full((1, 1), x),
          jnp.zeros((1, 1)),
          jnp.full((1, 1), advantage),
          cliprange=0.2,
      ).sum()
  )(log_ratio)
  expected = -advantage * np.exp(log_ratio) if learns else 0.0
  np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("log_ratio", [-2e4, 2e4])
def test_extreme_ratios_give_finite_values_and_gradients(log_ratio, advantage):
  value, gradient = jax.value_and_grad(
      lambda x: policy_gradient.clipped_surrogate_loss(
          jnp.full((1, 1), x),
          jnp.zeros((1, 1)),
          jnp.full((1, 1), advantage),
          cliprange=0.2,
      ).sum()
  )(log_ratio)
  assert np.isfinite(value)
  assert np.isfinite(gradient)


@pytest.mark.parametrize("junk", ragged.JUNK)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_masked_entries_reach_neither_mean_nor_gradient(which, junk):
  mask = jnp.array([[1, 0]])
  arrays = list(jnp.array([[[-1.0, -1.0]], [[-1.1, -1.0]], [[1.0, 1.0]]]))

  def mean(*arrays):
    safe = [masking.zero_masked(x, mask) for x in arrays]
    return masking.masked_mean(
        policy_gradient.clipped_surrogate_loss(*safe, cliprange=0.2), mask
    )

  clean = jax.value_and_grad(mean)(*arrays)
  arrays[which] = arrays[which].at[0, 1].set(junk)
  value, gradient = jax.value_and_grad(mean)(*arrays)
  assert np.array_equal(value, clean[0])
  assert np.array_equal(gradient, clean[1])


def test_bfloat16_gives_float32():
  x = jnp.ones((1, 1), jnp.bfloat16)
  assert policy_gradient.policy_gradient_loss(x, x).dtype == jnp.float32
  assert policy_gradient.importance_ratio(x, x).dtype == jnp.float32
  assert (
      policy_gradient.clipped_surrogate_loss(x, x, x, cliprange=0.2).dtype
      == jnp.float32
  )
