"""Numbers in configs: their ranges, and whether models are long enough."""

import importlib.util
import math
from typing import Any

from experiments.harness import models
from experiments.harness.config import ConfigError
from rlhf_jax import optim


def check_ranges(section: Any, name: str, ranges: dict[str, str]) -> None:
  """Checks fields of `section`, called `name`, against ranges as text.

  Args:
    name: '' for the section that the message's path names already.
    ranges: field -> one of the texts in `_READ`.

  Raises:
    ValueError: with every field that is out of its range.
  """
  prefix = f"{name}." if name else ""
  wrong = [
      f"{prefix}{field}={getattr(section, field)} must be {_READ[wanted][1]}"
      for field, wanted in ranges.items()
      if not _READ[wanted][0](getattr(section, field))
  ]
  if wrong:
    raise ValueError("; ".join(wrong))


# Infinite is what few numbers may be, so it is said where one may.
_READ = {
    "> 0": (lambda x: 0 < x < math.inf, "greater than 0 and finite"),
    "> 0 or inf": (lambda x: x > 0, "greater than 0"),
    ">= 0": (lambda x: 0 <= x < math.inf, "0 or greater and finite"),
    ">= 1": (lambda x: 1 <= x < math.inf, "1 or greater"),
    # One token has no next one.
    ">= 2": (lambda x: 2 <= x < math.inf, "2 or greater"),
    "finite": (math.isfinite, "finite"),
    # What every generator of random numbers takes.
    "seed": (lambda x: 0 <= x < 2**32, "0 or greater and less than 2**32"),
    "[0, 1]": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "(0, 1]": (lambda x: 0 < x <= 1, "greater than 0 and at most 1"),
    "[0, 1)": (lambda x: 0 <= x < 1, "0 or greater and less than 1"),
}


def check_loop(cfg: Any) -> None:
  """Checks of a section `loop` what it cannot know by itself.

  Raises:
    ValueError: if it asks for wandb, which is not installed.
  """
  if cfg.wandb and importlib.util.find_spec("wandb") is None:
    raise ValueError(
        "loop.wandb=True needs the package wandb: pip install wandb, or set "
        "it to False"
    )


def check_optimizer(cfg: optim.OptimizerConfig, num_steps: int) -> None:
  """Checks the section `optimizer` of a stage of so many optimizer steps.

  Not in OptimizerConfig itself, whose numbers may be traced.

  Raises:
    ValueError: with every field that is out of its range.
  """
  check_ranges(
      cfg,
      "optimizer",
      {
          "learning_rate": "> 0",
          "warmup_steps": ">= 0",
          "final_fraction": "[0, 1]",
          "b1": "[0, 1)",
          "b2": "[0, 1)",
          "epsilon": "> 0",
          "weight_decay": ">= 0",
          "max_grad_norm": "> 0 or inf",
      },
  )
  if cfg.warmup_steps >= num_steps:
    raise ValueError(
        f"optimizer.warmup_steps={cfg.warmup_steps} must be less than the "
        f"{num_steps} optimizer steps that there are"
    )


def check_samples_fit(
    samples: Any,
    policies: dict[str, models.Policy],
    reward_model: models.Policy | models.RewardModel | None = None,
) -> None:
  """Checks that models are long enough for what `samples` lets one sample.

  Args:
    samples: an `evaluator.SampleConfig`.
    policies: what reads prompt and completion, by what messages call it; the
      first samples.
    reward_model: what scores, or its trunk; reads one token more, the end token
      behind a stop token. One with another tokenizer is passed over: how many
      tokens the text is to it is known only then.

  Raises:
    ConfigError: names the first model that is too short.
  """
  length = samples.max_prompt_length + samples.max_completion_length
  what = "samples.max_prompt_length + samples.max_completion_length"
  for name, policy in policies.items():
    if length > policy.config.max_length:
      raise ConfigError(
          f"{what} = {length} does not fit the {name}'s max_length="
          f"{policy.config.max_length}"
      )
  sampler = next(iter(policies.values()))
  if reward_model is None or (
      reward_model.tokenizer.fingerprint != sampler.tokenizer.fingerprint
  ):
    return
  if length + 1 > reward_model.config.max_length:
    raise ConfigError(
        f"{what} + 1 (an end token) = {length + 1} does not fit the reward "
        f"model's max_length={reward_model.config.max_length}"
    )
