"""The programs of a PPO iteration as shapes, and what they multiply.

They are those of `ppo_programs.py` and the reward model's, for arrays that are
nowhere: lowered and compiled, for whatever devices the mesh names, but not run.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness import (
    model_shapes,
    models,
    ppo_programs,
    value_network,
)
from experiments.harness.config import ConfigError
from rlhf_jax import device_mesh, optim, sharding
from rlhf_jax.generation.decode import SamplingConfig
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.planning import flops, memory
from rlhf_jax.planning.flops import Work
from rlhf_jax.planning.roofline import Phase, phase
from rlhf_jax.rewards import reward_model
from rlhf_jax.types import LMBatch, PromptBatch, ScoreNormalization
from rlhf_jax.updates import ppo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """One that a run jits.

  call: jitted; args: shapes of its arguments, each with where it lies.
  resident: names of arguments that stay on the chips between programs.
  phases: what a chip multiplies and reads.
  max_trip_count: of loops that end when every row has ended.
  """

  name: str
  call: Callable[..., Any]
  args: dict[str, Any]
  resident: tuple[str, ...]
  phases: list[Phase]
  max_trip_count: int = 1

  def lower(self) -> jax.stages.Lowered:
    """Before it is compiled."""
    return self.call.lower(*self.args.values())

  @property
  def input_bytes(self) -> int:
    """A chip's, of arguments that are there for this program alone."""
    return sum(
        memory.tree_bytes(x)
        for name, x in self.args.items()
        if name not in self.resident
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iteration:
  """All that one iteration runs.

  residents: name -> shapes of what is on the chips the whole time.
  flops: of the whole iteration, on all chips.
  """

  programs: list[Program]
  residents: dict[str, Any]
  policy_config: TransformerConfig


def make_iteration(config: Any, mesh: jax.sharding.Mesh) -> Iteration:
  """The programs of `experiments.ppo`'s Config on a mesh.

  Raises:
    ConfigError: reference policy or reward model have devices of their own.
    ConfigError, FileNotFoundError, FamilyError: see `model_shapes.load_config`.
    ValueError: a parameter does not divide over the mesh.
  """
  if config.placement.num_devices:
    raise ConfigError(
        "a plan is of models that share their devices: set "
        "placement.ref_policy.devices and placement.reward_model.devices to 0"
    )
  load = lambda place: model_shapes.load_config(place, config.compute)
  policy_config = load(config.init_from)
  ref_config = load(config.ref_policy) if config.ref_policy else policy_config
  reward_config = load(config.reward_model) if config.reward_model else None
  value_config, params, frozen = _start(config, policy_config, reward_config)
  tx = optim.make_optimizer(config.optimizer, config.num_updates)
  state = jax.eval_shape(
      lambda params, rng: ppo.create_ppo_state(params, tx, rng, config.ppo),
      params,
      jax.eval_shape(lambda: jax.random.key(0)),
  )
  rules = config.sharding
  place = lambda tree, rules: _placed(
      tree, sharding.shardings_of(tree, rules, mesh)
  )
  state = place(state, ppo_programs.state_rules(rules))
  residents = {
      "state": state,
      "frozen": place(frozen, rules.rules_of("policy")),
      "ref_params": place(
          model_shapes.params(ref_config, "policy"),
          rules.rules_of("ref_policy"),
      ),
  }
  if reward_config is not None:
    residents["reward_params"] = place(
        model_shapes.params(reward_config, "reward_model"),
        rules.rules_of("reward_model"),
    )
  programs = ppo_programs.make_programs(
      policy_config,
      ref_config,
      value_config,
      tx,
      state,
      mesh,
      rules,
      config.parallelism,
      config.samples.make_generate(policy_config),
  )
  work = _Counted(config, mesh, policy_config, ref_config, value_config)
  return Iteration(
      programs=_programs(
          config, mesh, programs, residents, work, reward_config
      ),
      residents=residents,
      policy_config=policy_config,
  )


def _start(config, policy_config, reward_config):
  """What `value_network.init_params` gives, as shapes."""
  if config.lora.rank and config.value_init == "reward_model":
    # Of the same shape, and needs no adapter on disk.
    config = dataclasses.replace(config, value_init="policy")
  found = []

  def init(policy_params, reward_params, rng):
    policy = models.Policy(policy_config, policy_params, _SameTokenizer())
    model = None
    if reward_config is not None:
      model = models.RewardModel(
          reward_config, reward_params, _normalization(), _SameTokenizer()
      )
    value_config, params, frozen = value_network.init_params(
        config, policy, model, rng
    )
    found.append(value_config)
    return params, frozen

  reward_params = reward_config and model_shapes.params(
      reward_config, "reward_model"
  )
  params, frozen = jax.eval_shape(
      init,
      model_shapes.params(policy_config, "policy"),
      reward_params,
      jax.eval_shape(lambda: jax.random.key(0)),
  )
  return found[0], params, frozen


class _SameTokenizer:
  fingerprint = ""


def _normalization() -> ScoreNormalization:
  return ScoreNormalization(gain=jnp.float32(1), bias=jnp.float32(0))


def _placed(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      shardings,
  )


def _rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
  return _placed(tree, jax.tree.map(lambda _: device_mesh.rows(mesh), tree))


def _programs(config, mesh, programs, residents, work, reward_config):
  rows, samples = config.rollout_batch_size, config.samples
  ids = lambda *shape: jax.ShapeDtypeStruct((rows, *shape), jnp.int32)
  prompts = PromptBatch(
      prompts=ids(samples.max_prompt_length),
      prompt_mask=ids(samples.max_prompt_length),
      index=ids(),
  )
  sampling = SamplingConfig(
      max_new_tokens=samples.max_completion_length,
      temperature=config.ppo.temperature,
      eos_id=0,
  )
  state, frozen = residents["state"], residents["frozen"]
  rollout_args = {
      "state": state,
      "prompts": _rows(prompts, mesh),
      "sampling": sampling,
      "frozen": frozen,
  }
  rollout = _rows(
      jax.eval_shape(programs.rollout, *rollout_args.values()), mesh
  )
  if config.overlap:
    # The rollout that is trained on while the next is sampled.
    state = dataclasses.replace(state, pending=rollout)
    residents["state"] = rollout_args["state"] = state
  score = jax.ShapeDtypeStruct((rows,), jnp.float32)
  score_args = {
      "params": frozen | state.train.params,
      "ref_params": residents["ref_params"],
      "rollout": rollout,
      "score": _rows(score, mesh),
      "kl_coef": state.kl_coef,
      "cfg": config.ppo,
      "ref_hidden": None,
  }
  scored = _rows(
      jax.eval_shape(programs.score, *score_args.values())[0], mesh
  )
  ptx = None
  if config.ppo.ptx_coef:
    tokens = jax.ShapeDtypeStruct(
        (config.ptx_batch_size, config.ptx_seq_len), jnp.int32
    )
    loss_mask = jax.ShapeDtypeStruct(tokens.shape, jnp.float32)
    ptx = _rows(
        LMBatch(tokens=tokens, segment_ids=tokens, loss_mask=loss_mask), mesh
    )
  found = [
      Program(
          name="rollout",
          call=programs.rollout,
          args=rollout_args,
          resident=("state", "frozen"),
          phases=work.rollout(),
          max_trip_count=samples.max_completion_length - 1,
      ),
      Program(
          name="score",
          call=programs.score,
          args=score_args,
          resident=("params", "ref_params"),
          phases=work.score(),
      ),
      Program(
          name="update",
          call=programs.update,
          args={
              "state": state,
              "scored": scored,
              "ptx": ptx,
              "cfg": config.ppo,
              "frozen": frozen,
          },
          resident=("state", "frozen"),
          phases=work.update(memory.tree_bytes(state)),
      ),
  ]
  if reward_config is not None:
    # Whole episodes, and an end token behind those that another token ended.
    length = samples.max_prompt_length + samples.max_completion_length + 1
    tokens = _rows(ids(length), mesh)
    found.insert(1, Program(
        name="reward",
        call=reward_model.make_score_program(reward_config),
        args={
            "params": residents["reward_params"],
            "normalization": _normalization(),
            "tokens": tokens,
            "mask": tokens,
        },
        resident=("params",),
        phases=work.reward(reward_config, length),
    ))
  return found


class _Counted:
  """Matmuls of each program, a chip's share of them."""

  def __init__(self, config, mesh, policy, ref, value):
    self._config, self._mesh = config, mesh
    self._policy, self._ref, self._value = policy, ref, value
    self._prompt = config.samples.max_prompt_length
    self._completion = config.samples.max_completion_length
    self._length = self._prompt + self._completion

  def rollout(self) -> list[Phase]:
    rows, cfg = self._config.rollout_batch_size, self._policy
    prefill = flops.prefill(cfg, rows, self._prompt)
    decode = flops.decode_steps(cfg, rows, self._prompt, self._completion)
    return [
        self._phase("prefill", cfg, prefill),
        # One token has no positions to split.
        self._phase("decode", cfg, decode, split_positions=False),
    ]

  def reward(self, cfg: TransformerConfig, length: int) -> list[Phase]:
    rows = self._config.rollout_batch_size
    matmuls = flops.trunk(cfg, rows, length, length)
    matmuls.append(flops.scalar_head(cfg, rows * length))
    return [self._phase("forward", cfg, flops.total(matmuls))]

  def score(self) -> list[Phase]:
    config = self._config
    parts = config.ppo.num_microbatches
    rows = config.rollout_batch_size // parts
    ref = flops.trunk(self._ref, rows, self._length, self._length)
    ref.append(self._head(self._ref, rows))
    recompute = config.ppo.old_logprobs == "recompute"
    own = self._policy_and_value(rows, with_logprobs=recompute)
    work = flops.total([*own, *ref]).times(parts)
    return [self._phase("forward", self._policy, work)]

  def update(self, state_bytes: int) -> list[Phase]:
    """Forward and backward, and the optimizer's reading and writing.

    Its gradients are float32 and as many as the params: a third of the state,
    which holds two moments beside them.
    """
    config, cfg = self._config, self._config.ppo
    parts = cfg.num_minibatches * cfg.num_microbatches
    work = flops.training(
        self._policy_and_value(config.rollout_batch_size // parts),
        self._policy,
        frozen_base=bool(config.lora.rank),
    )
    if cfg.ptx_coef:
      rows, length = config.ptx_batch_size // parts, config.ptx_seq_len
      ptx = self._trunk(self._policy, rows, length)
      ptx.append(flops.head(self._policy, rows, length - 1))
      work += flops.training(
          ptx, self._policy, frozen_base=bool(config.lora.rank)
      )
    steps = cfg.num_epochs * cfg.num_minibatches
    optimizer_bytes = steps * (2 + 2 / 3) * state_bytes
    return [
        self._phase(
            "gradients", self._policy, work.times(parts * cfg.num_epochs)
        ),
        Phase(name="optimizer", flops=0.0, memory_bytes=optimizer_bytes),
    ]

  def _policy_and_value(
      self, rows: int, with_logprobs: bool = True
  ) -> list[flops.Matmul]:
    matmuls = []
    if with_logprobs:
      matmuls.append(self._head(self._policy, rows))
    if with_logprobs or self._value is None:
      matmuls += self._trunk(self._policy, rows, self._length)
    if self._value is not None:
      matmuls += self._trunk(self._value, rows, self._length)
    value = self._value or self._policy
    return [
        *matmuls, flops.scalar_head(value, rows * (self._completion + 1))
    ]

  def _trunk(self, cfg: TransformerConfig, rows: int, length: int):
    return flops.trunk(cfg, rows, length, length, self._config.lora.rank)

  def _head(self, cfg: TransformerConfig, rows: int) -> flops.Matmul:
    return flops.head(cfg, rows, self._completion)

  def _phase(
      self,
      name: str,
      cfg: TransformerConfig,
      work: Work,
      split_positions: bool = True,
  ) -> Phase:
    shape = self._mesh.shape
    row_shards = shape["replica"] * shape["data"] * shape["fsdp"]
    if split_positions:
      row_shards *= shape["sequence"]
    return phase(
        name,
        work,
        itemsize=jnp.dtype(cfg.dtype).itemsize,
        row_shards=row_shards,
        weight_shards=shape["tensor"],
    )
