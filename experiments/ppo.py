"""Improves a policy against a reward model by PPO.

    python -m experiments.ppo --config=configs/ppo.py --workdir=DIR

An iteration is three programs, or one with `fuse_iteration`: rollout (sample
completions), score (reference log-probs, values, rewards, advantages), update
(epochs x minibatches). See `rlhf_jax/updates/ppo.py` for what happens inside.

  1. Loads policy, reference policy (the same by default) and reward model; the
     value network starts from the reward model, the policy or zero.
  2. Iterates; every evaluation samples held-out prompts and, where a judge is
     named, has it say what training never sees.
  3. Leaves DIR/model and DIR/tokenizer; DIR/checkpoints holds the whole state.
"""

import dataclasses
import pathlib
from typing import Any

from absl import logging
import jax

from experiments.harness import (
    adapters,
    checks,
    cli,
    devices,
    evaluator,
    loop,
    models,
    ppo_programs,
    sources,
    stage,
    value_network,
)
from experiments.harness.config import ConfigError
from experiments.harness.fused_iteration import FusedStep
from experiments.harness.ppo_config import Config
from experiments.harness.ppo_iteration import Batches, Step
from experiments.harness.reference import Reference
from rlhf_jax import device_mesh, optim, sharding
from rlhf_jax.data import encoding, packing, pipeline
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.rewards.episodes import RewardFn
from rlhf_jax.types import LMBatch, PromptBatch
from rlhf_jax.updates import ppo


def run(config: Config, workdir: str) -> None:
  """Runs the stage, or what is left of it."""
  # ---- models ----------------------------------------------------------------
  out = stage.Stage(workdir, config)
  if out.finished:
    return
  meshes = devices.make_meshes(config.mesh, config.placement)
  mesh = meshes["policy"]
  policy, ref_policy, reward_model, reward_fn = load_models(config, meshes)
  reference = Reference(
      ref_policy, meshes, config.sharding.placing("policy", mesh)
  )
  rng_state, rng_value = jax.random.split(jax.random.key(config.seed))
  value_config, params, frozen = value_network.init_params(
      config, policy, reward_model, rng_value
  )
  frozen = sharding.place(frozen, config.sharding.rules_of("policy"), mesh)
  tx = optim.make_optimizer(config.optimizer, config.num_updates)

  # ---- data ------------------------------------------------------------------
  data = read_data(config, policy.tokenizer, out.dir / "skipped")
  batches = make_batches(config, data, mesh)
  sampler = evaluator.Evaluator(
      policy.config,
      policy.tokenizer,
      data.heldout_prompts,
      config.samples,
      reference=reference,
      reward_fn=reward_fn,
      judge=evaluator.make_judge(config.judge),
      seed=config.seed,
      batch_size=config.rollout_batch_size,
  )

  def evaluate(state):
    rows = sampler.rows(frozen | state.train.params["policy"])
    return evaluator.averages(rows), rows[: config.num_logged_samples]

  # ---- loop ------------------------------------------------------------------
  # Copies: the state is donated, and the policy's and the reward model's own
  # arrays are still needed.
  rules = ppo_programs.state_rules(config.sharding)
  params = sharding.place(params, rules, mesh, copy=True)
  # What nobody else reads of the policy as it was is let go.
  policy = dataclasses.replace(policy, params=None)
  state = sharding.place(
      ppo.create_ppo_state(params, tx, rng_state, config.ppo), rules, mesh
  )
  programs = ppo_programs.make_programs(
      policy.config,
      ref_policy.config,
      value_config,
      tx,
      state,
      mesh,
      config.sharding,
      config.parallelism,
      config.samples.make_generate(policy.config),
  )
  if config.fuse_iteration:
    step = FusedStep(
        config, programs, policy, reference, reward_model, mesh, frozen
    )
  else:
    step = Step(
        config, programs, policy, reference, reward_fn, meshes, frozen
    )
  task = loop.Task(
      name="ppo",
      state=step.started(state, batches),
      step=step,
      batches=batches,
      evaluate=evaluate,
      skipped_steps=lambda state: state.train.skipped_steps,
      unit="iteration",
      inputs={
          **data.inputs(),
          **model_inputs(ref_policy, reward_model),
          **adapters.inputs(frozen),
      },
  )
  state = loop.run_loop(
      task, config.loop, workdir=str(out.dir), config=out.config
  )
  trained = state.train.params["policy"]
  params = adapters.merged(config.lora, frozen, trained)
  adapters.save(out.dir, config.lora, frozen, trained)
  models.save_policy(
      out.dir, dataclasses.replace(policy, params=params)
  )
  out.finish(evaluate(state)[0])


