"""Adapters learn: demonstrations by SFT, and a rule by PPO with every seed."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax import metrics as metrics_lib
from rlhf_jax import optim
from rlhf_jax.generation import decode
from rlhf_jax.models import functions, heads, lora
from rlhf_jax.train_state import create_train_state
from rlhf_jax.updates import ppo, sft
from tests.updates import small

LORA = lora.LoraConfig(rank=4, alpha=8.0, targets=("all-linear",))
SEEDS, ITERATIONS, ROWS, LENGTH = 3, 20, 32, 6
LIKED = 3


def _tx(learning_rate):
  return optim.make_optimizer(
      optim.OptimizerConfig(learning_rate=learning_rate, epsilon=1e-5), 1
  )


def test_sft_of_an_adapter_fits_rows_and_leaves_its_base_alone():
  base, tx = small.language_model_params(), _tx(0.02)
  before = jax.tree.map(np.array, base)
  config = lora.LoraConfig(
      rank=4, alpha=8.0, targets=("all-linear",), dropout=0.1
  )
  frozen = {
      "base": base,
      "adapter_scale": jnp.float32(config.scale),
      "adapter_dropout": jnp.float32(config.dropout),
  }
  state = create_train_state(
      {"adapter": lora.init(jax.random.key(0), config, base)},
      tx,
      jax.random.key(0),
  )
  batch = small.lm_batch(rows=4)
  update = jax.jit(sft.make_sft_update(small.MODEL, tx), donate_argnums=0)
  losses = []
  for _ in range(60):
    state, metrics = update(state, batch, sft.SFTConfig(), frozen)
    losses.append(metrics_lib.compute(metrics)["sft/loss"])
  assert losses[0] > 3.0 and np.mean(losses[-5:]) < 0.3 * losses[0]
  small.assert_trees_equal(base, before)


def _train_ppo(base, rng):
  """The share of liked tokens and the KL by iteration, of one seed."""
  config, tx = small.CONFIG, _tx(0.02)
  model = functions.make_policy_value(config, config)
  generate = decode.make_generate(heads.LanguageModel(config))
  score_rollout = ppo.make_score_rollout(model, small.MODEL)
  update = ppo.make_ppo_update(model, tx)
  sampling = decode.SamplingConfig(max_new_tokens=LENGTH, eos_id=-1)
  cfg = ppo.PPOConfig(
      temperature=1.0,
      kl_coef=0.0,
      replace_missing_eos=False,
      num_epochs=2,
      num_minibatches=2,
  )
  frozen = {"base": base, "adapter_scale": jnp.float32(LORA.scale)}
  rng_policy, rng_value, rng_state = jax.random.split(rng, 3)
  params = {
      "policy": {"adapter": lora.init(rng_policy, LORA, base)},
      "value": {
          "adapter": lora.init(rng_value, LORA, base),
          "head": heads.scalar_head_init(rng, config.width, zero=True),
      },
  }
  prompts = jnp.zeros((ROWS, 1), jnp.int32)

  def iterate(state, _):
    rollout = generate(
        frozen | state.train.params["policy"],
        prompts,
        jnp.ones_like(prompts),
        jax.random.fold_in(ppo.iteration_rng(state), 0),
        sampling,
    )
    share = (rollout.completions == LIKED).astype(jnp.float32).mean(axis=1)
    scored, metrics = score_rollout(
        frozen | state.train.params,
        base,
        rollout,
        4 * share,
        state.kl_coef,
        cfg,
    )
    state, _ = update(state, scored, None, cfg, frozen)
    kl = metrics["ppo/kl_exact"].total / metrics["ppo/kl_exact"].count
    return state, (share.mean(), kl)

  state = ppo.create_ppo_state(params, tx, rng_state, cfg)
  return jax.lax.scan(iterate, state, None, length=ITERATIONS)[1]


def test_ppo_with_adapters_learns_a_rule_with_every_seed():
  runs = jax.jit(
      lambda base, seeds: jax.lax.map(
          lambda seed: _train_ppo(base, jax.random.key(seed)), seeds
      )
  )
  base = small.language_model_params()
  shares, kls = (np.asarray(x) for x in runs(base, jnp.arange(SEEDS)))
  assert shares[:, 0].max() < 0.1
  # The frozen embedding, which is the head, bounds how sure it can be.
  assert shares[:, -5:].mean(axis=-1).min() > 0.45
  # The reference is the base: 0 at first, and far away in the end.
  np.testing.assert_array_equal(kls[:, 0], 0.0)
  assert kls[:, -1].min() > 1.0
