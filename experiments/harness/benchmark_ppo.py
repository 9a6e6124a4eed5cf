"""An iteration of PPO, whole and in its parts.

`ppo_iteration.Step` around `ppo_programs.py`, as `experiments.ppo` runs them,
on random models: a policy, its value network, a reference policy and a reward
model of one size. Whole, nothing waits between the programs. For the parts they
run again with a wait after each; score is the reward model's and the rest.
"""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness import benchmark_loads as loads
from experiments.harness import (
    benchmark_programs,
    devices,
    evaluator,
    models,
    ppo_programs,
    value_network,
)
from experiments.harness.benchmark_config import Config
from experiments.harness.benchmark_timing import Measure, Part, timed
from experiments.harness.fused_iteration import FusedStep
from experiments.harness.ppo_iteration import Step
from experiments.harness.reference import Reference
from rlhf_jax import optim, sharding
from rlhf_jax.types import PromptBatch, ScoreNormalization
from rlhf_jax.updates import ppo


@dataclasses.dataclass(frozen=True)
class Ids:
  """What an iteration asks of a tokenizer where no text is read.

  No id ends a completion, so that all are of full length.
  """

  fingerprint: str = "random"
  eos_id: int = -1
  eos_ids: tuple[int, ...] = (-1,)
  pad_id: int = 0


@dataclasses.dataclass(frozen=True)
class Iteration:
  """All that a step of PPO is made of.

  whole: an iteration as the config has it, fused or not.
  step: (programs, reward function) -> `Step`.
  """

  state: ppo.PPOState
  batch: tuple[PromptBatch, None]
  programs: ppo_programs.Programs
  reward_fn: Callable[[Any], Any]
  whole: Callable[..., Any]
  step: Callable[[ppo_programs.Programs, Callable[[Any], Any]], Step]


def make_iteration(config: Config) -> Iteration:
  """As `experiments.ppo` puts it together, without anything from disk."""
  cfg = config.ppo
  meshes = devices.make_meshes(cfg.mesh, cfg.placement)
  mesh = meshes["policy"]
  on = lambda name: cfg.sharding.placing(name, meshes[name])
  policy = models.Policy(
      config.model, benchmark_programs.make_params(config, "policy"), Ids()
  )
  ref_policy = models.placed(policy, on("ref_policy"))
  reward_model = models.placed(
      models.RewardModel(
          config.model,
          benchmark_programs.make_params(config, "reward_model", seed=1),
          ScoreNormalization(gain=jnp.float32(1), bias=jnp.float32(0)),
          Ids(),
      ),
      on("reward_model"),
  )
  reference = Reference(ref_policy, meshes, on("policy"))
  value_config, params, frozen = value_network.init_params(
      cfg, policy, reward_model, jax.random.key(2)
  )
  tx = optim.make_optimizer(cfg.optimizer, cfg.num_updates)
  rules = ppo_programs.state_rules(cfg.sharding)
  params = sharding.place(params, rules, mesh, copy=True)
  state = sharding.place(
      ppo.create_ppo_state(params, tx, jax.random.key(3), cfg.ppo), rules, mesh
  )
  programs = ppo_programs.make_programs(
      config.model,
      config.model,
      value_config,
      tx,
      state,
      mesh,
      cfg.sharding,
      cfg.parallelism,
      cfg.samples.make_generate(config.model),
  )

  def step(programs, reward_fn):
    return Step(
        cfg, programs, policy, reference, reward_fn, meshes, frozen
    )

  reward_fn = evaluator.make_reward_fn(reward_model)
  whole = step(programs, reward_fn)
  if cfg.fuse_iteration:
    whole = FusedStep(
        cfg, programs, policy, reference, reward_model, mesh, frozen
    )
  return Iteration(
      state=state,
      batch=(_prompts(config), None),
      programs=programs,
      reward_fn=reward_fn,
      whole=whole,
      step=step,
  )


def _prompts(config: Config) -> PromptBatch:
  rows = config.ppo.rollout_batch_size
  prompts = benchmark_programs.random_tokens(config, rows, config.prompt_length)
  return PromptBatch(
      prompts=prompts,
      prompt_mask=jnp.ones_like(prompts),
      index=jnp.arange(rows, dtype=jnp.int32),
  )


class _Clock:
  """Adds up the seconds of functions that it wraps, each under a name."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, waited for."""

    def waited(*args, **kwargs):
      start = time.perf_counter()
      out = jax.block_until_ready(call(*args, **kwargs))
      spent = time.perf_counter() - start
      self.seconds[name] = self.seconds.get(name, 0.0) + spent
      return out

    return waited


class _Iterations:
  """Whole and in parts by turns, each from where the last one ended."""

  def __init__(self, iteration: Iteration):
    self._state, self._batch = iteration.state, iteration.batch
    self._clock, programs = _Clock(), iteration.programs
    around = self._clock.around
    self._whole = iteration.whole
    self._split = iteration.step(
        dataclasses.replace(
            programs,
            rollout=around("ppo/rollout", programs.rollout),
            score=around("ppo/score", programs.score),
            update=around("ppo/update", programs.update),
        ),
        around("ppo/score", iteration.reward_fn),
    )

  def __call__(self) -> dict[str, float]:
    seconds, (self._state, *_) = timed(self._whole, self._state, self._batch)
    self._clock.seconds.clear()
    self._state, *_ = self._split(self._state, self._batch)
    return {"ppo": seconds, **self._clock.seconds}


def iteration(config: Config) -> Measure:
  """One whole iteration, and rollout, score and update apart."""
  made = make_iteration(config)
  rollout = (loads.prefill(config), loads.decode(config))
  score = loads.score(config)
  update = loads.update(
      config, benchmark_programs.num_params(made.state.train.params)
  )
  part = lambda name, work: Part(
      name=name, unit="s", amount=None, loads=work
  )
  return Measure(
      name="ppo",
      run=_Iterations(made),
      parts=(
          part("ppo", (*rollout, *score, *update)),
          part("ppo/rollout", rollout),
          part("ppo/score", score),
          part("ppo/update", update),
      ),
  )
