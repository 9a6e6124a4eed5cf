import itertools

import hypothesis
from hypothesis.extra import numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses import preference
from tests.losses import ragged
from tests.reference import losses as reference

K = ragged.LENGTH
SHAPE = (ragged.BATCH, K)
RANKING_LOSSES = ["pairwise_ranking", "plackett_luce", "best_of_k"]
ranks_with_ties = hnp.arrays(np.int32, SHAPE, elements=st.integers(0, 3))


def _loss(name):
  return getattr(preference, f"{name}_loss")


@hypothesis.given(
    chosen=ragged.floats((4,)),
    rejected=ragged.floats((4,)),
    margin=ragged.floats((4,), largest=2.0),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.4]),
)
def test_bradley_terry_matches_a_loop(
    chosen, rejected, margin, label_smoothing
):
  out = preference.bradley_terry_loss(
      *map(jnp.asarray, (chosen, rejected)),
      margin=jnp.asarray(margin),
      label_smoothing=label_smoothing,
  )
  expected = [
      reference.bradley_terry(float(c), float(r), float(m), label_smoothing)
      for c, r, m in zip(chosen, rejected, margin, strict=True)
  ]
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RANKING_LOSSES)
@hypothesis.given(
    scores=ragged.floats(SHAPE),
    ranks=ranks_with_ties,
    valid=ragged.masks(side="any"),
    junk=st.sampled_from(ragged.JUNK),
)
def test_ranking_losses_match_loops_over_ragged_rows(
    name, scores, ranks, valid, junk
):
  out = _loss(name)(
      jnp.asarray(ragged.spoil(scores, valid, junk)),
      jnp.asarray(ranks),
      jnp.asarray(valid != 0),
  )
  expected = [
      getattr(reference, name)(*row)
      for row in zip(
          ragged.rows(scores, valid), ragged.rows(ranks, valid), strict=True
      )
  ]
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_equal_scores_cost_log_two():
  scores, ranks = jnp.full((1, 2), 3.0), jnp.array([[1, 0]])
  valid = jnp.ones((1, 2), bool)
  losses = [
      preference.bradley_terry_loss(scores[:, 0], scores[:, 1]),
      preference.bradley_terry_loss(
          scores[:, 0], scores[:, 1], label_smoothing=0.3
      ),
      preference.pairwise_ranking_loss(scores, ranks, valid),
      preference.plackett_luce_loss(scores, ranks, valid),
      preference.best_of_k_loss(scores, ranks, valid),
  ]
  np.testing.assert_allclose(losses, np.full((5, 1), np.log(2)), rtol=1e-6)


@hypothesis.given(scores=ragged.floats((4, 2)))
def test_all_losses_agree_for_two_completions(scores):
  scores = jnp.asarray(scores)
  expected = preference.bradley_terry_loss(scores[:, 0], scores[:, 1])
  ranks = jnp.broadcast_to(jnp.array([[0, 1]]), (4, 2))
  valid = jnp.ones((4, 2), bool)
  for out in (
      preference.pairwise_ranking_loss(scores, ranks, valid),
      preference.plackett_luce_loss(scores, ranks, valid),
      preference.best_of_k_loss(scores, ranks, valid),
  ):
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_probabilities_of_all_rankings_sum_to_one():
  rankings = jnp.array(list(itertools.permutations(range(4))))
  scores = jnp.broadcast_to(jnp.array([0.5, -1.0, 2.0, 0.0]), rankings.shape)
  loss = preference.plackett_luce_loss(
      scores, rankings, jnp.ones(rankings.shape, bool)
  )
  np.testing.assert_allclose(jnp.sum(jnp.exp(-loss)), 1.0, rtol=1e-5)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_valid_completions_equal_the_subset(name):
  rng = np.random.default_rng(0)
  scores = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
  ranks = jnp.array([[3, 1, 1, 0, 2]] * 3)
  keep = np.array([0, 2, 4])
  valid = jnp.zeros((3, 5), bool).at[:, keep].set(True)
  np.testing.assert_allclose(
      _loss(name)(scores, ranks, valid),
      _loss(name)(scores[:, keep], ranks[:, keep], valid[:, keep]),
      rtol=1e-6,
  )


