"""What a benchmark runs: the library's own programs on random params.

    generation   jit of `generation/decode.py`, whole; and for one new token,
                 which is told as prefill. Decode is the difference of the two,
                 run in turns.
    sft, reward  the programs of these stages, state donated
    dpo          a policy and its reference on the same pairs, and one backward
                 pass; a benchmark's own, of the library's parts

Every row is of full length, and nothing is an end token.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import benchmark_loads as loads
from experiments.harness.benchmark_config import Config
from experiments.harness.benchmark_timing import Measure, Part, timed
from experiments.harness.parallelism import compile_step
from rlhf_jax import device_mesh, optim, sharding
from rlhf_jax.generation import decode
from rlhf_jax.losses import (
    chunking,
    language_modeling,
    masking,
    preference,
)
from rlhf_jax.models import functions, heads
from rlhf_jax.models.functions import LanguageModelFns
from rlhf_jax.train_state import TrainState, create_train_state
from rlhf_jax.types import LMBatch, PreferenceBatch
from rlhf_jax.updates import gradient, reward, sft

_BETA = 0.1


def num_params(tree: Any) -> int:
  """Of all arrays of a tree."""
  return sum(x.size for x in jax.tree.leaves(tree))


def make_params(config: Config, kind: str, seed: int = 0) -> Any:
  """Random params of a 'policy' or of a 'reward_model'."""
  make = heads.LanguageModel if kind == "policy" else heads.ScalarModel
  tokens = jnp.zeros((1, 2), jnp.int32)
  # Compiled whole: one by one the layers' initialisers take longer.
  init = jax.jit(lambda rng: make(config.model).init(rng, tokens)["params"])
  return init(jax.random.key(seed))


def random_tokens(config: Config, *shape: int, seed: int = 0) -> jax.Array:
  """Ids from the whole vocabulary."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, config.model.vocab_size, shape, np.int32)
  return jnp.asarray(tokens)


def generation(config: Config) -> Measure:
  """New tokens of a batch of prompts."""
  params = make_params(config, "policy")
  rows = config.ppo.rollout_batch_size
  prompts = random_tokens(config, rows, config.prompt_length)
  mask = jnp.ones_like(prompts)
  generate = jax.jit(
      decode.make_generate(
          heads.LanguageModel(config.model),
          num_cache_buckets=config.ppo.samples.num_cache_buckets,
          weights=config.ppo.samples.rollout_weights,
      )
  )
  rngs = iter(range(2**30))

  def sample(num_tokens: int) -> float:
    sampling = decode.SamplingConfig(
        max_new_tokens=num_tokens,
        eos_id=-1,
        temperature=config.ppo.ppo.temperature,
    )
    rng = jax.random.key(next(rngs))
    return timed(generate, params, prompts, mask, rng, sampling)[0]

  def run():
    one, whole = sample(1), sample(config.completion_length)
    return {
        "generation": whole,
        "generation/prefill": one,
        "generation/decode": max(whole - one, 1e-9),
    }

  num_new = rows * config.completion_length
  prefill, steps = loads.prefill(config), loads.decode(config)
  named = lambda name, amount, *work: Part(
      name=name, unit="tokens/s", amount=amount, loads=work
  )
  return Measure(
      name="generation",
      run=run,
      parts=(
          named("generation", num_new, prefill, steps),
          named("generation/prefill", rows * config.prompt_length, prefill),
          named("generation/decode", num_new - rows, steps),
      ),
  )


def supervised(config: Config) -> Measure:
  """A step of supervised fine-tuning in which all tokens are targets."""
  tx = optim.make_optimizer(config.ppo.optimizer, config.ppo.num_updates)
  model = functions.make_language_model(config.model)
  state, update = _trained(
      config, make_params(config, "policy"), tx, sft.make_sft_update(model, tx)
  )
  tokens = random_tokens(config, config.batch_size, config.length)
  batch = LMBatch(
      tokens=tokens,
      segment_ids=jnp.ones_like(tokens),
      loss_mask=jnp.ones(tokens.shape, jnp.float32).at[:, 0].set(0.0),
  )
  part = Part(
      name="sft",
      unit="tokens/s",
      amount=tokens.size,
      loads=loads.sft(config, num_params(state.params)),
  )
  return _steps("sft", part, state, update, batch, sft.SFTConfig())


