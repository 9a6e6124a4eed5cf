import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import language_modeling as lm
from rlhf_jax.losses import masking
from tests.losses import ragged
from tests.reference import losses as reference

V = 4
SHAPE = (ragged.BATCH, ragged.LENGTH)
temperatures = st.sampled_from([0.5, 1.0, 2.0])


def next_token_loss(logits, tokens):
  return lm.cross_entropy_loss(*lm.predictions_and_targets(logits, tokens))


@hypothesis.given(
    logits=ragged.floats((*SHAPE, V)),
    mask=ragged.masks(min_length=1),
    junk=st.sampled_from(ragged.JUNK),
    temperature=temperatures,
    seed=st.integers(0, 2**16),
)
def test_token_logprobs_match_a_loop_over_ragged_rows(
    logits, mask, junk, temperature, seed
):
  tokens = np.random.default_rng(seed).integers(0, V, SHAPE)
  spoiled = ragged.spoil(logits, mask[..., None], junk)
  out = lm.token_logprobs(
      jnp.asarray(spoiled),
      jnp.asarray(tokens, dtype=jnp.int32),
      temperature=temperature,
  )
  assert out.shape == (ragged.BATCH, ragged.LENGTH - 1)
  assert out.dtype == jnp.float32
  for row, n in enumerate(mask.sum(1)):
    expected = reference.token_logprobs(
        logits[row, :n], tokens[row, :n], temperature
    )
    np.testing.assert_allclose(out[row, : n - 1], expected, atol=1e-5)


@hypothesis.given(
    logits=ragged.floats((*SHAPE, V)),
    mask=ragged.masks(min_length=1),
    junk=st.sampled_from(ragged.JUNK),
    z_loss_coef=st.sampled_from([0.0, 0.1]),
)
def test_cross_entropy_matches_a_loop_over_ragged_rows(
    logits, mask, junk, z_loss_coef
):
  tokens = np.arange(logits[..., 0].size).reshape(SHAPE) % V
  out = lm.cross_entropy_loss(
      *lm.predictions_and_targets(
          jnp.asarray(ragged.spoil(logits, mask[..., None], junk)),
          jnp.asarray(tokens, dtype=jnp.int32),
      ),
      z_loss_coef=z_loss_coef,
  )
  for row, n in enumerate(mask.sum(1)):
    logprobs = reference.token_logprobs(logits[row, :n], tokens[row, :n])
    expected = [
        z_loss_coef * reference.log_normalizer(logits[row, i]) ** 2 - lp
        for i, lp in enumerate(logprobs)
    ]
    np.testing.assert_allclose(out[row, : n - 1], expected, atol=1e-5)


@hypothesis.given(
    logits=ragged.floats((*SHAPE, V)),
    mask=ragged.masks(),
    junk=st.sampled_from(ragged.JUNK),
    temperature=temperatures,
)
def test_entropy_matches_a_loop_over_ragged_rows(
    logits, mask, junk, temperature
):
  out = lm.entropy(
      jnp.asarray(ragged.spoil(logits, mask[..., None], junk)),
      temperature=temperature,
  )
  expected = [
      [reference.entropy(logits[row, t], temperature) for t in range(n)]
      for row, n in enumerate(mask.sum(1))
  ]
  np.testing.assert_allclose(
      masking.zero_masked(out, jnp.asarray(mask)),
      ragged.pad(expected, mask),
      atol=1e-5,
  )


def test_masked_entries_reach_neither_loss_nor_gradient():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(*SHAPE, V)).astype(np.float32)
  tokens = jnp.asarray(rng.integers(0, V, SHAPE), dtype=jnp.int32)
  mask = np.ones(SHAPE, np.int32)
  mask[:, 3:] = 0

  def loss(logits):
    # Logits of padding are zeroed before the log-softmax: its derivative at
    # NaN is NaN, whatever it is multiplied with later.
    safe = masking.zero_masked(
        logits, jnp.broadcast_to(jnp.asarray(mask)[..., None], logits.shape)
    )
    return masking.masked_mean(
        next_token_loss(safe, tokens), jnp.asarray(mask[:, 1:])
    )

  clean = jax.value_and_grad(loss)(jnp.asarray(logits))
  for junk in ragged.JUNK:
    spoiled = ragged.spoil(logits, mask[..., None], junk)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(spoiled))
    assert np.array_equal(value, clean[0])
    assert np.array_equal(gradient, clean[1])


