"""What a stage trains: a model, or an adapter on one that stays as it is.

    <stage>/model/    base and adapter merged: later stages read it as any model
    <stage>/adapter/  the adapter alone, and which base it belongs to

With an adapter, `trained` is what the optimizer, the state and its checkpoints
hold, and `frozen` what every function takes beside it: one base, however many
adapters there are on it. Without one (rank 0) nothing is frozen.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness import config as config_lib
from experiments.harness.config import ConfigError
from experiments.harness.fingerprint import fingerprint
from rlhf_jax import checkpoint
from rlhf_jax.models import lora
from rlhf_jax.models.lora import LoraConfig

_KIND = "adapter"
INPUT = "base model"  # what messages call it, too


@dataclasses.dataclass(frozen=True)
class Adapter:
  """A trained adapter as its stage left it.

  head: of a reward model's, else None.
  base: the fingerprint of the trunk that it belongs to.
  """

  config: LoraConfig
  params: dict[str, Any]
  head: dict[str, Any] | None
  base: str


def freeze(config: LoraConfig, base: dict[str, Any]) -> dict[str, Any]:
  """What is beside the trained params: {} without an adapter."""
  if not config.rank:
    return {}
  frozen = {"base": base, "adapter_scale": jnp.float32(config.scale)}
  if config.dropout:
    frozen["adapter_dropout"] = jnp.float32(config.dropout)
  return frozen


def init(
    config: LoraConfig, base: dict[str, Any], rng: jax.Array
) -> dict[str, Any]:
  """A fresh {"adapter"} on the base.

  Raises:
    ConfigError: a target is none of the base's projections.
  """
  try:
    return {"adapter": lora.init(rng, config, base)}
  except lora.LoraError as error:
    raise ConfigError(f"lora.{error}") from error


def inputs(frozen: dict[str, Any]) -> dict[str, Any]:
  """What a resumed run must find as it was: it is in no checkpoint."""
  return {INPUT: frozen["base"]} if frozen else {}


def merged(
    config: LoraConfig, frozen: dict[str, Any], trained: dict[str, Any]
) -> dict[str, Any]:
  """Plain params: what was trained, or base and adapter in one."""
  if not config.rank:
    return trained
  params = lora.merge(frozen["base"], trained["adapter"], config.scale)
  if "head" in trained:
    return {"trunk": params["trunk"], "head": trained["head"]}
  return params


def save(
    stage_dir: pathlib.Path,
    config: LoraConfig,
    frozen: dict[str, Any],
    trained: dict[str, Any],
) -> None:
  """Writes <stage>/adapter/, if there is an adapter."""
  if not config.rank:
    return
  checkpoint.save_model(
      stage_dir / _KIND,
      config_lib.to_dict(config),
      trained,
      {
          "kind": _KIND,
          "base": fingerprint(frozen["base"]["trunk"]),
      },
  )


def load(stage_dir: str | pathlib.Path) -> Adapter:
  """Reads what `save` wrote.

  Raises:
    FileNotFoundError: the stage trained no adapter, or has not ended.
  """
  folder = pathlib.Path(stage_dir) / _KIND
  if not folder.is_dir():
    raise FileNotFoundError(
        f"{stage_dir} holds no adapter ({folder} is not there): the stage was "
        "run with lora.rank=0, or has not ended"
    )
  config, params, extra = checkpoint.load_model(folder)
  return Adapter(
      config=config_lib.from_config(LoraConfig, config, str(folder)),
      params=params["adapter"],
      head=params["head"] if "head" in params else None,
      base=extra["base"],
  )
