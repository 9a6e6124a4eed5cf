"""One iteration of many runs of PPO, and what each of them says.

As `ppo_iteration.py`, with every array stacked over the members.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import (
    evaluator,
    models,
    population_programs,
    ppo_iteration,
)
from experiments.harness.ppo_config import Config
from experiments.harness.reference import Reference
from rlhf_jax import device_mesh
from rlhf_jax.metrics import Metric, Metrics
from rlhf_jax.rewards.episodes import Episodes, RewardFn
from rlhf_jax.types import PromptBatch, Rollout


class MemberBatches:
  """The batches that each member would have alone, stacked."""

  def __init__(self, batches: Sequence[ppo_iteration.Batches]):
    self._batches = batches

  def __next__(self):
    return population_programs.stack([next(x) for x in self._batches])

  def get_state(self) -> dict[str, Any]:
    return {"members": [x.get_state() for x in self._batches]}

  def set_state(self, state: dict[str, Any]) -> None:
    for batches, own in zip(self._batches, state["members"], strict=True):
      batches.set_state(own)


class Step:
  """One iteration, (state, (prompts, ptx)) -> (state, metrics, evidence).

  What scores sees the rows of all members as one batch: it may be a function of
  the text on the host.
  """

  def __init__(
      self,
      members: Sequence[Config],
      programs: population_programs.Programs,
      policy: models.Policy,
      reference: Reference,
      reward_fn: RewardFn,
      mesh: jax.sharding.Mesh,
      frozen: dict[str, Any],
  ):
    self._programs, self._frozen = programs, frozen
    self._reference, self._reward_fn = reference, reward_fn
    self._tokenizer, self._num = policy.tokenizer, len(members)
    self._rows = population_programs.member_rows(mesh)
    self._cfg = population_programs.stack([x.ppo for x in members])
    self._sampling = population_programs.stack([
        ppo_iteration.rollout_sampling(x, policy.tokenizer) for x in members
    ])

  def __call__(self, state, batch):
    prompts, ptx = jax.tree.map(
        lambda x: device_mesh.put(x, self._rows), batch
    )
    rollout = self._programs.rollout(
        state, prompts, self._sampling, self._frozen
    )
    scored, metrics = self._programs.score(
        self._frozen,
        state.train.params,
        self._reference.params,
        rollout,
        self._score(rollout),
        state.kl_coef,
        self._cfg,
    )
    state, update_metrics = self._programs.update(
        state, scored, ptx, self._cfg, self._frozen
    )
    evidence = {"scored": scored} | ({} if ptx is None else {"ptx": ptx})
    return state, metrics | update_metrics, evidence

  def _score(self, rollout):
    episodes = Episodes(self._programs.flat(rollout), self._tokenizer)
    score = jnp.reshape(self._reward_fn(episodes), (self._num, -1))
    return device_mesh.put(score, self._rows)


def named_metrics(names: Sequence[str], metrics: Metrics) -> Metrics:
  """Metrics of arrays over members, on the host, as '<member>/<metric>'."""
  return {
      f"{member}/{name}": Metric(total=metric.total[i], count=metric.count[i])
      for i, member in enumerate(names)
      for name, metric in metrics.items()
  }


class Evaluation:
  """What `evaluator.Evaluator` says of each member, sampled at once.

  Args:
    members: by name.
    prompts: each member's held-out ones; there may be more of some.
    measure: of a policy of this shape; its own prompts are not read.
  """

  def __init__(
      self,
      members: dict[str, Config],
      prompts: Sequence[PromptBatch],
      programs: population_programs.Programs,
      measure: evaluator.Evaluator,
      policy: models.Policy,
      frozen: dict[str, Any],
  ):
    self._members, self._prompts = members, prompts
    self._programs, self._measure = programs, measure
    self._frozen = frozen
    config = next(iter(members.values()))
    self._sampling = config.samples.sampling(policy.tokenizer)
    self._num_logged = config.num_logged_samples
    self._most = max(len(x.index) for x in prompts)
    self._batch_size = min(config.rollout_batch_size, self._most)
    self._rngs = population_programs.stack(
        [jax.random.key(x.seed) for x in members.values()]
    )

  def __call__(
      self, params: Any
  ) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Numbers as '<member>/<number>', and rows that name their 'member'.

    Args:
      params: stacked, of the policies.
    """
    numbers, samples = {}, []
    rollouts = self._sample(params)
    for i, (name, whole) in enumerate(zip(self._members, rollouts)):
      own = self._frozen | population_programs.member(params, i)
      rows = self._measure.measured(own, whole)
      for number, value in evaluator.averages(rows).items():
        numbers[f"{name}/{number}"] = value
      samples += [{"member": name, **x} for x in rows[: self._num_logged]]
    return numbers, samples

  def _sample(self, params) -> list[Rollout]:
    """Each member's completions of all of its prompts.

    A row's randomness is that of its place among its member's prompts, so
    neither the other members nor what fills a batch up change it.
    """
    parts = [[] for _ in self._prompts]
    for start in range(0, self._most, self._batch_size):
      batch, rows = [], []
      for prompts in self._prompts:
        ids = np.arange(start, start + self._batch_size) % len(prompts.index)
        rows.append(ids.astype(np.int32))
        batch.append((prompts.prompts[ids], prompts.prompt_mask[ids]))
      rollout = self._programs.sample(
          self._frozen,
          params,
          *population_programs.stack(batch),
          self._rngs,
          self._sampling,
          np.stack(rows),
      )
      rollout = device_mesh.to_host(rollout)
      for i, prompts in enumerate(self._prompts):
        keep = min(self._batch_size, max(len(prompts.index) - start, 0))
        own = population_programs.member(rollout, i)
        parts[i].append(jax.tree.map(lambda x: x[:keep], own))
    return [
        jax.tree.map(lambda *xs: np.concatenate(xs), *mine) for mine in parts
    ]
