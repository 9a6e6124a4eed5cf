"""Updates that train adapters: on one frozen base, and nothing but them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import device_mesh, optim
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.generation import decode
from rlhf_jax.models import functions, heads, lora
from rlhf_jax.train_state import TrainState, create_train_state
from rlhf_jax.updates import gradient, ppo, reward, sft
from tests.models.small import random_params
from tests.updates import small
from tests.updates.small import (
  DROPOUT,
  LORA,
  assert_trees_close,
  assert_trees_equal,
  frozen_base,
  random_adapter,
)

CFG = sft.SFTConfig(z_loss_coef=0.01)
sft_update = jax.jit(sft.make_sft_update(small.MODEL, small.SGD))
reward_update = jax.jit(
    reward.make_reward_update(small.score_fn, small.SGD)
)


def _sft_state(seed=0):
  params = {"adapter": random_adapter(small.language_model_params())}
  return create_train_state(params, small.SGD, jax.random.key(seed))


def _sft(config=LORA, cfg=CFG, seed=0):
  frozen = frozen_base(small.language_model_params(), config)
  return sft_update(_sft_state(seed), small.lm_batch(), cfg, frozen)


def _reward_state():
  params = {
      "adapter": random_adapter(small.language_model_params()),
      "head": small.scalar_params()["head"],
  }
  return create_train_state(params, small.SGD, jax.random.key(0))


def _reward(config, cfg, batch):
  frozen = frozen_base(small.language_model_params(), config)
  return reward_update(_reward_state(), batch, cfg, frozen)


# --- what is trained ----------------------------------------------------------


def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule():
  base = small.language_model_params()
  adapter = _sft_state().params["adapter"]
  merged = lora.merge(base, adapter, LORA.scale)
  # A step of plain fine-tuning at the merged weights gives their gradient G;
  # with W = W_0 + s A B: dA = s G B^T, dB = s A^T G.
  plain, _ = sft_update(
      create_train_state(merged, small.SGD, jax.random.key(0)),
      small.lm_batch(),
      CFG,
  )
  state, _ = _sft()
  layers = lambda params: params["trunk"]["layers"]
  new = lora.by_projection(state.params["adapter"])
  for name, (a, b) in lora.by_projection(adapter).items():
    part, projection = name.split("/")
    before, after = (
        np.asarray(layers(x)[part][projection]["kernel"], np.float64)
        for x in (merged, plain.params)
    )
    step = (after - before).reshape(a.shape[0], a.shape[1], b.shape[2])
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    new_a, new_b = new[name]
    np.testing.assert_allclose(
        new_a - a, LORA.scale * step @ b.swapaxes(1, 2), atol=3e-6
    )
    np.testing.assert_allclose(
        new_b - b, LORA.scale * a.swapaxes(1, 2) @ step, atol=3e-6
    )


def test_state_and_optimizer_hold_the_adapter_alone():
  base = small.language_model_params()
  tx = optim.make_optimizer(optim.OptimizerConfig(learning_rate=0.01), 1)
  params = {"adapter": random_adapter(base)}
  state = create_train_state(params, tx, jax.random.key(0))
  num = sum(x.size for x in jax.tree.leaves(params))
  held = [x for x in jax.tree.leaves(state.opt_state) if x.size > 1]
  assert sum(x.size for x in held) == 2 * num  # Adam's two moments
  batch, frozen = small.lm_batch(), frozen_base(base, LORA)
  new, _ = jax.jit(sft.make_sft_update(small.MODEL, tx))(
      state, batch, CFG, frozen
  )
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert all(
      np.abs(x - y).max() > 0
      for x, y in zip(jax.tree.leaves(new.params), jax.tree.leaves(params))
  )


def test_adapters_matrices_are_decayed_as_kernels_are():
  tx = optim.make_optimizer(
      optim.OptimizerConfig(learning_rate=1.0, weight_decay=0.5), 1
  )
  params = random_adapter(small.language_model_params())
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  jax.tree.map(
      lambda u, x: np.testing.assert_allclose(u, -0.5 * x, rtol=1e-6),
      updates,
      params,
  )


# --- dropout ------------------------------------------------------------------


def test_dropout_changes_a_step_and_its_seed_decides_how():
  plain, dropped = _sft(), _sft(DROPOUT)
  other = _sft(DROPOUT, seed=1)
  loss = lambda out: metrics_lib.compute(out[1])["sft/loss"]
  assert abs(loss(plain) - loss(dropped)) > 1e-4
  assert abs(loss(dropped) - loss(other)) > 1e-4
  again = _sft(DROPOUT)
  assert_trees_equal(again[0].params, dropped[0].params)
  # The next step has other masks.
  frozen = frozen_base(small.language_model_params(), DROPOUT)
  later = dataclasses.replace(_sft_state(), step=jnp.int32(1))
  _, metrics = sft_update(later, small.lm_batch(), CFG, frozen)
  next_loss = metrics_lib.compute(metrics)["sft/loss"]
  assert abs(loss(dropped) - next_loss) > 1e-4


@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_microbatches_change_no_mask_of_dropout(num_microbatches):
  cfg = dataclasses.replace(CFG, num_microbatches=num_microbatches)
  (one, metrics), (many, metrics_many) = _sft(DROPOUT), _sft(DROPOUT, cfg)
  assert_trees_close(many.params, one.params, atol=1e-6)
  assert_trees_close(
      metrics_lib.compute(metrics_many),
      metrics_lib.compute(metrics),
      rtol=1e-5,
  )


def test_devices_change_no_mask_of_dropout():
  one, _ = _sft(DROPOUT)
  mesh = device_mesh.make_mesh(device_mesh.MeshConfig(data=8))
  eight, _ = sft_update(
      device_mesh.replicate(_sft_state(), mesh),
      device_mesh.shard_rows(small.lm_batch(), mesh),
      CFG,
      device_mesh.replicate(
          frozen_base(small.language_model_params(), DROPOUT), mesh
      ),
  )
  assert_trees_close(eight.params, one.params, atol=1e-5)


@pytest.mark.parametrize(
    "batch", [small.preference_batch(), small.ranking_batch()],
    ids=["pairs", "rankings"],
)
def test_microbatches_change_no_mask_of_a_reward_models_dropout(batch):
  cfg = reward.RewardConfig()
  one, _ = _reward(DROPOUT, cfg, batch)
  many, _ = _reward(
      DROPOUT, dataclasses.replace(cfg, num_microbatches=4), batch
  )
  assert_trees_close(many.params, one.params, atol=2e-6)
  plain, _ = _reward(LORA, cfg, batch)
  head = lambda state: state.params["head"]["kernel"]
  assert np.abs(head(plain) - head(one)).max() > 1e-4


def test_the_two_of_a_pair_lose_different_inputs():
  frozen = frozen_base(small.language_model_params(), DROPOUT)
  batch = small.preference_batch()
  # Twice the same completion: without dropout it scores the same.
  same = dataclasses.replace(
      batch,
      tokens=batch.tokens.at[:, 1].set(batch.tokens[:, 0]),
      attention_mask=batch.attention_mask.at[:, 1].set(
          batch.attention_mask[:, 0]
      ),
  )
  for config, differ in ((LORA, False), (DROPOUT, True)):
    frozen = frozen_base(small.language_model_params(), config)
    _, metrics = reward_update(
        _reward_state(), same, reward.RewardConfig(), frozen
    )
    numbers = metrics_lib.compute(metrics)
    gap = numbers["reward/score_chosen"] - numbers["reward/score_rejected"]
    assert (abs(gap) > 1e-3) == differ


# --- PPO ----------------------------------------------------------------------

POLICY_VALUE = functions.make_policy_value(small.CONFIG, small.CONFIG)
PPO_CFG = ppo.PPOConfig(
    temperature=small.TEMPERATURE, num_epochs=1, num_minibatches=2
)
score_rollout = jax.jit(ppo.make_score_rollout(POLICY_VALUE, small.MODEL))
ppo_update = jax.jit(ppo.make_ppo_update(POLICY_VALUE, small.SGD))


def _ppo_params(fresh):
  base = small.language_model_params()
  make = (
      functools.partial(lora.init, jax.random.key(3), LORA)
      if fresh
      else random_adapter
  )
  return {
      "policy": {"adapter": make(base)},
      "value": {
          "adapter": random_adapter(base, seed=5),
          "head": small.scalar_params()["head"],
      },
  }


def _score(params):
  base = small.language_model_params()
  return score_rollout(
      frozen_base(base, LORA) | params,
      base,
      small.sampled_rollout(),
      jnp.linspace(-1.0, 1.0, small.B),
      jnp.float32(0.1),
      PPO_CFG,
  )


def test_reference_is_the_base_with_the_adapter_off():
  _, fresh = _score(_ppo_params(fresh=True))
  numbers = metrics_lib.compute(fresh)
  assert numbers["ppo/kl_exact"] == 0 and numbers["ppo/kl_k3"] == 0
  # The rollout is the base's own.
  assert numbers["ppo/rollout_logprob_gap"] < 1e-5
  _, moved = _score(_ppo_params(fresh=False))
  assert metrics_lib.compute(moved)["ppo/kl_exact"] > 0.01


def test_policy_and_value_are_those_of_merged_networks():
  params, base = _ppo_params(fresh=False), small.language_model_params()
  scored, _ = _score(params)
  merged = {
      "policy": lora.merge(base, params["policy"]["adapter"], LORA.scale),
      "value": {
          "trunk": lora.merge(base, params["value"]["adapter"], LORA.scale)[
              "trunk"
          ],
          "head": params["value"]["head"],
      },
  }
  expected, _ = score_rollout(
      merged,
      base,
      small.sampled_rollout(),
      jnp.linspace(-1.0, 1.0, small.B),
      jnp.float32(0.1),
      PPO_CFG,
  )
  for name in ("old_logprobs", "ref_logprobs", "values"):
    np.testing.assert_allclose(
        getattr(scored, name), getattr(expected, name), atol=1e-4
    )


def test_an_update_moves_both_adapters_and_the_first_ratio_is_one():
  params = _ppo_params(fresh=False)
  scored, _ = _score(params)
  state = ppo.create_ppo_state(
      params, small.SGD, jax.random.key(0), PPO_CFG
  )
  frozen = frozen_base(small.language_model_params(), LORA)
  new, metrics = ppo_update(state, scored, None, PPO_CFG, frozen)
  assert metrics_lib.compute(metrics)["ppo/first_ratio_gap"] < 1e-5
  assert jax.tree.structure(new) == jax.tree.structure(state)
  for x, y in zip(
      jax.tree.leaves(new.train.params), jax.tree.leaves(params), strict=True
  ):
    assert np.abs(x - y).max() > 0


# --- memory -------------------------------------------------------------------


def _num_bytes(arrays) -> int:
  """Of distinct buffers."""
  found = {}
  for array in arrays:
    for shard in array.addressable_shards:
      found[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
  return sum(found.values())


def _tree_bytes(tree) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))


@functools.cache
def _wide():
  """A shape whose weights are most of what there is."""
  return dataclasses.replace(
      small.CONFIG, vocab_size=512, width=128, ff_dim=1024, num_layers=2
  )


def _memory_of_ppo(with_adapters: bool):
  """(bytes of one base, bytes alive through an iteration, the programs)."""
  config = _wide()
  before = jax.live_arrays()  # kept, so that no id is given anew
  others = {id(x) for x in before}
  base = random_params(heads.LanguageModel(config))
  head = heads.scalar_head_init(jax.random.key(0), config.width, zero=True)
  fresh = functools.partial(
      lora.init,
      config=lora.LoraConfig(rank=1, alpha=1.0, targets=("attention/query",)),
      base=base,
  )
  frozen = frozen_base(base, LORA) if with_adapters else {}
  params = (
      {
          "policy": {"adapter": fresh(jax.random.key(1))},
          "value": {"adapter": fresh(jax.random.key(2)), "head": head},
      }
      if with_adapters
      else jax.tree.map(
          jnp.copy,
          {"policy": base, "value": {"trunk": base["trunk"], "head": head}},
      )
  )
  tx = optim.make_optimizer(optim.OptimizerConfig(learning_rate=1e-3), 1)
  cfg = dataclasses.replace(PPO_CFG, num_minibatches=1)
  state = ppo.create_ppo_state(params, tx, jax.random.key(0), cfg)
  model = functions.make_policy_value(config, config)
  ref_model = functions.make_language_model(config)
  # As on accelerators; on a CPU a rollout has its layers' weights once more.
  generate = jax.jit(
      decode.make_generate(heads.LanguageModel(config), is_unrolled=False)
  )
  sampling = decode.SamplingConfig(max_new_tokens=3, eos_id=-1)
  prompts = jnp.ones((2, 2), jnp.int32)
  rollout_args = (
      frozen | state.train.params["policy"],
      prompts,
      prompts,
      jax.random.key(0),
      sampling,
  )
  score_args = (
      frozen | state.train.params,
      base,
      generate(*rollout_args),
      jnp.zeros(2),
      state.kl_coef,
      cfg,
  )
  score = jax.jit(ppo.make_score_rollout(model, ref_model))
  update = jax.jit(ppo.make_ppo_update(model, tx), donate_argnums=0)
  update_args = (state, score(*score_args)[0], None, cfg, frozen)
  programs = [
      program.lower(*args).compile().memory_analysis()
      for program, args in (
          (generate, rollout_args),
          (score, score_args),
          (update, update_args),
      )
  ]
  del params
  state, _ = update(*update_args)
  alive = [
      x
      for x in jax.live_arrays()
      if id(x) not in others
      and not x.is_deleted()
      and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  ]
  return _tree_bytes(base), _num_bytes(alive), programs


def test_policy_reference_and_value_hold_one_base():
  base, alive, (rollout, score, update) = _memory_of_ppo(with_adapters=True)
  assert base < alive < 1.1 * base
  # Each program reads the one base; the reference policy's is the same array,
  # given a second time. None has room for a merged copy.
  assert rollout.argument_size_in_bytes < 1.1 * base
  assert update.argument_size_in_bytes < 1.1 * base
  assert score.argument_size_in_bytes < 2.1 * base
  for program in (rollout, score, update):
    assert program.temp_size_in_bytes < base
    assert program.output_size_in_bytes < 0.1 * base


def test_ppo_takes_no_dropout():
  update = ppo.make_ppo_update(None, None)
  with pytest.raises(ValueError, match="no adapter_dropout"):
    update(None, None, None, None, {"adapter_dropout": jnp.float32(0.1)})


def test_dropout_takes_keys_of_both_kinds():
  masks = []
  for make in (jax.random.key, jax.random.PRNGKey):
    state = TrainState(
        step=jnp.int32(3), skipped_steps=0, params={}, opt_state=(), rng=make(7)
    )
    rngs = gradient.dropout_rngs({"adapter_dropout": 0.1}, state, (4, 2))
    draw = jax.vmap(jax.vmap(lambda rng: jax.random.uniform(rng, (5,))))
    masks.append(draw(rngs["row_rngs"]))
  np.testing.assert_array_equal(*masks)


def test_without_adapters_they_hold_many():
  base, alive, (_, _, update) = _memory_of_ppo(with_adapters=False)
  # Reference, policy, value, and two moments of each of these.
  assert alive > 6.5 * base
  assert update.argument_size_in_bytes > 5.5 * base
  assert update.temp_size_in_bytes > 5.5 * base
