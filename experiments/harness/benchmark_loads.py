"""The work of each part of a benchmark, for its floor.

Nothing that a program may leave out is in it: a step of decoding compares its
token with those that are there, and the head reads completion positions alone
where only they count.
"""

from experiments.harness.benchmark_config import Config
from experiments.harness.benchmark_limits import Load
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.planning import flops
from rlhf_jax.planning.flops import Matmul

# Of float32: params, gradients and two moments, each read and written once.
_OPTIMIZER_BYTES = 8 * 4


def prefill(config: Config) -> Load:
  """All prompts, and the logits of the first new token."""
  cfg, rows = config.model, config.ppo.rollout_batch_size
  length = config.prompt_length
  trunk = flops.trunk(cfg, rows, length, length)
  return Load(matmuls=(*trunk, flops.head(cfg, rows)))


def decode(config: Config) -> Load:
  """The tokens after the first; keys are as many as there are on average."""
  cfg, rows = config.model, config.ppo.rollout_batch_size
  num_keys = config.prompt_length + config.completion_length // 2
  trunk = flops.trunk(cfg, rows, 1, num_keys)
  return Load(
      matmuls=(*trunk, flops.head(cfg, rows)),
      times=config.completion_length - 1,
  )


def sft(config: Config, num_params: int) -> tuple[Load, ...]:
  """One supervised step."""
  length = config.length
  matmuls = _language_model(
      config.model, config.batch_size, length, length - 1
  )
  return Load(matmuls=matmuls, trained=True), optimizer(num_params)


def reward(config: Config, num_params: int) -> tuple[Load, ...]:
  """One step of a reward model on pairs."""
  matmuls = _scalar_model(
      config.model, 2 * config.num_pairs, config.length
  )
  return Load(matmuls=matmuls, trained=True), optimizer(num_params)


def dpo(config: Config, num_params: int) -> tuple[Load, ...]:
  """Forward and backward of a policy on pairs, forward of its reference."""
  matmuls = _language_model(
      config.model, 2 * config.num_pairs, config.length,
      config.completion_length,
  )
  return (
      Load(matmuls=matmuls),
      Load(matmuls=matmuls, trained=True),
      optimizer(num_params),
  )


def score(config: Config) -> tuple[Load, ...]:
  """Reward model, policy, value network and reference on a rollout.

  The policy only where its log-probs are computed again.
  """
  rows = config.ppo.rollout_batch_size
  reward_model = _scalar_model(config.model, rows, config.length + 1)
  ref = _language_model(
      config.model, rows, config.length, config.completion_length
  )
  recompute = config.ppo.ppo.old_logprobs == "recompute"
  own = _policy_and_value(config, rows, with_logprobs=recompute)
  return tuple(Load(matmuls=x) for x in (reward_model, own, ref))


def update(config: Config, num_params: int) -> tuple[Load, ...]:
  """All epochs and minibatches of one iteration."""
  cfg = config.ppo.ppo
  steps = cfg.num_epochs * cfg.num_minibatches
  rows = config.ppo.rollout_batch_size // cfg.num_minibatches
  return (
      Load(
          matmuls=_policy_and_value(config, rows), trained=True, times=steps
      ),
      optimizer(num_params, steps),
  )


def optimizer(num_params: int, times: int = 1) -> Load:
  """Steps of Adam, which are bytes alone."""
  return Load(
      matmuls=(), times=times, other_bytes=_OPTIMIZER_BYTES * num_params
  )


def _policy_and_value(
    config: Config, rows: int, with_logprobs: bool = True
) -> tuple[Matmul, ...]:
  trunk = flops.trunk(config.model, rows, config.length, config.length)
  positions = rows * config.completion_length
  matmuls = [flops.scalar_head(config.model, positions)]
  is_shared = config.ppo.value_network == "shared"
  if with_logprobs:
    matmuls.append(flops.head(config.model, rows, config.completion_length))
  if with_logprobs or is_shared:
    matmuls += trunk
  if not is_shared:
    matmuls += trunk
  return tuple(matmuls)


def _language_model(
    cfg: TransformerConfig, rows: int, length: int, num_positions: int
) -> tuple[Matmul, ...]:
  trunk = flops.trunk(cfg, rows, length, length)
  return (*trunk, flops.head(cfg, rows, num_positions))


def _scalar_model(
    cfg: TransformerConfig, rows: int, length: int
) -> tuple[Matmul, ...]:
  # A score is read at one position.
  return (*flops.trunk(cfg, rows, length, length), flops.scalar_head(cfg, rows))
