import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import device_mesh, optim
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.models import functions, heads
from rlhf_jax.train_state import create_train_state
from rlhf_jax.types import PreferenceBatch, RankingBatch
from rlhf_jax.updates import reward
from tests.models.small import random_tokens
from tests.reference import losses as reference
from tests.updates import small
from tests.updates.small import assert_trees_close, assert_trees_equal

CFG = reward.RewardConfig(center_coef=0.01)
update = jax.jit(reward.make_reward_update(small.score_fn, small.SGD))
BATCHES = {
    "pairs": small.preference_batch(),
    "rankings": small.ranking_batch(),
}
RANKING_LOSSES = {
    "pairwise": reference.pairwise_ranking,
    "plackett_luce": reference.plackett_luce,
    "best_of_k": reference.best_of_k,
}
kinds = pytest.mark.parametrize("kind", list(BATCHES))


def _state():
  return create_train_state(
      small.scalar_params(), small.SGD, jax.random.key(0)
  )


@pytest.fixture(scope="module")
def updated():
  return {kind: update(_state(), x, CFG) for kind, x in BATCHES.items()}


def _scores(batch):
  fn = jax.jit(lambda p, b: reward.score_rows(p, b, small.score_fn))
  return np.asarray(fn(small.scalar_params(), batch), np.float64)


def test_pair_loss_and_accuracy_match_a_numpy_loop(updated):
  batch = BATCHES["pairs"]
  weight, margin = np.asarray(batch.weight), np.asarray(batch.margin)
  total, right = 0.0, []
  for (chosen, rejected), w, m in zip(
      _scores(batch), weight, margin, strict=True
  ):
    total += w * reference.bradley_terry(chosen, rejected, m)
    right += [chosen > rejected] if w > 0 else []
  numbers = metrics_lib.compute(updated["pairs"][1])
  np.testing.assert_allclose(
      numbers["reward/loss"], total / weight.sum(), rtol=1e-5
  )
  np.testing.assert_allclose(numbers["reward/accuracy"], np.mean(right))


@pytest.mark.parametrize("name, loss", RANKING_LOSSES.items())
def test_ranking_loss_weighs_a_prompt_once_as_a_numpy_loop(name, loss):
  batch = BATCHES["rankings"]
  _, metrics = update(
      _state(), batch, dataclasses.replace(CFG, ranking_loss=name)
  )
  total = 0.0
  for score, ranks, valid, weight in zip(
      _scores(batch),
      np.asarray(batch.ranks),
      np.asarray(batch.completion_valid),
      np.asarray(batch.weight),
      strict=True,
  ):
    total += weight * loss(score[valid], ranks[valid])
  numbers = metrics_lib.compute(metrics)
  expected = total / float(batch.weight.sum())
  np.testing.assert_allclose(numbers["reward/loss"], expected, rtol=1e-5)


@kinds
def test_objective_adds_the_centring_and_divides_by_the_weight_it_is_given(
    kind,
):
  batch = BATCHES[kind]
  objective = {
      "pairs": reward.reward_objective, "rankings": reward.ranking_objective
  }[kind]
  total = 0.0
  for i, score in enumerate(_scores(batch)):
    if kind == "pairs":
      loss = reference.bradley_terry(*score, float(batch.margin[i]))
      center = (score[0] + score[1]) ** 2
    else:
      valid = np.asarray(batch.completion_valid[i])
      ranks = np.asarray(batch.ranks[i])[valid]
      loss = reference.pairwise_ranking(score[valid], ranks)
      center = (2 * score[valid].mean()) ** 2 if valid.any() else 0.0
    total += float(batch.weight[i]) * (loss + CFG.center_coef * center)
  # A microbatch divides by the whole batch's weight, which is not its own.
  loss, _ = jax.jit(
      lambda params: objective(
          params, batch, small.score_fn, CFG, jnp.float32(1000)
      )
  )(small.scalar_params())
  np.testing.assert_allclose(loss, total / 1000, rtol=1e-5)


