"""PPO on a tiny transformer: what must not depend on how it is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import device_mesh
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.models import functions, heads
from rlhf_jax.updates import gradient, ppo, sft
from tests.reference import losses as reference
from tests.reference import transformer
from tests.updates import small
from tests.updates.small import assert_trees_close, assert_trees_equal

KL_COEF = jnp.float32(0.1)
CFG = ppo.PPOConfig(
    temperature=small.TEMPERATURE,
    num_epochs=2,
    num_minibatches=2,
    ptx_coef=0.5,
    entropy_coef=0.01,
)
# Stops after the first minibatch, whose KL is 0: a single step.
ONE_STEP = dataclasses.replace(CFG, max_update_kl=-1.0)


@functools.cache
def _programs(**changes):
  """(score_rollout, update), jitted."""
  config = dataclasses.replace(small.CONFIG, **changes)
  fn = functions.make_policy_value(config, config)
  ref_fn = functions.make_language_model(config)
  return (
      jax.jit(ppo.make_score_rollout(fn, ref_fn)),
      jax.jit(ppo.make_ppo_update(fn, small.SGD)),
  )


def _params():
  return {
      "policy": small.language_model_params(),
      "value": small.scalar_params(),
  }


def _state():
  return ppo.create_ppo_state(_params(), small.SGD, jax.random.key(0), CFG)


def _ref_params():
  return small.language_model_params(seed=5)


SCORE = jnp.asarray(np.random.default_rng(0).normal(size=small.B), jnp.float32)


def _score(cfg=CFG, **changes):
  score_rollout, _ = _programs(**changes)
  rollout = small.sampled_rollout()
  return score_rollout(_params(), _ref_params(), rollout, SCORE, KL_COEF, cfg)


@pytest.fixture(scope="module")
def scored():
  return _score()[0]


@pytest.fixture(scope="module")
def updated(scored):
  return _programs()[1](_state(), scored, small.lm_batch(), CFG)


def test_rollout_logprobs_equal_those_of_the_update_at_temperature():
  scored, metrics = _score()
  rollout = scored.rollout
  mask = np.asarray(rollout.completion_mask)
  assert 0 < mask.sum() < mask.size and 0 < rollout.ended.sum() < small.B
  np.testing.assert_allclose(
      scored.old_logprobs[mask == 1], rollout.logprobs[mask == 1], atol=1e-5
  )
  assert metrics_lib.compute(metrics)["ppo/rollout_logprob_gap"] < 1e-6
  # At any other temperature they would not be.
  other = dataclasses.replace(CFG, temperature=1.0)
  _, metrics = _score(other)
  assert metrics_lib.compute(metrics)["ppo/rollout_logprob_gap"] > 0.1


def test_ratio_is_one_on_the_first_minibatch_in_float32(scored, updated):
  numbers = metrics_lib.compute(updated[1])
  assert numbers["ppo/first_ratio_gap"] < 1e-6
  assert numbers["ppo/ratio_gap"] > 1e-3
  # Had another policy sampled, every ratio would be 1.1 and the gap show it.
  other = dataclasses.replace(
      scored, old_logprobs=scored.old_logprobs - np.float32(np.log(1.1))
  )
  _, metrics = _programs()[1](_state(), other, small.lm_batch(), CFG)
  gap = metrics_lib.compute(metrics)["ppo/first_ratio_gap"]
  np.testing.assert_allclose(gap, 0.1, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_old_logprobs_may_be_those_of_the_sampler(shared):
  config = small.CONFIG
  model = functions.make_policy_value(config, None if shared else config)
  ref_model = functions.make_language_model(config)
  score_rollout = jax.jit(ppo.make_score_rollout(model, ref_model))
  params = _params()
  if shared:
    params["value"] = params["value"]["head"]
  rollout = small.sampled_rollout()
  args = (params, _ref_params(), rollout, SCORE, KL_COEF)
  recomputed, all_metrics = score_rollout(*args, CFG)
  cfg = dataclasses.replace(CFG, old_logprobs="rollout")
  reused, metrics = score_rollout(*args, cfg)
  np.testing.assert_array_equal(reused.old_logprobs, rollout.logprobs)
  assert_trees_close(reused, recomputed, atol=1e-5)
  of_logits = {
      "ppo/kl_exact",
      "ppo/entropy",
      "ppo/rollout_logprob_gap",
      "ppo/importance_weight",
  }
  assert set(all_metrics) - set(metrics) == of_logits
  for name, number in metrics_lib.compute(metrics).items():
    expected = metrics_lib.compute(all_metrics)[name]
    np.testing.assert_allclose(number, expected, rtol=1e-4, atol=1e-5)


def test_the_samplers_old_logprobs_spare_the_policys_pass():
  def flops(cfg):
    lowered = _programs()[0].lower(
        _params(), _ref_params(), small.sampled_rollout(), SCORE, KL_COEF, cfg
    )
    return lowered.compile().cost_analysis()["flops"]

  reused = dataclasses.replace(CFG, old_logprobs="rollout")
  # Two trunks and a head instead of three and two.
  assert flops(reused) < 0.75 * flops(CFG)


def test_ratio_is_close_to_one_on_the_first_minibatch_in_bfloat16():
  # The two programs may round bfloat16's last bits differently; what
  # they scored and what they differentiate is the same function.
  cfg = dataclasses.replace(CFG, num_epochs=1, ptx_coef=0.0)
  scored, _ = _score(cfg, dtype="bfloat16")
  _, metrics = _programs(dtype="bfloat16")[1](_state(), scored, None, cfg)
  assert metrics_lib.compute(metrics)["ppo/first_ratio_gap"] < 0.01


def _float64_logprobs(params, rollout):
  """Of the completions' tokens, by the numpy oracle; 0 on padding."""
  out = np.zeros(rollout.completions.shape)
  for r, row in enumerate(out):
    prompt = np.asarray(rollout.prompts[r])[rollout.prompt_mask[r] == 1]
    real = np.asarray(rollout.completion_mask[r]) == 1
    tokens = np.append(prompt, np.asarray(rollout.completions[r])[real])
    logits = transformer.forward(params, small.CONFIG, tokens)
    before = slice(len(prompt) - 1, None)
    row[real] = reference.token_logprobs(
        logits[before], tokens[before], small.TEMPERATURE
    )
  return out


