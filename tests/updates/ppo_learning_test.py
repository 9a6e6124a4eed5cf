"""PPO learns a rule, and a KL target holds it close to its reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import optim
from rlhf_jax.generation import decode
from rlhf_jax.models import functions, heads
from rlhf_jax.updates import ppo
from tests.updates import small

SEEDS, ITERATIONS, ROWS, LENGTH = 3, 30, 32, 6
LIKED = 3
KL_TARGET = 2.0
# The controller multiplies, so a coefficient of zero stays zero: no control.
KL_COEFS = (0.0, 0.5)


@functools.cache
def _train(overlap=0):
  """score and KL of each run and iteration, [len(KL_COEFS), SEEDS, ...].

  One program for all runs: seeds and coefficients are data. With overlap, what
  is trained on was sampled by the policy of the iteration before.
  """
  config = small.CONFIG
  tx = optim.make_optimizer(
      optim.OptimizerConfig(learning_rate=0.01, epsilon=1e-5), 1
  )
  fn = functions.make_policy_value(config, None)
  generate = decode.make_generate(heads.LanguageModel(config))
  score_rollout = ppo.make_score_rollout(fn, small.MODEL)
  update = ppo.make_ppo_update(fn, tx)
  sampling = decode.SamplingConfig(max_new_tokens=LENGTH, eos_id=-1)
  cfg = ppo.PPOConfig(
      temperature=1.0,
      kl_controller="adaptive",
      kl_target=KL_TARGET,
      kl_horizon=2.0 * ROWS,
      replace_missing_eos=False,
      num_epochs=2,
      num_minibatches=2,
      importance_correction=bool(overlap),
  )
  prompts = jnp.zeros((ROWS, 1), jnp.int32)

  def sample(state, ahead):
    rng = jax.random.fold_in(ppo.iteration_rng(state, ahead), 0)
    params = state.train.params["policy"]
    mask = jnp.ones_like(prompts)
    return generate(params, prompts, mask, rng, sampling)

  def iterate(ref_params, state, _):
    rollout = sample(state, overlap)
    if overlap:
      older = state.pending
      state = dataclasses.replace(state, pending=rollout)
      rollout = older
    share = (rollout.completions == LIKED).astype(jnp.float32).mean(axis=1)
    scored, metrics = score_rollout(
        state.train.params, ref_params, rollout, 4 * share, state.kl_coef, cfg
    )
    state, _ = update(state, scored, None, cfg)
    kl = metrics["ppo/kl_exact"].total / metrics["ppo/kl_exact"].count
    weight = metrics["ppo/importance_weight"]
    return state, (share.mean(), kl, weight.total / weight.count)

  def train(rng, kl_coef):
    ref_params = functions.init_language_model(rng, config)
    head = heads.scalar_head_init(rng, config.width, zero=True)
    params = {"policy": ref_params, "value": head}
    state = ppo.create_ppo_state(params, tx, rng, cfg)
    state = dataclasses.replace(
        state, kl_coef=kl_coef, pending=sample(state, 0) if overlap else None
    )
    return jax.lax.scan(
        functools.partial(iterate, ref_params), state, None, length=ITERATIONS
    )[1]

  # By lax.map, as a vmapped program takes twice as long to compile.
  seeds, coefs = jnp.meshgrid(jnp.arange(SEEDS), jnp.asarray(KL_COEFS))
  runs = jax.jit(
      lambda runs: jax.lax.map(
          lambda run: train(jax.random.key(run[0]), run[1]), runs
      )
  )
  out = runs((seeds.ravel(), coefs.ravel()))
  shape = (len(KL_COEFS), SEEDS, ITERATIONS)
  return tuple(np.asarray(x).reshape(shape) for x in out)


@pytest.mark.parametrize("overlap", [0, 1])
def test_ppo_learns_a_rule_with_every_seed(overlap):
  shares, _, weights = _train(overlap)
  assert shares[:, :, 0].max() < 0.2
  # A sixteenth by chance.
  assert shares[0, :, -5:].mean(axis=-1).min() > 0.8
  # An older policy's rollouts are weighed; the first is its own policy's.
  assert (np.abs(weights[:, :, 0] - 1) < 1e-5).all()
  is_weighed = np.abs(weights[:, :, 1:6] - 1).max(axis=-1) > 1e-3
  assert (is_weighed == bool(overlap)).all()


def test_kl_does_not_explode_under_its_controller_and_the_rule_is_learnt():
  shares, kls, _ = _train()
  free, held = kls[:, :, -5:].mean(axis=-1)
  assert free.min() > 5 * KL_TARGET
  assert held.max() < 2 * KL_TARGET
  assert shares[1, :, -5:].mean(axis=-1).min() > 0.2