@kinds
def test_microbatches_change_nothing(updated, kind):
  state, metrics = updated[kind]
  cfg = dataclasses.replace(CFG, num_microbatches=4)
  state_4, metrics_4 = update(_state(), BATCHES[kind], cfg)
  assert_trees_close(state_4.params, state.params, atol=1e-6)
  assert_trees_close(
      metrics_lib.compute(metrics_4),
      metrics_lib.compute(metrics),
      rtol=1e-6,
      atol=1e-6,
  )


@kinds
def test_devices_change_nothing(updated, kind):
  state, metrics = updated[kind]
  mesh = device_mesh.make_mesh(device_mesh.MeshConfig(data=8))
  state_8, metrics_8 = update(
      device_mesh.replicate(_state(), mesh),
      device_mesh.shard_rows(BATCHES[kind], mesh),
      CFG,
  )
  assert_trees_close(state_8.params, state.params, atol=1e-5)
  assert_trees_close(
      metrics_lib.compute(metrics_8),
      metrics_lib.compute(metrics),
      rtol=1e-5,
      atol=1e-5,
  )


@kinds
def test_rows_of_weight_zero_are_as_if_they_were_not_there(updated, kind):
  batch, (state, metrics) = BATCHES[kind], updated[kind]
  kept = np.flatnonzero(np.asarray(batch.weight))
  assert 0 < len(kept) < small.B
  subset, subset_metrics = update(
      _state(), jax.tree.map(lambda x: x[kept], batch), CFG
  )
  assert_trees_close(subset.params, state.params, atol=1e-6)
  assert_trees_close(
      metrics_lib.compute(subset_metrics),
      metrics_lib.compute(metrics),
      rtol=1e-5,
      atol=1e-6,
  )