def _assert_differ_by_rounding_alone(split, whole):
  """1e-6 apart, or each as near to float64 as float32 is in one piece.

  A product over fewer rows may round another way, so that the two fall on
  either side of the true number: -2.7907495 and -2.7907481 of -2.7907485.
  """
  policy = _float64_logprobs(_params()["policy"], whole.rollout)
  ref_policy = _float64_logprobs(_ref_params(), whole.rollout)
  exact = {
      "old_logprobs": policy,
      "ref_logprobs": ref_policy,
      "kl": policy - ref_policy,
  }
  of = lambda scored, name: np.asarray(getattr(scored, name), np.float64)
  error = lambda scored, name: np.abs(of(scored, name) - exact[name])
  own_error = max(error(whole, name).max() for name in exact)
  assert own_error < 5e-6
  for name in exact:
    far = np.abs(of(split, name) - of(whole, name)) > 1e-6
    assert (error(split, name)[far] <= own_error).all(), name
    # It is the exception: what is off everywhere is not rounding.
    assert far.mean() < 0.1, name
  rest = dict.fromkeys(exact, 0)
  assert_trees_close(
      dataclasses.replace(split, **rest),
      dataclasses.replace(whole, **rest),
      atol=1e-6,
  )


def test_microbatches_change_nothing_in_scoring_and_update(scored, updated):
  cfg = dataclasses.replace(CFG, num_microbatches=4)
  metrics = _score()[1]
  scored_4, metrics_4 = _score(cfg)
  _assert_differ_by_rounding_alone(scored_4, scored)
  assert_trees_close(metrics_4, metrics, atol=1e-5, rtol=1e-6)
  state, metrics = updated
  state_4, metrics_4 = _programs()[1](_state(), scored, small.lm_batch(), cfg)
  assert_trees_close(state_4.train.params, state.train.params, atol=1e-6)
  compute = metrics_lib.compute
  assert_trees_close(
      compute(metrics_4), compute(metrics), atol=1e-6, rtol=1e-6
  )