def test_mean_over_a_mask_is_the_mean_over_the_subset():
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.normal(size=(1, 6, V)), jnp.float32)
  tokens = jnp.asarray(rng.integers(0, V, (1, 6)), dtype=jnp.int32)
  mask = jnp.array([[1, 1, 1, 0, 0]])
  short = next_token_loss(logits[:, :4], tokens[:, :4])
  padded = next_token_loss(logits, tokens)
  np.testing.assert_allclose(
      masking.masked_mean(padded, mask), jnp.mean(short), rtol=1e-6
  )


@hypothesis.given(logits=ragged.floats((V,)), temperature=temperatures)
def test_gradient_is_one_hot_less_softmax(logits, temperature):
  gradient = jax.grad(
      lambda x: lm.selected_logprobs(x, jnp.array(2), temperature=temperature)
  )(jnp.asarray(logits))
  probs = [
      np.exp(x) for x in reference.log_softmax(logits / np.float32(temperature))
  ]
  expected = (np.eye(V)[2] - probs) / temperature
  np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_probabilities_sum_to_one():
  logits = jnp.broadcast_to(jnp.array([3.0, -1.0, 0.5, 2.0]), (V, V))
  logprobs = lm.selected_logprobs(logits, jnp.arange(V), temperature=0.7)
  np.testing.assert_allclose(jnp.sum(jnp.exp(logprobs)), 1.0, rtol=1e-6)


def test_entropy_is_the_expected_negative_logprob():
  logits = jnp.broadcast_to(jnp.array([3.0, -1.0, 0.5, 2.0]), (V, V))
  logprobs = lm.selected_logprobs(logits, jnp.arange(V), temperature=0.7)
  np.testing.assert_allclose(
      lm.entropy(logits[0], temperature=0.7),
      -jnp.sum(jnp.exp(logprobs) * logprobs),
      rtol=1e-6,
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_extreme_logits_give_finite_float32_values_and_gradients(dtype):
  logits = jnp.array([[[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]]], dtype)
  tokens = jnp.array([[0, 1]])
  losses = {
      "token": lambda x: lm.token_logprobs(x, tokens, temperature=0.5),
      "entropy": lm.entropy,
      "cross_entropy": lambda x: lm.cross_entropy_loss(
          x, jnp.array([[1, 0]]), z_loss_coef=1e-4
      ),
  }
  for name, loss in losses.items():
    out = loss(logits)
    assert out.dtype == jnp.float32, name
    assert np.all(np.isfinite(out)), name
    gradient = jax.grad(lambda x, loss=loss: jnp.sum(loss(x)))(logits)
    assert gradient.dtype == dtype
    assert np.all(np.isfinite(gradient.astype(jnp.float32))), name


def test_large_common_offset_costs_no_precision():
  logits = jnp.array([1.0, 2.0, 4.0])
  near = lm.selected_logprobs(logits, jnp.array(0))
  far = lm.selected_logprobs(logits + 2.0**14, jnp.array(0))
  np.testing.assert_allclose(far, near, rtol=1e-6)


def test_ruled_out_ids_leave_entropy_and_gradient_finite():
  logits = jnp.array([0.0, -jnp.inf, 0.0])
  value, gradient = jax.value_and_grad(lm.entropy)(logits)
  np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
  assert np.all(np.isfinite(gradient))


def test_temperature_may_be_traced():
  logits, ids = jnp.array([0.0, 1.0]), jnp.array(1)
  traced = jax.jit(lambda t: lm.selected_logprobs(logits, ids, temperature=t))
  np.testing.assert_allclose(
      traced(0.7), lm.selected_logprobs(logits, ids, temperature=0.7)
  )


def test_likeliest_is_argmax_but_for_ties_and_nan():
  logits = np.random.default_rng(0).normal(size=(4, 9, 7)).astype(np.float32)
  logits[0, :3] = logits[0, :3].round()
  ids = np.random.default_rng(1).integers(0, 7, (4, 9)).astype(np.int32)
  ids[1] = logits[1].argmax(-1)
  chosen = np.take_along_axis(logits, ids[..., None], -1)[..., 0]
  expected = chosen >= logits.max(-1)
  assert 9 <= expected.sum() < expected.size
  actual = lm.is_likeliest(jnp.asarray(logits), jnp.asarray(ids))
  np.testing.assert_array_equal(actual, expected)
  assert not lm.is_likeliest(jnp.full((1, 3), jnp.nan), jnp.array([0])).any()
