"""Every update by pmap on simulated devices is that of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import parallelism
from rlhf_jax import device_mesh
from rlhf_jax.models import functions
from rlhf_jax.train_state import create_train_state
from rlhf_jax.updates import gradient, ppo, reward, sft
from tests.updates import small
from tests.updates.small import (
  DROPOUT,
  assert_trees_close,
  assert_trees_equal,
  frozen_base,
  random_adapter,
)

assert_close = functools.partial(assert_trees_close, rtol=1e-5, atol=1e-5)


def _pmap(update, num_devices=8, rows=(1,), **options):
  mesh = device_mesh.make_mesh(device_mesh.MeshConfig(data=num_devices))
  return parallelism.compile_step(update, "pmap", mesh, rows=rows, **options)


def _assert_same(actual, expected):
  """States, and metrics with what they are divided by."""
  (state, metrics), (one_state, one_metrics) = actual, expected
  assert metrics.keys() == one_metrics.keys()
  as_numbers = lambda tree: jax.tree.map(
      lambda x: jax.random.key_data(x)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x,
      tree,
  )
  assert_close(as_numbers(state), as_numbers(one_state))
  assert_close(metrics, one_metrics)


# --- supervised ---------------------------------------------------------------

SFT = sft.make_sft_update(small.MODEL, small.SGD)
SFT_CFG = sft.SFTConfig(z_loss_coef=0.01)


def _sft_state():
  return create_train_state(
      small.language_model_params(), small.SGD, jax.random.key(0)
  )


def _uneven(batch):
  """Devices hold different numbers of targets, and one none at all."""
  mask = batch.loss_mask.at[2:4].set(0.0)
  per_device = np.asarray(mask[:, 1:]).reshape(8, -1).sum(1)
  assert per_device.min() == 0 and len(set(per_device)) > 3
  return dataclasses.replace(batch, loss_mask=mask)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_sft(num_microbatches):
  batch = _uneven(small.lm_batch())
  cfg = dataclasses.replace(SFT_CFG, num_microbatches=num_microbatches)
  one = jax.jit(SFT)(_sft_state(), batch, SFT_CFG)
  _assert_same(_pmap(SFT)(_sft_state(), batch, cfg), one)


def test_sft_of_an_adapter_drops_what_one_device_drops():
  base = small.language_model_params()
  params, frozen = {"adapter": random_adapter(base)}, frozen_base(base, DROPOUT)
  state = lambda: create_train_state(params, small.SGD, jax.random.key(0))
  batch = small.lm_batch()
  args = (state(), batch, SFT_CFG, frozen)
  one = jax.jit(SFT)(*args)
  _assert_same(_pmap(SFT)(*args), one)
  other, _ = jax.jit(SFT)(state(), batch, SFT_CFG, frozen_base(base))
  with pytest.raises(AssertionError):
    assert_close(one[0].params, other.params)


@pytest.mark.parametrize(
    "batch", [small.preference_batch(), small.ranking_batch()],
    ids=["pairs", "rankings"],
)
@pytest.mark.parametrize("has_adapter", [False, True])
def test_reward(batch, has_adapter):
  weight = np.repeat(np.arange(8.0), small.B // 8)  # the first has none
  batch = dataclasses.replace(batch, weight=jnp.asarray(weight, jnp.float32))
  update = reward.make_reward_update(small.score_fn, small.SGD)
  params, frozen = small.scalar_params(), {}
  if has_adapter:
    base = small.language_model_params()
    params = {"adapter": random_adapter(base), "head": params["head"]}
    frozen = frozen_base(base, DROPOUT)
  state = create_train_state(params, small.SGD, jax.random.key(0))
  cfg = reward.RewardConfig(center_coef=0.01)
  two = dataclasses.replace(cfg, num_microbatches=2)
  one = jax.jit(update)(state, batch, cfg, frozen)
  _assert_same(_pmap(update)(state, batch, two, frozen), one)


# --- PPO ----------------------------------------------------------------------

MODEL = functions.make_policy_value(small.CONFIG, small.CONFIG)
SCORE_ROLLOUT = ppo.make_score_rollout(MODEL, small.MODEL)
UPDATE = ppo.make_ppo_update(MODEL, small.SGD)
PPO_CFG = ppo.PPOConfig(
    temperature=small.TEMPERATURE,
    kl_controller="adaptive",
    kl_horizon=100.0,
    whiten_rewards=True,
    num_epochs=2,
    num_minibatches=2,
    ptx_coef=0.5,
    entropy_coef=0.01,
)
SCORE = jnp.asarray(np.random.default_rng(0).normal(size=small.B), jnp.float32)


def _params():
  return {
      "policy": small.language_model_params(),
      "value": small.scalar_params(),
  }


def _state():
  return ppo.create_ppo_state(_params(), small.SGD, jax.random.key(0), PPO_CFG)


def _score_args(cfg=PPO_CFG):
  return (
      _params(),
      small.language_model_params(seed=5),
      small.sampled_rollout(),
      SCORE,
      jnp.float32(0.1),
      cfg,
  )


@pytest.fixture(scope="module")
def scored():
  return jax.jit(SCORE_ROLLOUT)(*_score_args())


@pytest.fixture(scope="module")
def updated(scored):
  return jax.jit(UPDATE)(_state(), scored[0], small.lm_batch(), PPO_CFG)


@pytest.mark.parametrize("num_devices, num_microbatches", [(8, 1), (4, 2)])
def test_ppo_scores_and_whitens_over_all_devices(
    scored, num_devices, num_microbatches
):
  tokens = np.asarray(scored[0].rollout.completion_mask).reshape(8, -1).sum(1)
  assert len(set(tokens)) > 3
  cfg = dataclasses.replace(PPO_CFG, num_microbatches=num_microbatches)
  step = _pmap(SCORE_ROLLOUT, num_devices, (2, 3), gives_rows=True)
  actual = step(*_score_args(cfg))
  assert len(actual[0].advantages.sharding.device_set) == num_devices
  _assert_same(actual, scored)


@pytest.mark.parametrize("num_devices, num_microbatches", [(8, 1), (4, 2)])
def test_ppo_updates_on_the_same_minibatches(
    scored, updated, num_devices, num_microbatches
):
  cfg = dataclasses.replace(PPO_CFG, num_microbatches=num_microbatches)
  step = _pmap(UPDATE, num_devices, rows=(1, 2))
  args = (_state(), scored[0], small.lm_batch(), cfg)
  actual = step(*args)
  _assert_same(actual, updated)
  assert actual[0].kl_coef != PPO_CFG.kl_coef
  # Not whatever the minibatches are: others are another step.
  other = dataclasses.replace(
      args[0],
      train=dataclasses.replace(args[0].train, rng=jax.random.key(1)),
  )
  with pytest.raises(AssertionError):
    assert_close(
        step(other, *args[1:])[0].train.params, updated[0].train.params
    )


def test_ppo_of_an_adapter_without_ptx(scored):
  base, head = small.language_model_params(), small.scalar_params()["head"]
  params = {
      "policy": {"adapter": random_adapter(base)},
      "value": {"adapter": random_adapter(base, seed=5), "head": head},
  }
  state = ppo.create_ppo_state(params, small.SGD, jax.random.key(0), PPO_CFG)
  cfg = dataclasses.replace(PPO_CFG, ptx_coef=0.0, kl_controller="fixed")
  args = (state, scored[0], None, cfg, frozen_base(base))
  _assert_same(_pmap(UPDATE, rows=(1, 2))(*args), jax.jit(UPDATE)(*args))


def test_ppo_stops_at_the_same_minibatch(scored):
  # Between the KL of the second minibatch and that of the third.
  for limit, steps in ((-1.0, 1), (1e-9, 2), (np.inf, 4)):
    cfg = dataclasses.replace(PPO_CFG, max_update_kl=limit)
    args = (_state(), scored[0], small.lm_batch(), cfg)
    actual = _pmap(UPDATE, rows=(1, 2))(*args)
    assert int(actual[0].train.step) == steps
    _assert_same(actual, jax.jit(UPDATE)(*args))


def test_nan_on_two_devices_stops_the_step_on_all(scored):
  rows = jnp.array([3, 9])
  bad = dataclasses.replace(
      scored[0], advantages=scored[0].advantages.at[rows].set(jnp.nan)
  )
  cfg = dataclasses.replace(PPO_CFG, num_epochs=1, num_minibatches=1)
  state, metrics = _pmap(UPDATE, rows=(1, 2))(
      _state(), bad, small.lm_batch(), cfg
  )
  assert_trees_equal(state.train.params, _params())
  assert int(state.train.skipped_steps) == 1
  # Once, not once for every device.
  for name in (gradient.NONFINITE + "loss", gradient.NONFINITE_STEPS):
    assert float(metrics[name].total) == float(metrics[name].count) == 1, name
  assert float(metrics["optimizer/grad_norm"].count) == 0


def test_one_step_of_either_follows_the_other():
  batch = small.lm_batch()
  by_jit, by_pmap = jax.jit(SFT), _pmap(SFT)
  expected, _ = by_jit(by_jit(_sft_state(), batch, SFT_CFG)[0], batch, SFT_CFG)
  for first, second in ((by_jit, by_pmap), (by_pmap, by_jit)):
    state, _ = first(_sft_state(), batch, SFT_CFG)
    state, _ = second(state, batch, SFT_CFG)
    assert_close(state.params, expected.params)