def test_devices_change_nothing_in_scoring_and_update(scored, updated):
  mesh = device_mesh.make_mesh(device_mesh.MeshConfig(data=8))
  score_rollout, update = _programs()
  rollout = device_mesh.shard_rows(scored.rollout, mesh)
  state = device_mesh.replicate(_state(), mesh)
  scored_8, metrics_8 = score_rollout(
      state.train.params,
      device_mesh.replicate(_ref_params(), mesh),
      rollout,
      device_mesh.shard_rows(SCORE, mesh),
      KL_COEF,
      CFG,
  )
  assert len(scored_8.advantages.sharding.device_set) == 8
  assert_trees_close(scored_8, scored, atol=1e-5)
  compute = metrics_lib.compute
  assert_trees_close(
      compute(metrics_8), compute(_score()[1]), rtol=1e-5, atol=1e-5
  )
  ptx = device_mesh.shard_rows(small.lm_batch(), mesh)
  state_8, metrics_8 = update(state, scored_8, ptx, CFG)
  assert state_8.kl_coef.sharding.is_fully_replicated
  assert_trees_close(
      state_8.train.params, updated[0].train.params, atol=1e-5
  )
  assert_trees_close(
      compute(metrics_8), compute(updated[1]), rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize("ratio,weight", [(0.8, 0.8), (1.0, 1.0), (4.0, 2.0)])
def test_importance_weighs_the_policys_loss_alone(scored, ratio, weight):
  """A token counts as its probability over the sampler's, at most the cap."""
  cfg = dataclasses.replace(
      CFG, num_epochs=1, num_minibatches=1, ptx_coef=0.0, entropy_coef=0.0
  )
  sampled = dataclasses.replace(
      scored.rollout,
      logprobs=scored.old_logprobs - np.float32(np.log(ratio)),
  )
  older = dataclasses.replace(scored, rollout=sampled)
  _, update = _programs()
  step = lambda cfg: jax.tree.map(
      jnp.subtract,
      update(_state(), older, None, cfg)[0].train.params,
      _params(),
  )
  corrected = dataclasses.replace(cfg, importance_correction=True)
  plain, weighed = step(cfg), step(corrected)
  assert_trees_close(
      weighed["policy"],
      jax.tree.map(lambda x: np.float32(weight) * x, plain["policy"]),
      atol=1e-6,
  )
  assert_trees_close(weighed["value"], plain["value"], atol=1e-7)


def _real(tree, mask):
  """Every array [B, C] of `tree` with its padding made equal."""
  return jax.tree.map(
      lambda x: jnp.where(mask == 1, x, 0) if x.shape == mask.shape else x, tree
  )


def test_pad_equal_to_eos_changes_nothing_from_rollout_to_update():
  plain = small.sampled_rollout()
  rollout = small.sampled_rollout(pad_id=small.EOS)
  mask = rollout.completion_mask
  # Some rows end by the very token that fills them up; it is real once.
  ends = (rollout.completions == small.EOS) & (mask == 1)
  assert 0 < ends.any(axis=1).sum() < small.B and ends.sum(axis=1).max() == 1
  assert bool(jnp.all(rollout.completions[mask == 0] == small.EOS))
  assert_trees_equal(_real(rollout, mask), _real(plain, mask))

  cfg = dataclasses.replace(CFG, ptx_coef=0.0)
  score_rollout, update = _programs()
  outcomes = []
  for each in (rollout, plain):
    scored, metrics = score_rollout(
        _params(), _ref_params(), each, SCORE, KL_COEF, cfg
    )
    real = mask == 1
    np.testing.assert_allclose(
        scored.old_logprobs[real], each.logprobs[real], atol=1e-5
    )
    state, update_metrics = update(_state(), scored, None, cfg)
    # Nor is an end token left out of both.
    assert int(metrics["ppo/value"].count) == int(mask.sum())
    assert int(update_metrics["ppo/ratio"].count) == 2 * int(mask.sum())
    outcomes.append(
        (_real(scored, mask), metrics, state.train.params, update_metrics)
    )
  assert_trees_equal(*outcomes)


def test_every_end_token_counts_as_an_end():
  ends = (2, 5, 7)
  rollout = small.sampled_rollout(pad_id=5, other_eos_ids=ends)
  mask = np.asarray(rollout.completion_mask) == 1
  real = np.where(mask, rollout.completions, -1)
  ended = np.isin(real, (small.EOS, *ends)).any(axis=1)
  by_others = np.isin(real, ends).any(axis=1)
  assert 0 < by_others.sum() and not ended.all()
  np.testing.assert_array_equal(rollout.ended, ended)
  scored, metrics = _programs()[0](
      _params(), _ref_params(), rollout, SCORE, KL_COEF, CFG
  )
  np.testing.assert_array_equal(
      scored.score, np.where(ended, SCORE, CFG.missing_eos_score)
  )
  assert float(metrics["ppo/ended"].total) == ended.sum()


def test_amount_of_padding_changes_nothing_in_scoring_and_update():
  rollout = small.sampled_rollout()
  # Two more columns before the prompts, three behind the completions.
  left = lambda x, fill=0: jnp.pad(x, ((0, 0), (2, 0)), constant_values=fill)
  right = lambda x, fill=0: jnp.pad(x, ((0, 0), (0, 3)), constant_values=fill)
  wider = dataclasses.replace(
      rollout,
      prompts=left(rollout.prompts, 9),
      prompt_mask=left(rollout.prompt_mask),
      completions=right(rollout.completions, 9),
      completion_mask=right(rollout.completion_mask),
      logprobs=right(rollout.logprobs),
  )
  cfg = dataclasses.replace(CFG, ptx_coef=0.0)
  score_rollout, update = _programs()
  outcomes = []
  for each in (rollout, wider):
    scored, metrics = score_rollout(
        _params(), _ref_params(), each, SCORE, KL_COEF, cfg
    )
    state, update_metrics = update(_state(), scored, None, cfg)
    numbers = metrics_lib.compute(metrics | update_metrics)
    outcomes.append((numbers, state.train.params))
  (expected, params), (actual, wider_params) = outcomes
  assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5)
  assert_trees_close(wider_params, params, atol=1e-5)


