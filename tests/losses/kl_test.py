import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import kl, masking
from tests.losses import ragged
from tests.reference import losses as reference

SHAPE = (ragged.BATCH, ragged.LENGTH)
ESTIMATORS = ["kl_k1", "kl_k2", "kl_k3"]


@pytest.mark.parametrize("name", ESTIMATORS)
@hypothesis.given(
    logprobs=ragged.floats(SHAPE),
    ref_logprobs=ragged.floats(SHAPE),
    mask=ragged.masks(),
    junk=st.sampled_from(ragged.JUNK),
)
def test_estimators_match_a_loop_over_ragged_rows(
    name, logprobs, ref_logprobs, mask, junk
):
  out = getattr(kl, name)(
      jnp.asarray(ragged.spoil(logprobs, mask, junk)), jnp.asarray(ref_logprobs)
  )
  expected = [
      [getattr(reference, name)(p, q) for p, q in zip(*pair, strict=True)]
      for pair in zip(
          ragged.rows(logprobs, mask),
          ragged.rows(ref_logprobs, mask),
          strict=True,
      )
  ]
  np.testing.assert_allclose(
      masking.zero_masked(out, jnp.asarray(mask)),
      ragged.pad(expected, mask),
      rtol=1e-5,
      atol=1e-5,
  )


@hypothesis.given(
    logits=ragged.floats((*SHAPE, 4)),
    ref_logits=ragged.floats((*SHAPE, 4)),
    mask=ragged.masks(),
    junk=st.sampled_from(ragged.JUNK),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_exact_matches_a_loop_over_ragged_rows(
    logits, ref_logits, mask, junk, temperature
):
  out = kl.kl_exact(
      jnp.asarray(ragged.spoil(logits, mask[..., None], junk)),
      jnp.asarray(ragged.spoil(ref_logits, mask[..., None], junk)),
      temperature=temperature,
  )
  expected = [
      [
          reference.kl_exact(logits[row, t], ref_logits[row, t], temperature)
          for t in range(n)
      ]
      for row, n in enumerate(mask.sum(1))
  ]
  np.testing.assert_allclose(
      masking.zero_masked(out, jnp.asarray(mask)),
      ragged.pad(expected, mask),
      atol=2e-5,
  )


@hypothesis.given(logits=ragged.floats((6,)), ref_logits=ragged.floats((6,)))
def test_k1_and_k3_are_unbiased_over_the_enumerated_vocabulary(
    logits, ref_logits
):
  p = jax.nn.log_softmax(jnp.asarray(logits))
  q = jax.nn.log_softmax(jnp.asarray(ref_logits))
  exact = kl.kl_exact(jnp.asarray(logits), jnp.asarray(ref_logits))
  for estimator in (kl.kl_k1, kl.kl_k3):
    expected = jnp.sum(jnp.exp(p) * estimator(p, q))
    np.testing.assert_allclose(expected, exact, atol=1e-5)
  assert exact >= -1e-6


@hypothesis.given(logits=ragged.floats((6,)), ref_logits=ragged.floats((6,)))
def test_gradients_of_k1_vanish_and_of_k2_are_those_of_the_kl(
    logits, ref_logits
):
  logits, ref_logits = jnp.asarray(logits), jnp.asarray(ref_logits)
  probs = jax.nn.softmax(logits)  # the sampler: data, no gradient
  q = jax.nn.log_softmax(ref_logits)

  def expected(estimator):
    return jax.grad(
        lambda x: jnp.sum(probs * estimator(jax.nn.log_softmax(x), q))
    )(logits)

  exact = jax.grad(kl.kl_exact)(logits, ref_logits)
  np.testing.assert_allclose(expected(kl.kl_k1), jnp.zeros(6), atol=1e-5)
  np.testing.assert_allclose(expected(kl.kl_k2), exact, atol=1e-5)


@hypothesis.given(difference=ragged.floats((64,), largest=30.0))
def test_k3_is_never_negative(difference):
  k3 = np.asarray(kl.kl_k3(jnp.asarray(difference), jnp.zeros(64)))
  # For a tiny d the exact d^2 / 2 is below the rounding of its two terms.
  assert np.all(k3 >= -2e-7 * np.abs(difference))
  assert np.all(k3[np.abs(difference) > 1e-2] > 0)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("difference", [-2e4, 0.0, 2e4])
def test_estimators_are_finite_at_extremes(name, difference):
  value, gradient = jax.value_and_grad(getattr(kl, name))(
      jnp.array(difference), jnp.array(0.0)
  )
  assert np.isfinite(value)
  assert np.isfinite(gradient)
  if difference == 0.0:
    assert value == 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_bfloat16_gives_float32(name):
  x = jnp.array([-1.0], jnp.bfloat16)
  assert getattr(kl, name)(x, x.astype(jnp.float32)).dtype == jnp.float32


def test_exact_is_finite_at_extremes_in_low_precision():
  logits = jnp.array([1e4, -1e4, 0.0], jnp.bfloat16)
  for p, q in ((logits, -logits), (logits, logits), (-logits, 0 * logits)):
    value, gradient = jax.value_and_grad(kl.kl_exact)(p, q)
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient.astype(jnp.float32)))


def test_exact_allows_ids_that_both_rule_out():
  logits = jnp.array([0.0, 1.0, -jnp.inf])
  ref_logits = jnp.array([1.0, 0.0, -jnp.inf])
  value, gradient = jax.value_and_grad(kl.kl_exact)(logits, ref_logits)
  np.testing.assert_allclose(
      value, kl.kl_exact(logits[:2], ref_logits[:2]), rtol=1e-6
  )
  assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_masked_entries_reach_neither_mean_nor_gradient(name):
  mask = jnp.array([[1, 1, 0]])
  ref_logprobs = jnp.array([[-1.0, -2.0, -3.0]])

  def mean(logprobs, ref_logprobs):
    return masking.masked_mean(
        getattr(kl, name)(
            masking.zero_masked(logprobs, mask),
            masking.zero_masked(ref_logprobs, mask),
        ),
        mask,
    )

  clean = jax.value_and_grad(mean)(jnp.array([[-1.5, -1.5, 0.0]]), ref_logprobs)
  for junk in ragged.JUNK:
    value, gradient = jax.value_and_grad(mean)(
        jnp.array([[-1.5, -1.5, junk]]), ref_logprobs.at[0, 2].set(-junk)
    )
    assert np.array_equal(value, clean[0])
    assert np.array_equal(gradient, clean[1])


@hypothesis.given(
    measured=st.floats(0.0, 50.0),
    target=st.floats(0.5, 20.0),
    num_episodes=st.integers(1, 512),
)
def test_controller_matches_the_formula(measured, target, num_episodes):
  out = kl.adaptive_kl_coef(
      0.15, measured, target=target, horizon=10_000, num_episodes=num_episodes
  )
  expected = reference.adaptive_kl_coef(
      0.15, measured, target, 10_000, num_episodes
  )
  np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_controller_pushes_towards_its_target_and_is_clipped():
  def new(measured):
    return float(
        kl.adaptive_kl_coef(
            1.0, measured, target=6.0, horizon=1000, num_episodes=500
        )
    )

  assert new(6.0) == 1.0
  np.testing.assert_allclose([new(1e6), new(0.0)], [1.1, 0.9], rtol=1e-6)
  assert 0.9 < new(5.5) < 1.0 < new(6.5) < 1.1
