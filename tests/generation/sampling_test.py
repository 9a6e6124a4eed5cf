import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rlhf_jax.generation import sampling

LOGITS = st.lists(
    st.floats(-8, 8, width=32), min_size=8, max_size=8
).map(lambda values: np.asarray(values, np.float32))


def _softmax(logits):
  weights = np.exp(np.float64(logits) - np.max(logits))
  return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_the_temperature(temperature):
  logits = np.asarray([2.0, 1.0, 0.5, 0.0, -0.5, -1.0], np.float32)
  num = 20_000
  rngs = jax.random.split(jax.random.key(0), num)
  scaled = sampling.apply_temperature(jnp.asarray(logits), temperature)
  drawn = jax.vmap(sampling.sample, (0, None))(rngs, scaled)
  counts = np.bincount(np.asarray(drawn), minlength=6)
  expected = num * _softmax(logits / temperature)
  assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def _counts(logits, num, seed=0):
  rngs = jax.random.split(jax.random.key(seed), num)
  draw = jax.jit(jax.vmap(sampling.sample, (0, None)))
  drawn = np.asarray(draw(rngs, jnp.asarray(logits)))
  return np.bincount(drawn, minlength=len(logits))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 257, 1000])
@pytest.mark.parametrize("cut", ["none", "top_k", "top_p"])
def test_draws_of_any_vocabulary_pass_chi_square(size, cut):
  """Blocks of the last size or less, and blocks in which nothing is left."""
  logits = np.random.default_rng(size).normal(size=size, scale=1.5)
  logits = jnp.asarray(logits, jnp.float32)
  if cut == "top_k":
    logits = sampling.apply_top_k(logits, 1 + size // 3)
  elif cut == "top_p":
    logits = sampling.apply_top_p(logits, 0.7)
  probs, num = _softmax(np.asarray(logits)), 200_000
  counts = _counts(logits, num)
  assert counts.sum() == num and counts.shape == (size,)
  assert not counts[probs == 0].any()
  # Those of few expected draws are one class together.
  rare = num * probs < 10
  observed = [*counts[~rare], counts[rare].sum()]
  expected = [*(num * probs[~rare]), num * probs[rare].sum()]
  keep = np.asarray(expected) > 0
  if keep.sum() > 1:
    observed, expected = np.asarray(observed)[keep], np.asarray(expected)[keep]
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-4


def test_a_token_is_drawn_wherever_it_stands_if_it_is_the_only_one():
  for size in (1, 2, 31, 32, 33, 1025):
    for place in {0, size // 2, size - 1}:
      logits = jnp.full((size,), -jnp.inf).at[place].set(-1e4)
      assert _counts(logits, 50)[place] == 50


def test_logits_that_are_nan_give_a_token_of_the_vocabulary():
  # Its last block is filled up beyond it.
  logits = jnp.full((50_257,), jnp.nan)
  assert 0 <= int(sampling.sample(jax.random.key(0), logits)) < logits.size


def test_unlikely_tokens_are_drawn_as_often_as_they_should_be():
  """Of 65,536 equal ones beside one of half the mass: no block is missed."""
  size = 1 << 16
  logits = np.zeros(size + 1, np.float32)
  logits[size // 2] = np.log(size)
  counts = _counts(logits, 100_000)
  rest = np.delete(counts, size // 2)
  assert abs(rest.sum() - 50_000) < 4 * 158
  blocks = rest.reshape(64, -1).sum(axis=1)
  assert scipy.stats.chisquare(blocks).pvalue > 1e-4


@hypothesis.given(logits=LOGITS, top_k=st.integers(1, 8))
def test_top_k_keeps_the_k_largest_and_ties_with_the_last(logits, top_k):
  kept = np.isfinite(sampling.apply_top_k(jnp.asarray(logits), top_k))
  kth = sorted(logits, reverse=True)[top_k - 1]
  np.testing.assert_array_equal(kept, logits >= kth)
  assert kept.sum() >= top_k


@pytest.mark.parametrize("top_k", [0, 8, 9])
def test_top_k_of_nothing_or_everything_changes_nothing(top_k):
  logits = jnp.arange(8.0)
  np.testing.assert_array_equal(sampling.apply_top_k(logits, top_k), logits)


@hypothesis.given(logits=LOGITS, top_p=st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, top_p):
  order = np.argsort(-logits, kind="stable")
  mass = np.cumsum(_softmax(logits)[order])
  # At an exact boundary float32 may fall on either side.
  hypothesis.assume(np.abs(mass - top_p).min() > 1e-5)
  size = int(np.searchsorted(mass, top_p)) + 1
  least = logits[order[min(size, 8) - 1]]
  kept = np.isfinite(sampling.apply_top_p(jnp.asarray(logits), top_p))
  np.testing.assert_array_equal(kept, logits >= least)


def test_top_p_works_on_rows_that_top_k_cut_and_never_empties_one():
  logits = jnp.asarray([[3.0, 2.0, 1.0, 0.0], [0.0, 0.0, 5.0, -1.0]])
  cut = sampling.apply_top_k(logits, 2)
  kept = np.isfinite(sampling.apply_top_p(cut, 0.95))
  np.testing.assert_array_equal(
      kept, [[True, True, False, False], [False, False, True, False]]
  )
  for top_p in (0.0, 1e-9):
    kept = np.isfinite(sampling.apply_top_p(logits, top_p))
    np.testing.assert_array_equal(kept.sum(axis=-1), [1, 1])


def test_token_that_is_cut_is_never_drawn():
  logits = sampling.apply_top_k(jnp.asarray([1.0, 0.9, 0.8, 0.7]), 2)
  rngs = jax.random.split(jax.random.key(0), 500)
  drawn = jax.vmap(sampling.sample, (0, None))(rngs, logits)
  assert set(np.asarray(drawn).tolist()) == {0, 1}
