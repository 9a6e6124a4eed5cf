"""The config of many runs of PPO at once: which they are, and what cannot be.

Members are runs of one compiled program on stacked arrays. So what they differ
in is data: the seed, the coefficients of PPO, and of the optimizer's what its
state holds. What fixes the program is the same in all.
"""

import dataclasses
import math

import jax

from experiments.harness import config as config_lib
from experiments.harness import devices, ppo_config
from rlhf_jax.updates import ppo

# Of the optimizer's coefficients those that are data, see `optim.py`.
_OPTIMIZER = ("learning_rate", "weight_decay", "max_grad_norm")


def variable_fields() -> list[str]:
  """Dotted names of the fields of PPO's config that members may differ in."""
  coefficients = [
      field.name
      for field in dataclasses.fields(ppo.PPOConfig)
      if "static" not in field.metadata
  ]
  return [f"ppo.{x}" for x in coefficients] + [
      f"optimizer.{x}" for x in _OPTIMIZER
  ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """num_seeds: every setting is run with the seeds ppo.seed, ppo.seed + 1, ...

  vary: 'field=value,value,...' each, with as many values: setting i has the
    i-th of every field. () is one setting, that of `ppo`.
  ppo: a whole config of experiments.ppo; what `vary` names is not read of it.
  """

  num_seeds: int
  vary: tuple[str, ...]
  ppo: ppo_config.Config

  def __post_init__(self):
    if self.num_seeds < 1:
      raise ValueError(f"num_seeds={self.num_seeds} must be 1 or greater")
    self.members()
    _check_together(self.ppo)

  def members(self) -> dict[str, ppo_config.Config]:
    """Every member's own config, by its name.

    Raises:
      ValueError: `vary` is not as it should be, or a member's config is not.
    """
    found = {}
    for setting in _settings(self.vary, self.ppo):
      for seed in range(self.ppo.seed, self.ppo.seed + self.num_seeds):
        fields = [
            f"{path.rpartition('.')[2]}{value}"
            for path, value in setting.items()
        ]
        name = "_".join([*fields, f"seed{seed}"])
        if name in found:
          raise ValueError(f"vary: two settings are the same: {setting}")
        try:
          found[name] = _replaced(self.ppo, setting, seed)
        except ValueError as error:
          raise ValueError(f"member {name}: {error}") from error
    return found


def _replaced(
    cfg: ppo_config.Config, setting: dict[str, float], seed: int
) -> ppo_config.Config:
  sections = {}
  for path, value in setting.items():
    section, _, field = path.partition(".")
    sections.setdefault(section, {})[field] = value
  changed = {
      section: dataclasses.replace(getattr(cfg, section), **changes)
      for section, changes in sections.items()
  }
  return dataclasses.replace(cfg, seed=seed, **changed)


def _settings(
    vary: tuple[str, ...], cfg: ppo_config.Config
) -> list[dict[str, float]]:
  """One {dotted name: value} a setting."""
  values = {}
  for item in vary:
    path, has_values, texts = (x.strip() for x in item.partition("="))
    if not has_values:
      raise ValueError(f"vary: {item!r} is not 'field=value,value,...'")
    _check_variable(path, cfg)
    if path in values:
      raise ValueError(f"vary: {path} is given twice")
    if not texts:
      raise ValueError(f"vary: {path} is given no values")
    values[path] = [_number(path, x) for x in texts.split(",")]
  if not values:
    return [{}]
  lengths = {path: len(x) for path, x in values.items()}
  if len(set(lengths.values())) > 1:
    told = ", ".join(f"{path} has {n}" for path, n in lengths.items())
    raise ValueError(f"vary: all must have as many values, and {told}")
  return [dict(zip(values, each)) for each in zip(*values.values())]


def _check_variable(path: str, cfg: ppo_config.Config) -> None:
  known = variable_fields()
  if path in known:
    return
  if path == "seed":
    raise ValueError("vary: for members of several seeds set num_seeds")
  if path in config_lib.dotted_paths(config_lib.to_dict(cfg)):
    raise ValueError(
        f"vary: {path} is the same in all members, as it is part of the "
        f"program that they share; what can vary is {', '.join(known)}"
    )
  near = config_lib.nearest_paths(path, known)
  hint = f"did you mean {' or '.join(near)}?" if near else (
      f"what can vary is {', '.join(known)}"
  )
  raise ValueError(f"vary: there is no field {path!r}; {hint}")


def _number(path: str, text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if math.isnan(value):
    raise ValueError(f"vary: {path}: {text.strip()!r} is no number")
  return value


def _check_together(cfg: ppo_config.Config) -> None:
  """Refuses what members cannot have, whatever they vary."""
  num = devices.num_devices() - cfg.placement.num_devices
  axes = [
      f"mesh.{name}={size}"
      for name, size in cfg.mesh.sizes(num).items()
      if name != "data" and size > 1
  ]
  best, slots = cfg.loop.best_metric, cfg.samples.num_slots
  reasons = (
      (
          axes,
          f"ppo.{', '.join(axes)}: members are split by rows alone, over "
          "mesh.data; set the other axes to 1",
      ),
      (
          cfg.parallelism == "pmap",
          "ppo.parallelism='pmap': members are stacked by vmap; set 'jit'",
      ),
      (
          cfg.overlap,
          "ppo.overlap=1: members sample and score by turns; set 0",
      ),
      (
          cfg.fuse_iteration,
          "ppo.fuse_iteration=True: members' programs are apart; set False",
      ),
      (
          cfg.placement.num_devices,
          "ppo.placement: all models are on the policy's devices; set 0",
      ),
      (
          cfg.samples.rollout_weights != "compute",
          f"ppo.samples.rollout_weights={cfg.samples.rollout_weights!r}: "
          "members are evaluated by what rolls out; set 'compute'",
      ),
      (
          slots,
          f"ppo.samples.num_slots={slots}: slots of several members would wait "
          "for one another; set 0",
      ),
      (
          best,
          f"ppo.loop.best_metric={best!r}: a checkpoint holds all members, and "
          "is not the best of each; set ''",
      ),
      (
          cfg.loop.wandb,
          "ppo.loop.wandb=True: a process is one run there; set False",
      ),
      (
          jax.process_count() > 1,
          f"there are {jax.process_count()} processes: members take one",
      ),
  )
  wrong = [reason for is_so, reason in reasons if is_so]
  if wrong:
    raise ValueError("; ".join(wrong))
