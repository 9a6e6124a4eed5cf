"""One iteration of PPO around its programs: what comes in, in which order."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness import models, ppo_programs
from experiments.harness.ppo_config import Config
from experiments.harness.reference import Reference
from rlhf_jax import device_mesh
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.generation import decode
from rlhf_jax.rewards.episodes import Episodes, RewardFn
from rlhf_jax.updates import ppo


class Batches:
  """Prompts and, with PTX, documents; one state for both."""

  def __init__(self, prompts, documents):
    self._prompts, self._documents = prompts, documents

  def __next__(self):
    documents = None if self._documents is None else next(self._documents)
    return next(self._prompts), documents

  def get_state(self) -> dict[str, Any]:
    return {
        "prompts": self._prompts.get_state(),
        "documents": self._documents and self._documents.get_state(),
    }

  def set_state(self, state: dict[str, Any]) -> None:
    self._prompts.set_state(state["prompts"])
    if self._documents is not None:
      self._documents.set_state(state["documents"])


class Step:
  """One iteration, (state, (prompts, ptx)) -> (state, metrics, evidence).

  Three programs, and between the first two whatever scores: it may be a model
  on the device or a function of the text on the host. With `overlap` the state
  holds the rollout that is scored now, and the next is sampled meanwhile; in
  the last iteration there is no next. A run has as many iterations as it began
  with (num_steps is none of the fields that may change), so nothing can come
  after that one and miss it.
  """

  def __init__(
      self,
      config: Config,
      programs: ppo_programs.Programs,
      policy: models.Policy,
      reference: Reference,
      reward_fn: RewardFn,
      meshes: dict[str, jax.sharding.Mesh],
      frozen: dict[str, Any],
  ):
    self._config, self._programs = config, programs
    self._reference, self._reward_fn = reference, reward_fn
    self._meshes, self._frozen = meshes, frozen
    self._tokenizer = policy.tokenizer
    self._sampling = rollout_sampling(config, policy.tokenizer)
    self._num_left = None  # iterations, known once the state is

  def started(self, state: ppo.PPOState, batches: Batches) -> ppo.PPOState:
    """The state before the first iteration, with what that is to train on."""
    if not self._config.overlap:
      return state
    prompts, _ = device_mesh.shard_rows(next(batches), self._meshes["policy"])
    return dataclasses.replace(state, pending=self._rollout(state, prompts, 0))

  def __call__(self, state, batch):
    config = self._config
    prompts, ptx = device_mesh.shard_rows(batch, self._meshes["policy"])
    if config.overlap:
      rollout = state.pending
      # The device is busy with it while the older one is scored.
      state = dataclasses.replace(state, pending=self._next(state, prompts))
    else:
      rollout = self._rollout(state, prompts, 0)
    score = self._score(rollout)
    scored, metrics = self._programs.score(
        self._frozen | state.train.params,
        self._reference.params,
        rollout,
        score,
        state.kl_coef,
        config.ppo,
        self._reference.hidden(rollout),
    )
    state, update_metrics = self._programs.update(
        state, scored, ptx, config.ppo, self._frozen
    )
    evidence = {"scored": scored} | ({} if ptx is None else {"ptx": ptx})
    return state, metrics | update_metrics, evidence

  def _next(self, state, prompts):
    """What the iteration after this one is to train on."""
    if self._num_left is None:
      # Once: later it would wait for the device.
      self._num_left = self._config.loop.num_steps - int(state.iteration)
    self._num_left -= 1
    if self._num_left:
      return self._rollout(state, prompts, 1)
    # Of the same shape, and a copy: the state's memory is given away.
    return jax.tree.map(jnp.copy, state.pending)

  def _rollout(self, state, prompts, ahead):
    return self._programs.rollout(
        state, prompts, self._sampling, self._frozen, ahead=ahead
    )

  def _score(self, rollout):
    mesh, own = self._meshes["policy"], self._meshes["reward_model"]
    if own != mesh:
      rollout = device_mesh.put_rows(rollout, own)
    score = self._reward_fn(Episodes(rollout, self._tokenizer))
    return device_mesh.put_rows(score, mesh)


def rollout_sampling(
    config: Config, tokenizer: Tokenizer
) -> decode.SamplingConfig:
  """The whole distribution, at the temperature of every log-prob.

  What is drawn from less has a KL and ratios that mean nothing.
  """
  return dataclasses.replace(
      config.samples.sampling(tokenizer),
      temperature=config.ppo.temperature,
      greedy=False,
      top_k=0,
      use_top_p=False,
  )
