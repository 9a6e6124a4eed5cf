"""An iteration of tunix's PPO learner, with its own Llama.

Its models are of the same sizes but have heads of their own, and it samples a
minibatch, trains its epochs on that and goes on to the next.
"""

from collections.abc import Iterator
from typing import Any

from flax import nnx
import jax
import numpy as np
import optax
from tunix.models.llama3 import model as llama
from tunix.rl import rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout

from experiments.harness.peers.turns import Loop


class _Tokenizer:
  """The id n is the word 'n'; no text is ever made of ids."""

  def __init__(self, vocab_size: int):
    self._vocab_size = vocab_size

  def encode(self, text: str, **_) -> list[int]:
    """The numbers in the text."""
    return [int(x) for x in text.split()]

  def decode(self, ids: Any, **_) -> str:
    """Nothing reads it."""
    return ""

  def bos_id(self) -> int:
    """None is put before a prompt."""
    return 0

  def eos_id(self) -> int:
    """The last but one."""
    return self._vocab_size - 2

  def pad_id(self) -> int:
    """The last."""
    return self._vocab_size - 1


class _Llama(llama.Llama3):
  """Also takes what its learner gives every model, packing, which is not used.
  """

  def __call__(
      self, input_tokens, positions, cache, attention_mask, segment_ids=None
  ):
    return super().__call__(input_tokens, positions, cache, attention_mask)


def make(argument: str, job: dict[str, Any]) -> Loop:
  """'ppo': all minibatches of one batch of prompts a turn."""
  if argument != "ppo" or job["model"]["model_type"] != "llama":
    raise ValueError(
        f"tunix has Llama's shape, not {job['model']['model_type']}'s"
    )
  num, size = job["num_prompts"], job["num_prompts"] // job["num_minibatches"]
  mesh = jax.make_mesh(
      (1, 1),
      ("fsdp", "tp"),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
      devices=jax.devices()[:1],
  )
  optimizer = lambda: optax.chain(
      optax.clip_by_global_norm(1.0), optax.adamw(job["learning_rate"])
  )
  actor, reference = _model(job, 0), _model(job, 0)
  cluster = rl_cluster.RLCluster(
      actor=actor,
      critic=rl_utils.create_critic_model(actor, seed=1),
      reference=reference,
      reward=rl_utils.create_critic_model(actor, seed=2),
      tokenizer=_Tokenizer(job["model"]["vocab_size"]),
      cluster_config=rl_cluster.ClusterConfig(
          role_to_mesh={role: mesh for role in rl_cluster.Role},
          rollout_engine="vanilla",
          training_config=rl_cluster.RLTrainingConfig(
              actor_optimizer=optimizer(),
              critic_optimizer=optimizer(),
              eval_every_n_steps=10**9,
              max_steps=10**6,
              mini_batch_size=size,
              train_micro_batch_size=size,
          ),
          rollout_config=base_rollout.RolloutConfig(
              max_tokens_to_generate=job["completion_length"],
              max_prompt_length=job["prompt_length"],
              kv_cache_size=job["prompt_length"] + job["completion_length"],
              temperature=job["temperature"],
          ),
      ),
  )
  learner = ppo_learner.PPOLearner(
      rl_cluster=cluster,
      ppo_config=ppo_learner.PPOConfig(
          num_iterations=job["num_epochs"], beta=job["kl_coef"]
      ),
  )
  # All that a turn gave out is waited for by asking for the params.
  trainers = (cluster.actor_trainer, cluster.critic_trainer)
  finish = lambda: jax.block_until_ready(
      [nnx.state(x.model) for x in trainers]
  )
  loop = Loop("ppo", lambda: learner.train(_batches(job, num, loop)), finish)
  return loop


def _batches(
    job: dict[str, Any], num: int, loop: Loop
) -> Iterator[dict[str, np.ndarray]]:
  """The same prompts again and again, each time when it is its turn."""
  rng = np.random.default_rng(0)
  highest = job["model"]["vocab_size"] - 2
  ids = rng.integers(1, highest, (num, job["prompt_length"]))
  prompts = np.asarray([" ".join(map(str, row)) for row in ids])
  while True:
    loop.wait()
    yield {"prompts": prompts}


def _model(job: dict[str, Any], seed: int) -> llama.Llama3:
  shape = job["model"]
  config = llama.ModelConfig(
      num_layers=shape["num_hidden_layers"],
      vocab_size=shape["vocab_size"],
      embed_dim=shape["hidden_size"],
      hidden_dim=shape["intermediate_size"],
      num_heads=shape["num_attention_heads"],
      head_dim=shape["head_dim"],
      num_kv_heads=shape["num_key_value_heads"],
      rope_theta=int(shape["rope_theta"]),
      norm_eps=shape["rms_norm_eps"],
      weight_tying=False,
  )
  return _Llama(config, rngs=nnx.Rngs(seed))