@pytest.mark.parametrize("name", RANKING_LOSSES)
@pytest.mark.parametrize("junk", ragged.JUNK)
def test_invalid_completions_reach_neither_value_nor_gradient(name, junk):
  valid = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
  ranks = jnp.array([[2, 0, 1, 1]] * 3)
  scores = np.arange(12, dtype=np.float32).reshape(3, 4) / 10

  def total(scores):
    return jnp.sum(_loss(name)(scores, ranks, jnp.asarray(valid != 0)))

  clean = jax.value_and_grad(total)(jnp.asarray(scores))
  value, gradient = jax.value_and_grad(total)(
      jnp.asarray(ragged.spoil(scores, valid, junk))
  )
  assert np.isfinite(value)
  assert np.array_equal(value, clean[0])
  assert np.array_equal(gradient, clean[1])
  assert np.all(np.asarray(gradient)[valid == 0] == 0)


@pytest.mark.parametrize("name", RANKING_LOSSES)
def test_rows_that_say_nothing_cost_nothing(name):
  scores = jnp.array([[1.0, 2.0], [1.0, 2.0]])
  valid = jnp.array([[False, False], [True, False]])
  loss = _loss(name)(scores, jnp.array([[0, 1]] * 2), valid)
  assert loss.tolist() == [0.0, 0.0]


def test_all_tied_rows_have_no_ordered_pair_and_pull_scores_together():
  scores = jnp.array([[1.0, 2.0, 4.0]])
  ranks, valid = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
  assert preference.pairwise_ranking_loss(scores, ranks, valid)[0] == 0
  gradient = jax.grad(
      lambda s: preference.plackett_luce_loss(s, ranks, valid)[0]
  )
  assert gradient(scores)[0, 0] < 0 < gradient(scores)[0, 2]
  np.testing.assert_allclose(
      gradient(jnp.full((1, 3), 2.0)), jnp.zeros((1, 3)), atol=1e-6
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_scores_give_finite_float32_values_and_gradients(dtype):
  scores = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype)
  ranks, valid = jnp.array([[0, 1, 2]] * 2), jnp.ones((2, 3), bool)
  losses = [
      lambda s: preference.bradley_terry_loss(
          s[:, 0], s[:, 1], label_smoothing=0.1
      ),
      lambda s: preference.pairwise_ranking_loss(s, ranks, valid),
      lambda s: preference.plackett_luce_loss(s, ranks, valid),
      lambda s: preference.best_of_k_loss(s, ranks, valid),
  ]
  for loss in losses:
    assert loss(scores).dtype == jnp.float32
    assert np.all(np.isfinite(loss(scores)))
    gradient = jax.grad(lambda s, loss=loss: jnp.sum(loss(s)))(scores)
    assert np.all(np.isfinite(gradient.astype(jnp.float32)))


def test_only_differences_of_scores_matter():
  scores = jnp.array([[0.5, -1.0, 2.0]])
  ranks, valid = jnp.array([[1, 0, 2]]), jnp.ones((1, 3), bool)
  for name in RANKING_LOSSES:
    np.testing.assert_allclose(
        _loss(name)(scores + 100.0, ranks, valid),
        _loss(name)(scores, ranks, valid),
        rtol=1e-5,
    )


def test_margin_asks_for_more_and_smoothing_for_less():
  chosen, rejected = jnp.array([3.0]), jnp.array([0.0])
  loss = lambda **kw: float(
      preference.bradley_terry_loss(chosen, rejected, **kw)[0]
  )
  assert loss(margin=1.0) > loss()
  np.testing.assert_allclose(loss(margin=3.0), np.log(2), rtol=1e-6)
  # With a share e of wrong labels the best difference is log((1 - e) / e).
  slope = jax.grad(
      lambda d: preference.bradley_terry_loss(
          d[None], jnp.zeros(1), label_smoothing=0.2
      )[0]
  )
  np.testing.assert_allclose(slope(jnp.log(4.0)), 0.0, atol=1e-6)
