"""Ranges of numbers in configs, checked before anything is loaded."""

from typing import Any

from rlhf_jax import optim


def check_ranges(section: Any, name: str, ranges: dict[str, str]) -> None:
  """Checks fields of `section`, called `name`, against ranges as text.

  A range is '> 0', '>= 0', '>= 1', '[0, 1]', '[0, 1)' or '(0, 1]'.

  Raises:
    ValueError: with every field that is out of its range.
  """
  wrong = [
      f"{name}.{field}={getattr(section, field)} must be {_READ[wanted][1]}"
      for field, wanted in ranges.items()
      if not _READ[wanted][0](getattr(section, field))
  ]
  if wrong:
    raise ValueError("; ".join(wrong))


_READ = {
    "> 0": (lambda x: x > 0, "greater than 0"),
    ">= 0": (lambda x: x >= 0, "0 or greater"),
    ">= 1": (lambda x: x >= 1, "1 or greater"),
    "[0, 1]": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "(0, 1]": (lambda x: 0 < x <= 1, "greater than 0 and at most 1"),
    "[0, 1)": (lambda x: 0 <= x < 1, "0 or greater and less than 1"),
}


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
          "max_grad_norm": "> 0",
      },
  )
  if cfg.warmup_steps >= num_steps:
    raise ValueError(
        f"optimizer.warmup_steps={cfg.warmup_steps} must be less than the "
        f"{num_steps} optimizer steps that there are"
    )