# ---- its parts, which experiments.population has of many at once -------------


def load_models(
    config: Config, meshes: dict[str, jax.sharding.Mesh]
) -> tuple[models.Policy, models.Policy, models.RewardModel | None, RewardFn]:
  """Policy, reference policy, reward model and what scores; they fit."""
  on = lambda model: config.sharding.placing(model, meshes[model])
  policy = models.load_policy(config.init_from, config.compute, on("policy"))
  ref_policy = (
      models.load_policy(config.ref_policy, config.compute, on("ref_policy"))
      if config.ref_policy
      else models.placed(policy, on("ref_policy"))
  )
  reward_model = None
  if config.reward_rule:
    reward_fn = evaluator.load_reward_rule(config.reward_rule)
  else:
    reward_model = models.load_reward_model(
        config.reward_model, config.compute, on("reward_model")
    )
    reward_fn = evaluator.make_reward_fn(reward_model)
  _check_fits(config, policy, ref_policy, reward_model)
  return policy, ref_policy, reward_model, reward_fn


def model_inputs(
    ref_policy: models.Policy, reward_model: models.RewardModel | None
) -> dict[str, Any]:
  """Those of `loop.Task.inputs` that are models."""
  return {
      "reference policy": ref_policy.params,
      "reward model": reward_model
      and (reward_model.params, reward_model.normalization),
  }


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run reads, encoded; documents are packed, None without PTX."""

  prompts: PromptBatch
  heldout_prompts: PromptBatch
  documents: LMBatch | None

  def inputs(self) -> dict[str, Any]:
    """Those of `loop.Task.inputs` that are data."""
    return {
        "prompts": self.prompts,
        "held-out prompts": self.heldout_prompts,
        "documents": self.documents,
    }


def read_data(
    config: Config, tokenizer: Tokenizer, skipped_dir: pathlib.Path
) -> Data:
  """All of a run's data, which its seed has a part in."""
  reader = sources.Reader(config.seed, skipped_dir, tokenizer)
  encode = lambda split, source: evaluator.encode_prompts(
      reader.prompts(source, split), tokenizer, config.samples
  )
  return Data(
      prompts=encode("train", config.prompts),
      heldout_prompts=encode("heldout", config.heldout_prompts),
      documents=make_ptx_rows(config, reader),
  )


def make_batches(
    config: Config, data: Data, mesh: jax.sharding.Mesh
) -> Batches:
  """What the iterations of a run train on, in the order of its seed."""
  make = lambda rows, batch_size: iter(
      pipeline.make_dataset(
          rows,
          batch_size=batch_size,
          seed=config.seed,
          local_rows=device_mesh.local_rows(mesh, batch_size),
      )
  )
  return Batches(
      make(data.prompts, config.rollout_batch_size),
      data.documents and make(data.documents, config.ptx_batch_size),
  )


def make_ptx_rows(config: Config, reader: sources.Reader) -> LMBatch | None:
  """Packed pretraining text, or None without PTX."""
  if not config.ppo.ptx_coef:
    return None
  examples, report = encoding.encode_documents(
      reader.documents(config.ptx_documents, "train"),
      reader.tokenizer,
      max_length=config.ptx_seq_len,
      policy="split",
  )
  logging.info("ppo: PTX documents: %s", report)
  return packing.pack(
      examples, config.ptx_seq_len, pad_id=reader.tokenizer.pad_id
  )


def _check_fits(
    config: Config,
    policy: models.Policy,
    ref_policy: models.Policy,
    reward_model: models.RewardModel | None,
) -> None:
  # A value network from the reward model has its tokenizer and its length.
  checks.check_samples_fit(
      config.samples,
      {"policy": policy, "reference policy": ref_policy},
      reward_model,
  )
  if policy.tokenizer.fingerprint != ref_policy.tokenizer.fingerprint:
    raise ConfigError(
        "the reference policy has another tokenizer than the policy: their "
        "log-probs cannot be compared"
    )


if __name__ == "__main__":
  cli.launch(Config, run)
