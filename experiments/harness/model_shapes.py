"""Models as shapes, without their weights: what a plan is made from.

A place is that of `models.py`, of which only the config is read: `hf:FOLDER`
needs no more than a config.json in it.
"""

import functools
import pathlib
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp

from experiments.harness import config as config_lib
from experiments.harness import models
from experiments.harness.compute import ComputeConfig
from experiments.harness.config import ConfigError
from rlhf_jax import array_folder
from rlhf_jax.models import heads
from rlhf_jax.models.families import hf_config, huggingface
from rlhf_jax.models.transformer import TransformerConfig


def load_config(place: str, compute: ComputeConfig) -> TransformerConfig:
  """The shape of the model at a place, as a stage computes with it.

  Raises:
    ConfigError: it is no place that has a config by itself, or cannot be
      computed with so.
    FileNotFoundError: none is there.
    FamilyError: its config asks for what is not implemented.
  """
  place = models.expand(place)
  models.check_syntax(place)
  if match := models.PEFT.fullmatch(place):
    place = match[2]
  if match := models.CHECKPOINT.fullmatch(place):
    place = match[1]
  if place.startswith(models.HUGGING_FACE):
    config = _of_hugging_face(place.removeprefix(models.HUGGING_FACE))
  else:
    config = _of_stage(place)
  try:
    return compute.changed(config)
  except ValueError as error:
    raise ConfigError(f"compute: {place}: {error}") from error


def _of_hugging_face(folder: str) -> TransformerConfig:
  model_type, fields = hf_config.read_fields(epath.Path(folder))
  family = huggingface.find_family(model_type, f"{folder}/config.json")
  return huggingface.make_config(family, fields)


def _of_stage(place: str) -> TransformerConfig:
  folder = pathlib.Path(place) / "model"
  if not folder.is_dir():
    raise FileNotFoundError(
        f"{place}: a plan reads the shape of a model from hf:FOLDER with a "
        "config.json, or from the folder of a stage that ended"
    )
  info = array_folder.read_info(folder)
  return config_lib.from_config(
      TransformerConfig, info["config"], str(folder)
  )


def params(config: TransformerConfig, kind: str) -> Any:
  """Shapes of a policy's params, or of a reward model's.

  Args:
    kind: 'policy' or 'reward_model'.
  """
  make = heads.LanguageModel if kind == "policy" else heads.ScalarModel
  init = functools.partial(make(config).init, tokens=jnp.zeros((1, 2), int))
  return jax.eval_shape(init, jax.random.key(0))["params"]
