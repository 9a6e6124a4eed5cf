"""One iteration of PPO as one program, for a reward model on the same devices.

What `ppo_iteration.Step` starts one after another is here a single call: the
host says once what is to happen, and the compiler sees all of it. Nothing may
have to come to the host in between, so no text is read: the reward model has
the policy's tokenizer.
"""

from typing import Any

import jax

from experiments.harness import models, ppo_programs
from experiments.harness.config import ConfigError
from experiments.harness.ppo_config import Config
from experiments.harness.ppo_iteration import Batches, rollout_sampling
from experiments.harness.reference import Reference
from rlhf_jax import device_mesh
from rlhf_jax.rewards import reward_model as reward_lib
from rlhf_jax.rewards.episodes import Episodes
from rlhf_jax.updates import ppo


class FusedStep:
  """As `ppo_iteration.Step`, (state, (prompts, ptx)) -> the same three.

  Raises:
    ConfigError: if the reward model reads text.
  """

  def __init__(
      self,
      config: Config,
      programs: ppo_programs.Programs,
      policy: models.Policy,
      reference: Reference,
      reward_model: models.RewardModel,
      mesh: jax.sharding.Mesh,
      frozen: dict[str, Any],
  ):
    tokenizer = policy.tokenizer
    if reward_model.tokenizer.fingerprint != tokenizer.fingerprint:
      raise ConfigError(
          "fuse_iteration: the reward model has another tokenizer than the "
          "policy, and reads its text on the host: set fuse_iteration=False"
      )
    sampling = rollout_sampling(config, tokenizer)

    # What a program reads is its argument: weights, and coefficients so that
    # they are computed with as in the programs apart.
    def iterate(state, prompts, ptx, frozen, ref_params, of_reward, *configs):
      sampling, cfg = configs
      rollout = programs.rollout(state, prompts, sampling, frozen)
      params, normalization = of_reward
      reward_fn = reward_lib.make_reward_model(
          reward_model.config, params, normalization, reward_model.tokenizer
      )
      scored, metrics = programs.score(
          frozen | state.train.params,
          ref_params,
          rollout,
          reward_fn(Episodes(rollout, tokenizer)),
          state.kl_coef,
          cfg,
      )
      state, update_metrics = programs.update(state, scored, ptx, cfg, frozen)
      return state, metrics | update_metrics, scored

    self._iterate = jax.jit(iterate, donate_argnums=(0,))
    self._mesh = mesh
    self._inputs = (
        frozen,
        reference.params,
        (reward_model.params, reward_model.normalization),
        sampling,
        config.ppo,
    )

  def started(self, state: ppo.PPOState, batches: Batches) -> ppo.PPOState:
    """The state before the first iteration."""
    del batches  # No rollout is sampled ahead.
    return state

  def __call__(self, state, batch):
    prompts, ptx = device_mesh.shard_rows(batch, self._mesh)
    state, metrics, scored = self._iterate(state, prompts, ptx, *self._inputs)
    evidence = {"scored": scored} | ({} if ptx is None else {"ptx": ptx})
    return state, metrics, evidence
