"""Improves a policy against a reward model by PPO.

    python -m experiments.ppo --config=configs/ppo.py --workdir=DIR

An iteration is three programs: rollout (sample completions), score (reference
log-probs, values, rewards, advantages), update (epochs x minibatches). See
`rlhf_jax/updates/ppo.py` for what happens inside.

  1. Loads policy, reference policy (the same by default) and reward model; the
     value network starts from the reward model, the policy or zero.
  2. Iterates; every evaluation samples held-out prompts and, where a judge is
     named, has it say what training never sees.
  3. Leaves DIR/model and DIR/tokenizer; DIR/checkpoints holds the whole state.
"""

import dataclasses
from typing import Any, Literal

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
from experiments.harness.compute import ComputeConfig
from experiments.harness.config import ConfigError
from experiments.harness.parallelism import Parallelism, check_parallelism
from experiments.harness.reference import Reference
from rlhf_jax import optim, sharding
from rlhf_jax.data import encoding, packing, pipeline
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.generation import decode
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.rewards.episodes import Episodes, RewardFn
from rlhf_jax.sharding import MeshConfig
from rlhf_jax.types import LMBatch
from rlhf_jax.updates import ppo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """init_from: the policy.

  ref_policy: what KL is measured from, '' for init_from.
  reward_model: the place of what scores, unless a rule does.
  reward_rule: 'module:function' of (prompt, completion) texts -> float, scores
    instead of a reward model ('' for none).
  value_network: 'separate', or a head on the policy's own trunk ('shared').
  value_init: 'reward_model' takes its trunk and head (separate only); 'policy'
    the policy's trunk with a fresh head; 'zero' the same with a zero head.
  compute: how, see `harness/compute.py`.
  lora: an adapter to train on the policy instead of it, and another one for a
    separate value network, beside its head; of rank 0 for none. The policy's
    weights then serve policy, reference policy and value network;
    value_init='reward_model' needs a reward model with an adapter on them.
  rollout_batch_size: episodes an iteration, over all devices.
  mesh, sharding: over which devices and how, see `harness/devices.py`.
  placement: reference policy and reward model may have devices of their own.
  overlap: 1 samples the next rollout while this one is scored, by a policy that
    is one update older (with ppo.importance_correction); 0 takes turns.
  parallelism: jit or pmap, see `harness/parallelism.py`.
  samples: also fixes prompt and completion lengths; its temperature is that of
    evaluation, ppo.temperature that of training.
  ptx_documents: pretraining text for ppo.ptx_coef (source '' if that is 0).
  judge: says what is true at evaluations, see `harness/evaluator.py`.
  """

  seed: int
  init_from: str
  ref_policy: str
  reward_model: str
  reward_rule: str
  value_network: Literal["separate", "shared"]
  value_init: Literal["reward_model", "policy", "zero"]
  prompts: sources.SourceConfig
  heldout_prompts: sources.SourceConfig
  rollout_batch_size: int
  mesh: MeshConfig
  sharding: devices.PPOSharding
  placement: devices.PlacementConfig
  overlap: Literal[0, 1]
  parallelism: Parallelism
  ptx_documents: sources.SourceConfig
  ptx_batch_size: int
  ptx_seq_len: int
  optimizer: optim.OptimizerConfig
  compute: ComputeConfig
  lora: LoraConfig
  ppo: ppo.PPOConfig
  loop: loop.LoopConfig
  samples: evaluator.SampleConfig
  judge: str
  num_logged_samples: int

  def __post_init__(self):
    checks.check_ranges(
        self, "", {"seed": "seed", "num_logged_samples": ">= 0"}
    )
    _check_ppo(self.ppo)
    checks.check_optimizer(self.optimizer, self.num_updates)
    checks.check_loop(self.loop)
    parts = self.ppo.num_minibatches * self.ppo.num_microbatches
    taken = self.placement.num_devices
    devices.check_divides(
        self.rollout_batch_size, parts, self.mesh, "rollout_batch_size", taken
    )
    _check_placement(self)
    devices.check_length(
        self.samples.max_prompt_length + self.samples.max_completion_length,
        self.mesh,
        "samples.max_prompt_length + samples.max_completion_length",
    )
    check_parallelism(
        self.parallelism, self.mesh.sizes(devices.num_devices() - taken)
    )
    if self.ppo.ptx_coef:
      checks.check_ranges(self, "", {"ptx_seq_len": ">= 2"})
      devices.check_divides(
          self.ptx_batch_size, parts, self.mesh, "ptx_batch_size", taken
      )
      devices.check_length(self.ptx_seq_len, self.mesh, "ptx_seq_len")
    if bool(self.ppo.ptx_coef) != bool(self.ptx_documents.source):
      raise ValueError(
          f"ppo.ptx_coef={self.ppo.ptx_coef} and ptx_documents.source="
          f"{self.ptx_documents.source!r}: give both or neither"
      )
    if self.value_network == "shared" and self.value_init == "reward_model":
      raise ValueError(
          "value_network='shared' reads the policy's trunk, so value_init must "
          "be 'policy' or 'zero'"
      )
    if bool(self.reward_model) == bool(self.reward_rule):
      raise ValueError("give either reward_model or reward_rule")
    if self.value_init == "reward_model" and not self.reward_model:
      raise ValueError(
          "value_init='reward_model' needs a reward_model; beside a rule take "
          "'policy' or 'zero'"
      )
    if self.lora.rank and self.lora.dropout:
      raise ValueError(
          f"lora.dropout={self.lora.dropout}: PPO's log-probs must be a "
          "function of the params; set it to 0"
      )
    evaluator.check_judge(self.judge)

  @property
  def num_updates(self) -> int:
    """Optimizer steps over all iterations."""
    return (
        self.loop.num_steps * self.ppo.num_epochs * self.ppo.num_minibatches
    )


