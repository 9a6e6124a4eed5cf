"""PPO on tables: every number against an oracle or a hand computation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import metrics as metrics_lib
from rlhf_jax.types import Rollout
from rlhf_jax.updates import ppo
from tests.reference import ppo as reference
from tests.updates import tables
from tests.updates.small import assert_trees_close, assert_trees_equal

LEARNING_RATE = 5.0
SGD = optax.sgd(LEARNING_RATE)
KL_COEF = jnp.float32(0.3)
SCORE = jnp.asarray([2.0, -1.0, 4.0, 0.5], jnp.float32)
CFG = ppo.PPOConfig(temperature=0.7, num_epochs=2)

score_rollout = jax.jit(
    ppo.make_score_rollout(tables.MODEL, tables.REF_MODEL)
)
update = jax.jit(ppo.make_ppo_update(tables.MODEL, SGD))


def _state(cfg=CFG, seed=0):
  params, _ = tables.random_tables(seed)
  return ppo.create_ppo_state(params, SGD, jax.random.key(seed), cfg)


def _scored(cfg=CFG, score=SCORE, seed=0, **rollout):
  params, ref_table = tables.random_tables(seed)
  rollout = tables.make_rollout(seed, **rollout)
  return score_rollout(params, ref_table, rollout, score, KL_COEF, cfg)


def _cfg(**changes):
  return dataclasses.replace(CFG, **changes)


def _assert_rows(actual, rows, mask, **tolerance):
  for x, row, real in zip(np.asarray(actual), rows, mask, strict=True):
    np.testing.assert_allclose(x[real == 1], row, **tolerance)


# One configuration a program; gamma and lambda ride along as data.
@pytest.mark.parametrize(
    "changes",
    [
        {"kl_estimator": "k1"},
        {"kl_estimator": "k2", "whiten_rewards": True, "gae_lambda": 1.0},
        {
            "kl_estimator": "k3",
            "whiten_advantages": False,
            "gamma": 0.9,
            "gae_lambda": 0.0,
        },
        {
            "kl_estimator": "exact",
            "replace_missing_eos": False,
            "whiten_rewards": True,
            "whiten_advantages": False,
            "gamma": 0.5,
            "num_microbatches": 2,
        },
    ],
    ids=lambda changes: changes["kl_estimator"],
)
def test_scored_rollout_and_update_match_a_float64_oracle(changes):
  cfg = _cfg(
      entropy_coef=0.02,
      vf_coef=0.5,
      missing_eos_score=-1.5,
      cliprange=0.15,
      **changes,
  )
  params, ref_table = tables.random_tables()
  rollout = tables.make_rollout()
  mask = np.asarray(rollout.completion_mask)
  scored, metrics = score_rollout(
      params, ref_table, rollout, SCORE, KL_COEF, cfg
  )
  expected, expected_metrics = reference.score_rollout(
      np.asarray(params["policy"], np.float64),
      np.asarray(params["value"], np.float64),
      np.asarray(ref_table, np.float64),
      rollout,
      np.asarray(SCORE, np.float64),
      float(KL_COEF),
      cfg,
  )
  np.testing.assert_allclose(scored.score, expected.pop("score"))
  for name, rows in expected.items():
    _assert_rows(getattr(scored, name), rows, mask, atol=3e-5, err_msg=name)
  for name in ("kl", "rewards", "advantages", "returns"):
    assert not np.asarray(getattr(scored, name))[mask == 0].any(), name
  _assert_metrics(metrics, expected_metrics)

  state, metrics = update(_state(cfg), scored, None, cfg)
  expected["score"] = scored.score
  policy, value, expected_metrics = reference.update(
      params["policy"], params["value"], rollout, expected, cfg, LEARNING_RATE
  )
  assert expected_metrics["ppo/clip_fraction"] > 0
  assert expected_metrics["ppo/value_clip_fraction"] > 0
  _assert_metrics(metrics, expected_metrics)
  np.testing.assert_allclose(
      state.train.params["policy"], policy, atol=5e-5, rtol=1e-4
  )
  np.testing.assert_allclose(
      state.train.params["value"], value, atol=5e-5, rtol=1e-4
  )


def _assert_metrics(metrics, expected):
  actual = metrics_lib.compute(metrics)
  for name, number in expected.items():
    np.testing.assert_allclose(
        actual[name], number, atol=2e-4, rtol=1e-4, err_msg=name
    )


def _golden(replace_missing_eos):
  """Two rows of two words: the policy is uniform, the reference 3 to 1."""
  ref_row = jnp.log(jnp.asarray([0.75, 0.25], jnp.float32))
  ref_table = jnp.broadcast_to(ref_row[None, None], (2, 4, 2))
  params = {
      "policy": jnp.zeros((2, 4, 2), jnp.float32),
      "value": jnp.asarray(
          [[0.5, 0.25, 9.0, 9.0], [0.0, 0.5, -0.5, 9.0]], jnp.float32
      ),
  }
  rollout = Rollout(
      prompts=jnp.asarray([[0], [1]], jnp.int32),
      prompt_mask=jnp.ones((2, 1), jnp.int32),
      completions=jnp.asarray([[0, 1, 0], [1, 1, 0]], jnp.int32),
      completion_mask=jnp.asarray([[1, 1, 0], [1, 1, 1]], jnp.int32),
      logprobs=jnp.full((2, 3), np.log(0.5), jnp.float32),
      ended=jnp.asarray([True, False]),
  )
  cfg = ppo.PPOConfig(
      temperature=1.0,
      gae_lambda=0.5,
      whiten_advantages=False,
      replace_missing_eos=replace_missing_eos,
  )
  score = jnp.asarray([1.0, 5.0], jnp.float32)
  return score_rollout(
      params, ref_table, rollout, score, jnp.float32(0.1), cfg
  )


def test_score_lands_on_the_last_real_token_by_hand_computation():
  scored, metrics = _golden(replace_missing_eos=True)
  # ln(.5 / .75) = -0.4054651 for word 0, ln(.5 / .25) = 0.6931472 for word 1.
  low, high = -0.4054651, 0.6931472
  np.testing.assert_allclose(
      scored.kl, [[low, high, 0.0], [high, high, low]], atol=1e-6
  )
  # -0.1 kl; + 1 on token 1 of row 0; - 1, as it never ended, on token 2 of 1.
  np.testing.assert_allclose(
      scored.rewards,
      [[0.0405465, 0.9306853, 0.0], [-0.0693147, -0.0693147, -0.9594535]],
      atol=1e-6,
  )
  # A_t = r_t + V_{t+1} - V_t + A_{t+1} / 2, from the right.
  np.testing.assert_allclose(
      scored.advantages,
      [[0.1308892, 0.6806853, 0.0], [-0.2188354, -1.2990415, -0.4594535]],
      atol=1e-6,
  )
  np.testing.assert_allclose(
      scored.returns,
      [[0.6308892, 0.9306853, 0.0], [-0.2188354, -0.7990415, -0.9594535]],
      atol=1e-6,
  )
  numbers = metrics_lib.compute(metrics)
  assert numbers["ppo/score"] == 3.0
  assert numbers["ppo/score_after_eos_rule"] == 0.0
  assert numbers["ppo/ended"] == 0.5
  assert numbers["ppo/completion_length"] == 2.5
  assert numbers["ppo/rollout_logprob_gap"] == 0.0


def test_missing_eos_penalty_is_on_by_default_and_off_only_when_asked():
  assert ppo.PPOConfig().replace_missing_eos
  assert ppo.PPOConfig().missing_eos_score == -1.0
  on, _ = _golden(replace_missing_eos=True)
  off, _ = _golden(replace_missing_eos=False)
  np.testing.assert_array_equal(on.score, [1.0, -1.0])
  np.testing.assert_array_equal(off.score, [1.0, 5.0])
  np.testing.assert_allclose(off.rewards - on.rewards, [[0] * 3, [0, 0, 6.0]])


def test_a_coefficient_is_data_and_compiles_nothing():
  score_step = jax.jit(
      ppo.make_score_rollout(tables.MODEL, tables.REF_MODEL)
  )
  update_step = jax.jit(ppo.make_ppo_update(tables.MODEL, SGD))
  params, ref_table = tables.random_tables()
  rollout = tables.make_rollout()
  coefficients = [
      field.name
      for field in dataclasses.fields(ppo.PPOConfig)
      if not field.metadata.get("static")
  ]
  assert {"kl_coef", "cliprange", "gamma", "temperature"} <= set(coefficients)
  cfg = _cfg(kl_controller="adaptive")
  state = _state(cfg)
  for changed in [None, *coefficients]:
    new = cfg if changed is None else dataclasses.replace(
        cfg, **{changed: 0.625}
    )
    scored, _ = score_step(
        params, ref_table, rollout, SCORE, state.kl_coef, new
    )
    state, _ = update_step(state, scored, None, new)
  assert score_step._cache_size() == 1
  assert update_step._cache_size() == 1


def test_minibatches_visit_every_episode_once_an_epoch():
  # Without padding a quarter of the rows has a quarter of the tokens, and the
  # rows of a table share nothing: each must move four times as far.
  full = dict(lengths=(3, 3, 3, 3))
  whole, parts = _cfg(num_epochs=1), _cfg(num_epochs=1, num_minibatches=4)
  scored, _ = _scored(whole, **full)
  before = _state().train.params
  moved = lambda cfg: jax.tree.map(
      jnp.subtract, update(_state(), scored, None, cfg)[0].train.params, before
  )
  once = moved(whole)
  assert np.abs(np.asarray(once["policy"])[:, :-1]).max(axis=(1, 2)).min() > 0
  assert_trees_close(
      moved(parts), jax.tree.map(lambda x: 4 * x, once), atol=1e-5
  )


def test_early_stop_on_kl_skips_the_remaining_minibatches():
  four = _cfg(num_epochs=4)
  scored, _ = _scored()
  unstopped, _ = update(_state(), scored, None, CFG)
  limit = dataclasses.replace(four, max_update_kl=1e-6)
  stopped, metrics = update(_state(), scored, None, limit)
  # The first step sees no KL, the second does and is the last one.
  assert int(stopped.train.step) == 2
  assert_trees_equal(stopped.train.params, unstopped.train.params)
  assert float(metrics["ppo/stopped_early"].total) == 1
  assert int(metrics["ppo/ratio"].count) == 2 * sum(tables.LENGTHS)
  free, metrics = update(_state(), scored, None, four)
  assert int(free.train.step) == 4
  assert float(metrics["ppo/stopped_early"].total) == 0


@pytest.mark.parametrize(
    "kl, moves", [(0.1, -0.2), (5.0, -1 / 6), (6.0, 0.0), (6.6, 0.1), (50, 0.2)]
)
def test_adaptive_controller_moves_kl_coef_the_right_way(kl, moves):
  cfg = _cfg(kl_controller="adaptive", kl_target=6.0, kl_horizon=100.0)
  scored, _ = _scored(cfg)
  scored = dataclasses.replace(
      scored, kl=jnp.zeros((4, 3), jnp.float32).at[:, 0].set(kl)
  )
  state, _ = update(_state(cfg), scored, None, cfg)
  # Four episodes of a horizon of a hundred.
  expected = cfg.kl_coef * (1 + moves * 4 / 100)
  np.testing.assert_allclose(state.kl_coef, expected, rtol=1e-6)
  assert int(state.iteration) == 1


def test_fixed_controller_leaves_kl_coef_alone():
  scored, _ = _scored()
  scored = dataclasses.replace(scored, kl=scored.kl + 50)
  state, _ = update(_state(), scored, None, CFG)
  assert float(state.kl_coef) == np.float32(CFG.kl_coef)


def test_nan_in_the_rollout_changes_neither_params_nor_controller():
  cfg = _cfg(kl_controller="adaptive")
  scored, _ = _scored(cfg, score=SCORE.at[1].set(jnp.nan))
  scored = dataclasses.replace(scored, kl=scored.kl.at[1].set(jnp.nan))
  before = _state(cfg)
  state, metrics = update(before, scored, None, cfg)
  assert_trees_equal(state.train.params, before.train.params)
  assert_trees_equal(state.train.opt_state, before.train.opt_state)
  assert float(state.kl_coef) == float(before.kl_coef)
  assert int(state.train.step) == int(state.train.skipped_steps) == 2
  assert int(state.iteration) == 1
  assert float(metrics["nonfinite/loss"].total) == 2
  assert float(metrics["nonfinite/policy"].total) == 2
  after, _ = update(state, _scored(cfg)[0], None, cfg)
  assert int(after.train.skipped_steps) == 0 and int(after.train.step) == 4


def test_padding_of_a_scored_rollout_counts_for_nothing():
  scored, _ = _scored()
  real = scored.rollout.completion_mask == 1
  spoiled = {
      name: jnp.where(real, getattr(scored, name), jnp.float32(1e4))
      for name in ("values", "advantages", "returns", "ref_logprobs")
  }
  clean, clean_metrics = update(_state(), scored, None, CFG)
  state, metrics = update(
      _state(), dataclasses.replace(scored, **spoiled), None, CFG
  )
  assert_trees_equal(state.train.params, clean.train.params)
  assert_trees_equal(metrics, clean_metrics)


def test_same_seed_gives_bitwise_the_same_update_and_another_does_not():
  cfg = _cfg(num_minibatches=2)
  scored, _ = _scored(cfg)
  run = lambda seed: update(
      dataclasses.replace(
          _state(),
          train=dataclasses.replace(_state().train, rng=jax.random.key(seed)),
      ),
      scored,
      None,
      cfg,
  )[0].train.params
  assert_trees_equal(run(0), run(0))
  others = [run(seed)["policy"] for seed in (1, 2, 3)]
  assert any(bool(jnp.any(x != run(0)["policy"])) for x in others)


def test_rows_that_do_not_divide_into_minibatches_are_an_error():
  cfg = _cfg(num_minibatches=3)
  scored, _ = _scored(cfg)
  with pytest.raises(ValueError, match="4 rows does not divide into 3 parts"):
    update(_state(), scored, None, cfg)