def test_ptx_adds_its_coefficient_times_the_language_models_gradient(scored):
  ptx = small.lm_batch()
  update = _programs()[1]
  step = lambda coef: update(
      _state(), scored, ptx, dataclasses.replace(ONE_STEP, ptx_coef=coef)
  )
  (with_ptx, metrics), (without, _) = step(2.0), step(0.0)
  assert int(with_ptx.train.step) == 1
  part = jax.tree.map(lambda x: x[0], gradient.split_rows(ptx, 2))
  num_targets = part.loss_mask.sum()
  (loss, _), grads = jax.jit(
      jax.value_and_grad(
          lambda params: sft.sft_objective(
              params, part, small.MODEL, sft.SFTConfig(), num_targets
          ),
          has_aux=True,
      )
  )(small.language_model_params())
  difference = jax.tree.map(
      lambda a, b: (b - a) / small.LEARNING_RATE,
      with_ptx.train.params,
      without.train.params,
  )
  assert_trees_close(
      difference["policy"], jax.tree.map(lambda x: 2 * x, grads), atol=3e-6
  )
  assert not any(x.any() for x in jax.tree.leaves(difference["value"]))
  np.testing.assert_allclose(
      metrics_lib.compute(metrics)["ppo/ptx_loss"], loss, rtol=1e-6
  )


def _value_only(scored):
  """(scored, cfg) of which the value loss alone has a gradient."""
  cfg = dataclasses.replace(ONE_STEP, entropy_coef=0.0, ptx_coef=0.0)
  advantages = jnp.zeros_like(scored.advantages)
  return dataclasses.replace(scored, advantages=advantages), cfg


def test_value_loss_of_a_separate_network_never_touches_the_policy(scored):
  scored, cfg = _value_only(scored)
  before = _state().train.params
  after = _programs()[1](_state(), scored, small.lm_batch(), cfg)[0].train
  assert_trees_equal(after.params["policy"], before["policy"])
  moved = jax.tree.map(
      lambda x, y: bool(jnp.any(x != y)), after.params["value"], before["value"]
  )
  assert all(jax.tree.leaves(moved))


def test_value_loss_of_a_shared_network_moves_the_policys_trunk(scored):
  scored, cfg = _value_only(scored)
  fn = functions.make_policy_value(small.CONFIG, None)
  params = _params() | {"value": _params()["value"]["head"]}
  objective = lambda params: ppo.ppo_objective(
      params, scored, fn, cfg, jnp.float32(1)
  )[0]
  grads = jax.jit(jax.grad(objective))(params)
  moved = jax.tree.map(lambda x: bool(jnp.any(x != 0)), grads)
  assert all(jax.tree.leaves(moved["policy"]["trunk"]))
  assert all(jax.tree.leaves(moved["value"]))


def test_values_are_read_before_the_tokens_that_they_judge(scored):
  # The value of the state before token i cannot depend on token i: cutting the
  # completion there leaves it as it is.
  score = jax.jit(heads.ScalarModel(small.CONFIG).apply)
  rollout = scored.rollout
  tokens, mask = functions.whole_sequence(rollout)
  values = score({"params": small.scalar_params()}, tokens, mask)
  before = slice(small.P - 1, small.P + small.C - 1)
  np.testing.assert_allclose(scored.values, values[:, before], atol=1e-6)


def test_nan_score_is_not_applied_and_the_metrics_name_the_tensors(scored):
  before = _state()
  # The score of a row that has not ended would not be read.
  ended = jnp.argmax(scored.rollout.ended)
  assert bool(scored.rollout.ended[ended])
  bad, _ = _programs()[0](
      _params(),
      _ref_params(),
      scored.rollout,
      SCORE.at[ended].set(jnp.nan),
      KL_COEF,
      CFG,
  )
  state, metrics = _programs()[1](before, bad, small.lm_batch(), CFG)
  assert_trees_equal(state.train.params, before.train.params)
  assert int(state.train.step) == int(state.train.skipped_steps) == 4
  culprits = [
      name
      for name, metric in metrics.items()
      if name.startswith(gradient.NONFINITE) and metric.total > 0
  ]
  assert "nonfinite/loss" in culprits
  assert "nonfinite/policy/trunk/token_embedding" in culprits


def test_same_seed_gives_bitwise_the_same_update(scored, updated):
  again = _programs()[1](_state(), scored, small.lm_batch(), CFG)
  assert_trees_equal(again[0].train.params, updated[0].train.params)
  assert_trees_equal(again[1], updated[1])
