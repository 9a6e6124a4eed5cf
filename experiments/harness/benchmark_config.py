"""The config of a benchmark, and what can be wrong with it."""

import dataclasses
import difflib

from experiments.harness import ppo_config
from rlhf_jax.models.transformer import TransformerConfig

MEASURES = ("generation", "sft", "reward", "dpo", "ppo", "startup")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """size: what results are called by: those of one size can be compared.

  measures: which, of `MEASURES`, in this order.
  repeats: of which median, least and most are told.
  warmups: runs before them, the compiling one included.
  model: the shape of every model.
  batch_size: rows of a supervised step, each a prompt and a completion long.
  num_pairs: of a reward step, and of DPO's.
  copy_mib: size of the array whose copying is the memory's bandwidth; more
    than caches hold.
  ppo: a whole config of PPO. Generation has its number of prompts and their
    lengths; the places of models, data and judge are not read.
  """

  size: str
  measures: tuple[str, ...]
  repeats: int
  warmups: int
  model: TransformerConfig
  batch_size: int
  num_pairs: int
  copy_mib: int
  ppo: ppo_config.Config

  def __post_init__(self):
    for name in ("repeats", "warmups", "batch_size", "num_pairs", "copy_mib"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1: {getattr(self, name)}")
    _check_measures(self.measures)
    if self.length + 1 > self.model.max_length:
      raise ValueError(
          f"model.max_length={self.model.max_length} must be at least "
          f"{self.length + 1}: prompt, completion and an end token"
      )
    _check_plain(self.ppo)

  @property
  def prompt_length(self) -> int:
    """Tokens of every prompt."""
    return self.ppo.samples.max_prompt_length

  @property
  def completion_length(self) -> int:
    """Tokens of every completion: none ends before."""
    return self.ppo.samples.max_completion_length

  @property
  def length(self) -> int:
    """Of a whole row."""
    return self.prompt_length + self.completion_length


def _check_measures(measures: tuple[str, ...]) -> None:
  if not measures:
    raise ValueError(f"measures is empty; there are {', '.join(MEASURES)}")
  for name in measures:
    if name not in MEASURES:
      near = difflib.get_close_matches(name, MEASURES, n=1, cutoff=0.4)
      hint = f"did you mean {near[0]!r}?" if near else "there is no such one;"
      raise ValueError(
          f"measures: {name!r} is unknown; {hint} there are "
          f"{', '.join(MEASURES)}"
      )
  if len(set(measures)) < len(measures):
    raise ValueError(f"measures names one twice: {', '.join(measures)}")


def _check_plain(cfg: ppo_config.Config) -> None:
  """Refuses what the floors and the peers do not know of."""
  off = {
      "lora.rank": cfg.lora.rank,
      "ppo.ptx_coef": cfg.ppo.ptx_coef,
      "overlap": cfg.overlap,
      "reward_rule": cfg.reward_rule,
      "samples.stop_tokens": cfg.samples.stop_tokens,
      "placement (devices)": cfg.placement.num_devices,
  }
  for name, value in off.items():
    if value:
      raise ValueError(f"ppo.{name}={value!r}: a benchmark has none")
