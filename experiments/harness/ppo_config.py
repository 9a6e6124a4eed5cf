"""The config of PPO, and what can be wrong with it before anything runs."""

import dataclasses
from typing import Literal

from experiments.harness import checks, devices, evaluator, loop, sources
from experiments.harness.compute import ComputeConfig
from experiments.harness.parallelism import Parallelism, check_parallelism
from rlhf_jax import optim
from rlhf_jax.device_mesh import MeshConfig
from rlhf_jax.models.lora import LoraConfig
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
  fuse_iteration: an iteration is one program, for a reward model that reads the
    policy's tokens on its devices, see `harness/fused_iteration.py`.
  parallelism: jit or pmap, see `harness/parallelism.py`.
  samples: also fixes prompt and completion lengths, and the slots of rollouts;
    its temperature is that of evaluation, ppo.temperature that of training.
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
  fuse_iteration: bool
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
    if self.fuse_iteration:
      _check_fused(self)
    devices.check_length(
        self.samples.max_prompt_length + self.samples.max_completion_length,
        self.mesh,
        "samples.max_prompt_length + samples.max_completion_length",
        taken,
    )
    devices.check_slots(self.samples.num_slots, self.mesh, taken)
    check_parallelism(
        self.parallelism, self.mesh.sizes(devices.num_devices() - taken)
    )
    if self.ppo.ptx_coef:
      checks.check_ranges(self, "", {"ptx_seq_len": ">= 2"})
      devices.check_divides(
          self.ptx_batch_size, parts, self.mesh, "ptx_batch_size", taken
      )
      devices.check_length(
          self.ptx_seq_len, self.mesh, "ptx_seq_len", taken
      )
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


def _check_fused(config: Config) -> None:
  for is_so, name, why in (
      (config.reward_rule, "reward_rule", "a rule reads text on the host"),
      (config.overlap, "overlap", "the next rollout is a program of its own"),
      (config.placement.num_devices, "placement", "a program has one mesh"),
      (config.parallelism == "pmap", "parallelism", "pmap maps one program"),
  ):
    if is_so:
      raise ValueError(
          f"fuse_iteration=True with {name}={getattr(config, name)!r}: {why}; "
          "set fuse_iteration=False"
      )


def _check_ppo(cfg: ppo.PPOConfig) -> None:
  if cfg.old_logprobs == "rollout":
    if cfg.kl_estimator == "exact":
      raise ValueError(
          "ppo.kl_estimator='exact' takes the policy's logits, which "
          "ppo.old_logprobs='rollout' does not compute: use k1, k2 or k3"
      )
    if cfg.importance_correction:
      raise ValueError(
          "ppo.importance_correction compares recomputed log-probs with the "
          "sampler's: it needs ppo.old_logprobs='recompute'"
      )
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