def test_rankings_of_two_equal_pairs():
  pairs = small.preference_batch()
  pairs = dataclasses.replace(pairs, margin=jnp.zeros_like(pairs.margin))
  # The pair's order in its row says nothing: the ranks do.
  rankings = RankingBatch(
      tokens=pairs.tokens[:, ::-1],
      attention_mask=pairs.attention_mask[:, ::-1],
      ranks=jnp.broadcast_to(jnp.asarray([[7, 2]], jnp.int32), (small.B, 2)),
      completion_valid=jnp.ones((small.B, 2), bool),
      weight=pairs.weight,
  )
  state, metrics = update(_state(), pairs, CFG)
  other, other_metrics = update(_state(), rankings, CFG)
  assert_trees_close(other.params, state.params, atol=1e-6)
  numbers = metrics_lib.compute(metrics)
  for name, number in metrics_lib.compute(other_metrics).items():
    np.testing.assert_allclose(numbers[name], number, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("amount", [0, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_score_is_independent_of_padding_side_and_amount(side, amount):
  document = random_tokens(7, small.B, 6, vocab_size=small.V)
  score = jax.jit(small.score_fn)
  real = jnp.ones_like(document)
  expected = score(small.scalar_params(), document, real)
  pad = (amount, 0) if side == "left" else (0, amount)
  tokens = jnp.pad(document, ((0, 0), pad), constant_values=9)
  mask = jnp.pad(real, ((0, 0), pad))
  actual = score(small.scalar_params(), tokens, mask)
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_nan_weight_is_not_applied_bitwise_and_counts():
  batch = BATCHES["pairs"]
  bad = dataclasses.replace(batch, weight=batch.weight.at[0].set(jnp.nan))
  after, metrics = update(_state(), bad, CFG)
  assert_trees_equal(after.params, _state().params)
  assert (int(after.step), int(after.skipped_steps)) == (1, 1)
  assert float(metrics["nonfinite/loss"].total) == 1
  assert float(metrics["nonfinite/head/kernel"].total) == 1


def test_batch_of_no_weight_moves_nothing():
  batch = BATCHES["pairs"]
  empty = dataclasses.replace(batch, weight=jnp.zeros_like(batch.weight))
  state, metrics = update(_state(), empty, CFG)
  assert_trees_equal(state.params, _state().params)
  assert float(metrics["nonfinite/loss"].total) == 0


def test_same_seed_gives_bitwise_the_same_update(updated):
  again, _ = update(_state(), BATCHES["pairs"], CFG)
  assert_trees_equal(again.params, updated["pairs"][0].params)


def test_center_coefficient_is_data_and_compiles_nothing():
  step = jax.jit(reward.make_reward_update(small.score_fn, small.SGD))
  step(_state(), BATCHES["pairs"], reward.RewardConfig())
  step(_state(), BATCHES["pairs"], reward.RewardConfig(center_coef=0.1))
  assert step._cache_size() == 1


def test_normalisation_gives_mean_zero_and_deviation_one():
  raw = jnp.asarray(
      np.random.default_rng(0).normal(7, 3, 1000), jnp.float32
  )
  fitted = reward.fit_score_normalization(raw)
  score = np.asarray(fitted.gain * raw + fitted.bias, np.float64)
  np.testing.assert_allclose([score.mean(), score.std()], [0, 1], atol=1e-5)


@pytest.mark.parametrize(
    "scores",
    [
        [3.0] * 8,
        [1234.5678] * 999,
        [1.0, np.nan, 2.0],
        [np.inf, 1.0],
        [1.0],
        [],
    ],
    ids=["constant", "large constant", "nan", "infinite", "one", "none"],
)
def test_scores_that_tell_nothing_apart_cannot_be_normalised(scores):
  with pytest.raises(ValueError, match="nothing to normalise"):
    reward.fit_score_normalization(jnp.asarray(scores, jnp.float32))


def _preferences(seed, rows) -> PreferenceBatch:
  """Chosen has more threes than rejected; lengths differ."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 6, (rows, 2, 8))
  mask = np.arange(8) < rng.integers(4, 9, (rows, 2, 1))
  count = ((tokens == 3) & mask).sum(-1)
  swap = count[:, 0] < count[:, 1]
  tokens[swap], mask[swap] = tokens[swap, ::-1], mask[swap, ::-1]
  return PreferenceBatch(
      tokens=jnp.asarray(tokens, jnp.int32),
      attention_mask=jnp.asarray(mask, jnp.int32),
      weight=jnp.asarray(count[:, 0] != count[:, 1], jnp.float32),
      margin=jnp.zeros((rows,), jnp.float32),
  )


def test_separates_a_simple_preference_on_pairs_it_never_saw():
  num_steps, rows = 150, 64
  tx = optim.make_optimizer(
      optim.OptimizerConfig(learning_rate=0.01, schedule="linear"), num_steps
  )
  step = reward.make_reward_update(small.score_fn, tx)
  language_model = functions.init_language_model(
      jax.random.key(0), small.CONFIG
  )
  params = heads.scalar_from_language_model(
      language_model, jax.random.key(1), small.CONFIG, zero_head=False
  )
  batches = jax.tree.map(
      lambda x: x.reshape(num_steps, rows, *x.shape[1:]),
      _preferences(0, num_steps * rows),
  )

  @jax.jit
  def train(state, batches):
    body = lambda state, batch: step(state, batch, reward.RewardConfig())
    return jax.lax.scan(body, state, batches)

  state = create_train_state(params, tx, jax.random.key(0))
  state, metrics = train(state, batches)
  loss = metrics["reward/loss"].total / metrics["reward/loss"].count
  assert abs(loss[0] - np.log(2)) < 0.3
  heldout = _preferences(1, 512)
  _, numbers = jax.jit(
      lambda params: reward.reward_objective(
          params, heldout, small.score_fn, CFG, heldout.weight.sum()
      )
  )(state.params)
  assert metrics_lib.compute(numbers)["reward/accuracy"] > 0.95
