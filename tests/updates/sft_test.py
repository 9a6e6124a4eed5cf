import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import device_mesh, optim
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.data import packing
from rlhf_jax.losses.language_modeling import token_logprobs
from rlhf_jax.models import functions
from rlhf_jax.train_state import create_train_state
from rlhf_jax.types import LMBatch
from rlhf_jax.updates import sft
from tests.models.small import random_tokens
from tests.reference import losses as reference
from tests.updates import small
from tests.updates.small import assert_trees_close, assert_trees_equal

CFG = sft.SFTConfig(z_loss_coef=0.01)
update = jax.jit(sft.make_sft_update(small.MODEL, small.SGD))


def _state():
  return create_train_state(
      small.language_model_params(), small.SGD, jax.random.key(0)
  )


@pytest.fixture(scope="module")
def updated():
  return update(_state(), small.lm_batch(), CFG)


def test_loss_is_the_mean_over_target_tokens_of_a_numpy_loop(updated):
  batch = small.lm_batch()
  logits = jax.jit(small.logits_fn)(
      _state().params, batch.tokens, batch.segment_ids
  )
  losses, right = [], []
  for b, i in zip(*np.nonzero(np.asarray(batch.loss_mask)), strict=True):
    row = np.asarray(logits[b, i - 1], np.float64)
    target = int(batch.tokens[b, i])
    losses.append(-reference.log_softmax(row)[target])
    right.append(row.argmax() == target)
  numbers = metrics_lib.compute(updated[1])
  np.testing.assert_allclose(numbers["sft/loss"], np.mean(losses), rtol=1e-5)
  np.testing.assert_allclose(numbers["sft/token_accuracy"], np.mean(right))
  assert int(updated[1]["sft/loss"].count) == len(losses)


def test_objective_adds_the_z_loss_and_divides_by_the_count_it_is_given():
  batch, params = small.lm_batch(), _state().params
  logits = jax.jit(small.logits_fn)(params, batch.tokens, batch.segment_ids)
  total = 0.0
  for b, i in zip(*np.nonzero(np.asarray(batch.loss_mask)), strict=True):
    row = np.asarray(logits[b, i - 1], np.float64)
    total -= reference.log_softmax(row)[int(batch.tokens[b, i])]
    total += 0.01 * reference.log_normalizer(row) ** 2
  # A microbatch divides by the whole batch's count, which is not its own.
  loss, _ = jax.jit(
      lambda params: sft.sft_objective(
          params, batch, small.MODEL, CFG, jnp.float32(1000)
      )
  )(params)
  np.testing.assert_allclose(loss, total / 1000, rtol=1e-5)


def test_microbatches_change_nothing(updated):
  state, metrics = updated
  cfg = dataclasses.replace(CFG, num_microbatches=4)
  state_4, metrics_4 = update(_state(), small.lm_batch(), cfg)
  assert_trees_close(state_4.params, state.params, atol=1e-6)
  assert_trees_close(
      metrics_lib.compute(metrics_4), metrics_lib.compute(metrics), rtol=1e-6
  )


def test_devices_change_nothing(updated):
  state, metrics = updated
  mesh = device_mesh.make_mesh(device_mesh.MeshConfig(data=8))
  state_8, metrics_8 = update(
      device_mesh.replicate(_state(), mesh),
      device_mesh.shard_rows(small.lm_batch(), mesh),
      CFG,
  )
  assert_trees_close(state_8.params, state.params, atol=1e-5)
  assert_trees_close(
      metrics_lib.compute(metrics_8), metrics_lib.compute(metrics), rtol=1e-5
  )


def test_same_seed_gives_bitwise_the_same_update(updated):
  assert_trees_equal(
      update(_state(), small.lm_batch(), CFG)[0].params, updated[0].params
  )


def test_what_is_no_target_is_not_trained_on(updated):
  # The last token of every row is seen by nothing, so only its loss could.
  batch = small.lm_batch()
  masked = dataclasses.replace(
      batch, loss_mask=batch.loss_mask.at[:, -1].set(0.0)
  )
  changed = dataclasses.replace(
      masked, tokens=(masked.tokens.at[:, -1].add(1)) % small.V
  )
  first, _ = update(_state(), masked, CFG)
  second, _ = update(_state(), changed, CFG)
  assert_trees_close(first.params, second.params, atol=1e-7)