def _check_placement(config: Config) -> None:
  if bool(config.overlap) != config.ppo.importance_correction:
    raise ValueError(
        f"overlap={config.overlap} and ppo.importance_correction="
        f"{config.ppo.importance_correction}: rollouts of an older policy need "
        "the correction, and others have nothing to correct"
    )
  place = config.placement.reward_model
  if place.devices and not config.reward_model:
    raise ValueError("placement.reward_model: there is no reward_model")
  for name, own in (
      ("ref_policy", config.placement.ref_policy), ("reward_model", place)
  ):
    if own.devices:
      devices.check_divides(
          config.rollout_batch_size,
          1,
          own.mesh,
          f"placement.{name}: rollout_batch_size",
          devices.num_devices() - own.devices,
      )
  if config.placement.ref_policy.devices and config.lora.rank:
    raise ValueError(
        "placement.ref_policy: with lora the reference policy is the policy's "
        "own base; it cannot have other devices"
    )


def _check_ppo(cfg: ppo.PPOConfig) -> None:
  # Not in PPOConfig itself, whose numbers may be traced.
  ranges = {
      "num_epochs": ">= 1",
      "num_minibatches": ">= 1",
      "num_microbatches": ">= 1",
      "temperature": "> 0",
      "gamma": "[0, 1]",
      "gae_lambda": "[0, 1]",
      "cliprange": "> 0",
      "cliprange_value": "> 0",
      "vf_coef": ">= 0",
      "entropy_coef": ">= 0",
      "ptx_coef": ">= 0",
      "kl_coef": ">= 0",
      "max_update_kl": "> 0 or inf",
      "importance_cap": "> 0",
      "missing_eos_score": "finite",
  }
  if cfg.kl_controller == "adaptive":
    # It multiplies kl_coef: 0 would stay 0.
    ranges |= {"kl_target": "> 0", "kl_horizon": "> 0", "kl_coef": "> 0"}
  checks.check_ranges(cfg, "ppo", ranges)


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


def run(config: Config, workdir: str) -> None:
  """Runs the stage, or what is left of it."""
  # ---- models ----------------------------------------------------------------
  out = stage.Stage(workdir, config)
  if out.finished:
    return
  meshes = devices.make_meshes(config.mesh, config.placement)
  mesh = meshes["policy"]
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
  reference = Reference(ref_policy, meshes, on("policy"))
  _check_fits(config, policy, ref_policy, reward_model)
  rng_state, rng_value = jax.random.split(jax.random.key(config.seed))
  value_config, params, frozen = value_network.init_params(
      config, policy, reward_model, rng_value
  )
  frozen = sharding.place(frozen, config.sharding.rules_of("policy"), mesh)
  tx = optim.make_optimizer(config.optimizer, config.num_updates)

  # ---- data ------------------------------------------------------------------
  skipped_dir = out.dir / "skipped"
  reader = sources.Reader(config.seed, skipped_dir, policy.tokenizer)
  encode = lambda split, source: evaluator.encode_prompts(
      reader.prompts(source, split),
      policy.tokenizer,
      config.samples,
  )
  prompts = encode("train", config.prompts)
  heldout_prompts = encode("heldout", config.heldout_prompts)
  ptx_rows = make_ptx_rows(config, reader)
  make_batches = lambda rows, batch_size: iter(
      pipeline.make_dataset(
          rows,
          batch_size=batch_size,
          seed=config.seed,
          local_rows=sharding.local_rows(mesh, batch_size),
      )
  )
  batches = Batches(
      make_batches(prompts, config.rollout_batch_size),
      ptx_rows and make_batches(ptx_rows, config.ptx_batch_size),
  )
  sampler = evaluator.Evaluator(
      policy.config,
      policy.tokenizer,
      heldout_prompts,
      config.samples.sampling(policy.tokenizer),
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
  )
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
          "prompts": prompts,
          "held-out prompts": heldout_prompts,
          "documents": ptx_rows,
          "reference policy": ref_policy.params,
          "reward model": reward_model
          and (reward_model.params, reward_model.normalization),
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
      out.dir, dataclasses.replace(policy, params=sharding.to_host(params))
  )
  out.finish(evaluate(state)[0])


class Step:
  """One iteration, (state, (prompts, ptx)) -> (state, metrics, evidence).

  Three programs, and between the first two whatever scores: it may be a model
  on the device or a function of the text on the host. With `overlap` the state
  holds the rollout that is scored now, and the next is sampled meanwhile.
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

  def started(self, state: ppo.PPOState, batches: Batches) -> ppo.PPOState:
    """The state before the first iteration, with what that is to train on."""
    if not self._config.overlap:
      return state
    prompts, _ = sharding.shard_rows(next(batches), self._meshes["policy"])
    return dataclasses.replace(state, pending=self._rollout(state, prompts, 0))

  def __call__(self, state, batch):
    config = self._config
    prompts, ptx = sharding.shard_rows(batch, self._meshes["policy"])
    ahead = config.overlap
    rollout = sampled = self._rollout(state, prompts, ahead)
    if ahead:
      # The device is busy with it while the older one is scored.
      rollout = state.pending
      state = dataclasses.replace(state, pending=sampled)
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

  def _rollout(self, state, prompts, ahead):
    return self._programs.rollout(
        state, prompts, self._sampling, self._frozen, ahead=ahead
    )

  def _score(self, rollout):
    mesh, own = self._meshes["policy"], self._meshes["reward_model"]
    if own != mesh:
      rollout = sharding.put_rows(rollout, own)
    score = self._reward_fn(Episodes(rollout, self._tokenizer))
    return sharding.put_rows(score, mesh)


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