def reward_step(config: Config) -> Measure:
  """A step of a reward model on pairs."""
  tx = optim.make_optimizer(config.ppo.optimizer, config.ppo.num_updates)
  update = reward.make_reward_update(functions.make_score_fn(config.model), tx)
  state, update = _trained(
      config, make_params(config, "reward_model"), tx, update
  )
  part = Part(
      name="reward",
      unit="pairs/s",
      amount=config.num_pairs,
      loads=loads.reward(config, num_params(state.params)),
  )
  batch = _pairs(config)
  return _steps("reward", part, state, update, batch, reward.RewardConfig())


def dpo_step(config: Config) -> Measure:
  """A policy's step on pairs against a frozen reference policy."""
  tx = optim.make_optimizer(config.ppo.optimizer, config.ppo.num_updates)
  model = functions.make_language_model(config.model)
  update = make_dpo_update(model, tx, config.completion_length)
  state, update = _trained(config, make_params(config, "policy"), tx, update)
  part = Part(
      name="dpo",
      unit="pairs/s",
      amount=config.num_pairs,
      loads=loads.dpo(config, num_params(state.params)),
  )
  ref_params = make_params(config, "policy", seed=1)
  return _steps("dpo", part, state, update, _pairs(config), ref_params)


def make_dpo_update(
    model: LanguageModelFns, tx: Any, completion_length: int
) -> Callable[..., Any]:
  """update(state, pairs, ref_params) -> (state, metrics).

  -log sigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))), each
  the log-probability of a row's last `completion_length` tokens (Rafailov et
  al., arXiv 2305.18290, equation 7).
  """

  def logprob(params, batch: PreferenceBatch):
    pairs, _, length = batch.tokens.shape
    tokens = batch.tokens.reshape(-1, length)
    mask = batch.attention_mask.reshape(-1, length)
    hidden = model.hidden(params, tokens, mask, completion_length + 1)
    logits_of = model.head(params)
    mask = mask[:, -completion_length:]
    logprobs = chunking.map_positions(
        lambda hidden, ids: language_modeling.selected_logprobs(
            logits_of(hidden), ids
        ),
        (hidden[:, :-1], tokens[:, -completion_length:]),
        mask,
        chunk_size=model.chunk_size,
    )
    return masking.masked_sum(logprobs, mask, axis=1).reshape(pairs, 2)

  def update(state: TrainState, batch: PreferenceBatch, ref_params):
    ref_BR = logprob(ref_params, batch)

    def objective(params, part):
      batch, ref_BR = part
      score_BR = _BETA * (logprob(params, batch) - ref_BR)
      loss_B = preference.bradley_terry_loss(score_BR[:, 0], score_BR[:, 1])
      return loss_B.mean(), {}

    grads, metrics = gradient.accumulate_gradients(
        objective, state.params, (batch, ref_BR), 1
    )
    return gradient.apply_gradients(state, grads, metrics, tx)

  return update


def _pairs(config: Config) -> PreferenceBatch:
  num = config.num_pairs
  tokens = random_tokens(config, num, 2, config.length)
  return PreferenceBatch(
      tokens=tokens,
      attention_mask=jnp.ones_like(tokens),
      weight=jnp.ones((num,), jnp.float32),
      margin=jnp.zeros((num,), jnp.float32),
  )


def _trained(config: Config, params: Any, tx: Any, update: Any):
  """A state and its update, compiled as the stages' binaries do."""
  mesh = device_mesh.make_mesh(config.ppo.mesh)
  rules = config.ppo.sharding.rules_of("policy")
  state = sharding.place(
      create_train_state(params, tx, jax.random.key(0)), rules, mesh
  )
  return state, compile_step(
      update,
      config.ppo.parallelism,
      mesh,
      rows=(1,),
      donate=(0,),
      out_shardings=(sharding.of(state), None),
  )


@dataclasses.dataclass
class _Steps:
  """Steps of one state, each from where the last one ended."""

  name: str
  state: Any
  update: Callable[..., Any]
  args: tuple[Any, ...]

  def __call__(self) -> dict[str, float]:
    seconds, out = timed(self.update, self.state, *self.args)
    self.state = out[0]
    return {self.name: seconds}


def _steps(name, part, state, update, *args) -> Measure:
  run = _Steps(name, state, update, args)
  return Measure(name=name, parts=(part,), run=run)
