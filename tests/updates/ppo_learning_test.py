"""PPO learns a rule, and a KL target holds it close to its reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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
def _train():
  """score and KL of each run and iteration, [len(KL_COEFS), SEEDS, ...].

  One program for all runs: seeds and coefficients are data.
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
  )
  prompts = jnp.zeros((ROWS, 1), jnp.int32)

  def iterate(ref_params, state, _):
    rng = jax.random.fold_in(ppo.iteration_rng(state), 0)
    rollout = generate(
        state.train.params["policy"],
        prompts,
        jnp.ones_like(prompts),
        rng,
        sampling,
    )
    share = (rollout.completions == LIKED).astype(jnp.float32).mean(axis=1)
    scored, metrics = score_rollout(
        state.train.params, ref_params, rollout, 4 * share, state.kl_coef, cfg
    )
    state, _ = update(state, scored, None, cfg)
    kl = metrics["ppo/kl_exact"].total / metrics["ppo/kl_exact"].count
    return state, (share.mean(), kl)

  def train(rng, kl_coef):
    ref_params = functions.init_language_model(rng, config)
    head = heads.scalar_head_init(rng, config.width, zero=True)
    params = {"policy": ref_params, "value": head}
    state = ppo.create_ppo_state(params, tx, rng, cfg)
    state = ppo.PPOState(
        train=state.train, kl_coef=kl_coef, iteration=state.iteration
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


def test_ppo_learns_a_rule_with_every_seed():
  shares, _ = _train()
  assert shares[:, :, 0].max() < 0.2
  # A sixteenth by chance.
  assert shares[0, :, -5:].mean(axis=-1).min() > 0.8


def test_kl_does_not_explode_under_its_controller_and_the_rule_is_learnt():
  shares, kls = _train()
  free, held = kls[:, :, -5:].mean(axis=-1)
  assert free.min() > 5 * KL_TARGET
  assert held.max() < 2 * KL_TARGET
  assert shares[1, :, -5:].mean(axis=-1).min() > 0.2