def test_pad_equal_to_eos_changes_nothing_and_the_end_is_still_learnt():
  # Demonstrations of 2 prompt tokens, a completion and its end token.
  ids = [[5, 6, *range(7, 7 + n), small.EOS] for n in (1, 3, 2, 4)]
  examples = [(x, [0.0, 0.0, *[1.0] * (len(x) - 2)]) for x in ids]
  plain, same = (
      jax.tree.map(jnp.asarray, packing.pack(examples, small.T, pad_id=pad_id))
      for pad_id in (0, small.EOS)
  )
  padding = same.segment_ids == 0
  assert bool(jnp.all(same.tokens[padding] == small.EOS)) and padding.any()
  # Every end token is a target, and no padding is.
  targets = np.asarray(same.tokens)[np.asarray(same.loss_mask) == 1]
  assert (targets == small.EOS).sum() == len(ids)
  state, metrics = update(_state(), same, CFG)
  expected, expected_metrics = update(_state(), plain, CFG)
  assert_trees_equal(state.params, expected.params)
  assert_trees_equal(metrics, expected_metrics)
  probability = lambda params: jnp.exp(
      token_logprobs(
          jax.jit(small.logits_fn)(params, same.tokens, same.segment_ids),
          same.tokens,
      )
  )[(same.tokens[:, 1:] == small.EOS) & (same.loss_mask[:, 1:] == 1)]
  assert probability(state.params).mean() > probability(_state().params).mean()


def test_batch_without_a_target_moves_nothing():
  batch = dataclasses.replace(
      small.lm_batch(), loss_mask=jnp.zeros((small.B, small.T), jnp.float32)
  )
  state, metrics = update(_state(), batch, CFG)
  assert_trees_equal(state.params, _state().params)
  assert float(metrics["nonfinite/loss"].total) == 0
  assert "sft/loss" not in metrics_lib.compute(metrics)


def test_nan_is_not_applied_bitwise_and_counts():
  # Infinite weights make the logits NaN, as an overflow would.
  params = small.language_model_params()
  trunk = params["trunk"] | {
      "token_embedding": params["trunk"]["token_embedding"].at[0].set(jnp.inf)
  }
  before = dataclasses.replace(_state(), params=params | {"trunk": trunk})
  after, metrics = update(before, small.lm_batch(), CFG)
  assert_trees_equal(after.params, before.params)
  assert (int(after.step), int(after.skipped_steps)) == (1, 1)
  assert float(metrics["nonfinite/loss"].total) == 1
  assert float(metrics["nonfinite/trunk/token_embedding"].total) == 1


def test_z_loss_coefficient_is_data_and_compiles_nothing():
  step = jax.jit(sft.make_sft_update(small.MODEL, small.SGD))
  step(_state(), small.lm_batch(), sft.SFTConfig())
  step(_state(), small.lm_batch(), sft.SFTConfig(z_loss_coef=0.1))
  assert step._cache_size() == 1


def _overfit(dtype, num_steps=250):
  """Eight random sequences; the first two tokens tell which one it is."""
  tokens = random_tokens(3, 8, 8, vocab_size=small.V)
  tokens = tokens.at[:, 0].set(jnp.arange(8)).at[:, 1].set(jnp.arange(8))
  batch = LMBatch(
      tokens=tokens,
      segment_ids=jnp.ones_like(tokens),
      loss_mask=jnp.ones((8, 8), jnp.float32).at[:, :2].set(0.0),
  )
  config = dataclasses.replace(small.CONFIG, num_layers=2, dtype=dtype)
  tx = optim.make_optimizer(
      optim.OptimizerConfig(learning_rate=0.02, schedule="linear"), num_steps
  )
  step = sft.make_sft_update(functions.make_language_model(config), tx)
  params = functions.init_language_model(jax.random.key(0), config)
  state = create_train_state(params, tx, jax.random.key(0))

  @jax.jit
  def train(state):
    body = lambda state, _: step(state, batch, sft.SFTConfig())
    return jax.lax.scan(body, state, None, length=num_steps)

  return train(state)


def _assert_overfits(dtype):
  state, metrics = _overfit(dtype)
  loss = metrics["sft/loss"].total / metrics["sft/loss"].count
  assert loss[0] > 2.5
  assert loss[-1] < 0.05
  assert not metrics["nonfinite/steps"].total.any()
  return state


def test_chunks_sum_a_bfloat16_heads_gradient_in_float32():
  def gradient_of(chunk_size, dtype):
    config = dataclasses.replace(
        small.CONFIG, param_dtype=dtype, head_chunk_size=chunk_size
    )
    model = functions.make_language_model(config)
    params = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(dtype),
        small.language_model_params(),
    )
    objective = lambda params: sft.sft_objective(
        params, small.lm_batch(), model, CFG, jnp.float32(1)
    )[0]
    grads = jax.jit(jax.grad(objective))(params)
    return np.asarray(grads["trunk"]["token_embedding"], np.float32)

  wanted = gradient_of(small.T, "float32")
  size = np.linalg.norm(wanted)
  error = lambda chunk_size: np.linalg.norm(
      gradient_of(chunk_size, "bfloat16") - wanted
  )
  # Of one rounding to 8 bits, however many chunks there are.
  assert error(small.T) < 0.003 * size
  assert error(1) < 0.003 * size


def test_overfits_eight_sequences():
  _assert_overfits("float32")


def test_bfloat16_neither_collapses_nor_rounds_the_steps_away():
  state = _assert_overfits("bfloat16")
  # Only the arithmetic is in bfloat16: its 8 bits would lose small updates.
  dtypes = {x.dtype for x in jax.tree.leaves((state.params, state.opt_state))}
  assert jnp.dtype("bfloat16") not in dtypes
