"""Finished models on disk, as one stage leaves them for the next.

    <stage>/model/      config, params and, for a reward model, normalisation
    <stage>/tokenizer/  the tokenizer that it was trained with

A place is such a stage folder; `FOLDER@STEP`, `FOLDER@last` or `FOLDER@best`
(by the stage's `loop.best_metric`) for the policy in one of its checkpoints,
also of a stage that has not ended; `hf:FOLDER` for a model in Hugging Face's
layout, with its tokenizer, also in a bucket (`hf:gs://...`);
`peft:ADAPTER:hf:FOLDER` for such a model with a LoRA adapter in the layout of
the package `peft` merged into it; or `llama2c:MODEL.bin:TOKENIZER.model` for a
model in llama2.c's format with its sentencepiece tokenizer. `${NAME}` in a
place or source stands for an environment variable, `@run/` for the folder that
holds a run's stages.
"""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness import adapters, buckets
from experiments.harness import compute as compute_lib
from experiments.harness import config as config_lib
from experiments.harness.compute import ComputeConfig
from experiments.harness.config import ConfigError
from experiments.harness.fingerprint import fingerprint
from rlhf_jax import checkpoint, device_mesh
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import lora
from rlhf_jax.models.families import huggingface, llama2c, peft_folder
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.types import ScoreNormalization

LLAMA2C = "llama2c:"
HUGGING_FACE = "hf:"
PEFT = re.compile(r"peft:(.+):(hf:.+)")
RUN = "@run/"
# Any other @ is part of a path.
CHECKPOINT = re.compile(r"(.+)@(\d+|last|best)")


@dataclasses.dataclass(frozen=True)
class Policy:
  """A language model: its shape, its params and the text that it reads."""

  config: TransformerConfig
  params: Any
  tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class RewardModel:
  """A trained reward model."""

  config: TransformerConfig
  params: Any
  normalization: ScoreNormalization
  tokenizer: Tokenizer


def expand(place: str) -> str:
  """Replaces `${NAME}` by the environment variable.

  Raises:
    FileNotFoundError: if it is not set.
  """

  def value(match):
    name = match[1]
    if not os.environ.get(name):
      raise FileNotFoundError(
          f"{place}: the environment variable {name} is not set; it must name "
          "the folder of the data"
      )
    return os.environ[name]

  return re.sub(r"\$\{(\w+)\}", value, place)


def check_syntax(place: str) -> None:
  """Checks that what looks like a place of others' models is one.

  Raises:
    ConfigError: with the syntax that it should have.
  """
  if place.startswith("peft:") and not PEFT.fullmatch(place):
    raise ConfigError(
        f"{place!r}: a model with an adapter is peft:ADAPTER:hf:FOLDER"
    )
  if place == HUGGING_FACE:
    raise ConfigError(f"{place!r} names no folder: it is hf:FOLDER")


def advice(place: str) -> str:
  """What to name instead of a folder that holds no finished model."""
  config = pathlib.Path(place) / "config.json"
  # A stage has a config.json too.
  if config.is_file() and '"model_type"' in config.read_text(encoding="utf-8"):
    return f"did you mean {HUGGING_FACE}{place}?"
  return (
      "name the workdir of a stage that ended, or for a policy one of its "
      "checkpoints as FOLDER@STEP, FOLDER@last or FOLDER@best"
  )


def save_policy(folder: pathlib.Path, policy: Policy) -> None:
  """Writes a policy that `load_policy(folder)` reads."""
  _save_tokenizer(folder, policy.tokenizer)
  checkpoint.save_model(
      folder / "model",
      config_lib.to_dict(policy.config),
      policy.params,
      {"kind": "policy"},
  )


def _save_tokenizer(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
  if jax.process_index() == 0:
    tokenizer.save(folder / "tokenizer")


# (parameter's path, shape) -> where it goes; None is the default device.
PlaceParam = Callable[[str, tuple[int, ...]], Any]


def load_policy(
    place: str,
    compute: ComputeConfig | None = None,
    place_param: PlaceParam | None = None,
) -> Policy:
  """Reads a policy; see the module's docstring for the places.

  Args:
    compute: how the stage computes with it; None is as it was saved.
    place_param: where its params go; those of `hf:` go there one by one.

  Raises:
    ConfigError: it is no place, or cannot be computed with so.
    FileNotFoundError: none is there.
    checkpoint.CheckpointError: it is damaged, or its tokenizer is too large.
    ValueError: see `sharding.spec_of`.
  """
  policy = _load_policy(place, compute, place_param)
  return placed(_with_compute(place, policy, compute), place_param)


def placed(model: Any, place_param: PlaceParam | None) -> Any:
  """The policy or reward model with its params where they are to go."""
  if place_param is None:
    return model
  params = placed_params(model.params, place_param)
  return dataclasses.replace(model, params=params)


def placed_params(params: Any, place_param: PlaceParam) -> Any:
  """Each array where it is to go."""

  def put(key_path, x):
    path = jax.tree_util.keystr(key_path, simple=True, separator="/")
    return device_mesh.put(x, place_param(path, x.shape))

  return jax.tree_util.tree_map_with_path(put, params)


def _load_policy(
    place: str,
    compute: ComputeConfig | None = None,
    place_param: PlaceParam | None = None,
) -> Policy:
  place = expand(place)
  check_syntax(place)
  if place.startswith(LLAMA2C):
    model_path, _, tokenizer_path = place.removeprefix(LLAMA2C).partition(":")
    try:
      config, params = llama2c.load_llama2c(model_path)
    except ValueError as error:
      raise checkpoint.CheckpointError(str(error)) from error
    tokenizer = Tokenizer.from_sentencepiece(tokenizer_path)
    _check_vocabulary(place, config, tokenizer)
    return Policy(config, params, tokenizer)
  if match := PEFT.fullmatch(place):
    return _load_peft(*match.groups())
  if match := CHECKPOINT.fullmatch(place):
    return _load_checkpoint(place, *match.groups())
  config, params, tokenizer, _ = _load(place, "policy", compute, place_param)
  return Policy(config, params, tokenizer)


def load_tokenizer(place: str) -> Tokenizer:
  """The tokenizer of the policy at a place, without its params.

  Raises:
    FileNotFoundError: none is there.
    ConfigError: it is no place.
    TokenizerError: it is damaged.
  """
  place = expand(place)
  check_syntax(place)
  if place.startswith(LLAMA2C):
    return Tokenizer.from_sentencepiece(
        place.removeprefix(LLAMA2C).partition(":")[2]
    )
  if match := PEFT.fullmatch(place):
    place = match[2]
  if place.startswith(HUGGING_FACE):
    return _tokenizer_of(place.removeprefix(HUGGING_FACE))
  match = CHECKPOINT.fullmatch(place)
  stage = pathlib.Path(match[1] if match else place)
  if (stage / "tokenizer").is_dir():
    return Tokenizer.load(stage / "tokenizer")
  path = stage / "config.json"
  if match and path.exists():
    # Not ended: it has the tokenizer of what it started from.
    config = json.loads(path.read_text(encoding="utf-8"))
    if "init_from" in config:  # pretraining has none
      return load_tokenizer(started_from(stage, config))
  raise FileNotFoundError(
      f"{place} holds no tokenizer ({stage / 'tokenizer'} is not there); "
      + advice(place)
  )


def started_from(
    stage: str | pathlib.Path, stage_config: dict[str, Any]
) -> str:
  """The place that a stage started from, wherever its run lies now."""
  beside = f"{pathlib.Path(stage).resolve().parent}/"
  return stage_config["init_from"].replace(RUN, beside)


def _load_peft(adapter_folder: str, place: str) -> Policy:
  policy = load_policy(place)
  family = huggingface.family_of(place.removeprefix(HUGGING_FACE))
  try:
    config, adapter = peft_folder.load_adapter(
        adapter_folder, family, policy.params
    )
  except lora.LoraError as error:
    raise checkpoint.CheckpointError(f"{adapter_folder}: {error}") from error
  params = lora.merge(policy.params, adapter, config.scale)
  return dataclasses.replace(policy, params=params)


def _load_checkpoint(place: str, stage: str, which: str) -> Policy:
  path = pathlib.Path(stage) / "config.json"
  if not path.exists():
    raise FileNotFoundError(f"{stage} is not the folder of a stage")
  config = json.loads(path.read_text(encoding="utf-8"))
  adapter = _adapter_config(config)
  if (pathlib.Path(stage) / "model").is_dir() and adapter is None:
    policy = load_policy(stage)
  else:
    # Not ended: it has the shape and the tokenizer of what it started from. An
    # adapter has its base from there, ended or not.
    if "init_from" not in config:
      raise FileNotFoundError(
          f"{place}: a stage that starts from nothing has no tokenizer on disk "
          "before it ends"
      )
    policy = load_policy(started_from(stage, config), _compute_of(config))
  # Language models have their loop in the section that they share.
  loop = (config["train"] if "train" in config else config)["loop"]
  if which == "best" and not loop["best_metric"]:
    raise FileNotFoundError(
        f"{place}: the stage kept no best checkpoint: its loop.best_metric is "
        "''"
    )
  params, saved = checkpoint.load_params(
      pathlib.Path(stage) / "checkpoints",
      int(which) if which.isdigit() else which,
      prefixes=("train.params.policy", "params"),
      best_metric=loop["best_metric"],
      best_mode=loop["best_mode"],
  )
  if adapter is not None:
    _check_base(stage, started_from(stage, config), policy, saved["inputs"])
    params = lora.merge(policy.params, params["adapter"], adapter.scale)
  return dataclasses.replace(policy, params=params)


def _check_base(
    stage: str, base: str, policy: Policy, inputs: dict[str, str]
) -> None:
  """An adapter on other weights is another model, without a word."""
  if (pathlib.Path(stage) / "adapter").is_dir():
    wanted = adapters.load(stage).base
    found = fingerprint(policy.params["trunk"])
  else:
    wanted, found = inputs[adapters.INPUT], fingerprint(policy.params)
  if found != wanted:
    raise checkpoint.CheckpointError(
        f"{stage} trained an adapter on {base}, whose weights are others now: "
        f"their fingerprint is {found[:12]} and was {wanted[:12]}. Put back "
        "what was there"
    )


def _compute_of(stage_config: dict[str, Any]) -> ComputeConfig | None:
  if "compute" not in stage_config:
    return None
  # Its attention backend may not be on this machine.
  section = stage_config["compute"] | {"attention_backend": "auto"}
  return config_lib.from_config(ComputeConfig, section, "compute")


def _adapter_config(stage_config: dict[str, Any]) -> lora.LoraConfig | None:
  if "lora" not in stage_config or not stage_config["lora"]["rank"]:
    return None
  return config_lib.from_config(lora.LoraConfig, stage_config["lora"], "lora")


def save_reward_model(folder: pathlib.Path, model: RewardModel) -> None:
  """Writes a reward model that `load_reward_model(folder)` reads."""
  _save_tokenizer(folder, model.tokenizer)
  checkpoint.save_model(
      folder / "model",
      config_lib.to_dict(model.config),
      model.params,
      {
          "kind": "reward_model",
          "gain": float(model.normalization.gain),
          "bias": float(model.normalization.bias),
      },
  )


def load_reward_model(
    place: str,
    compute: ComputeConfig | None = None,
    place_param: PlaceParam | None = None,
) -> RewardModel:
  """Reads a reward model from the folder of a reward stage.

  Args:
    compute, place_param: as in `load_policy`.

  Raises:
    As `load_policy`.
  """
  place = expand(place)
  check_syntax(place)
  config, params, tokenizer, extra = _load(
      place, "reward_model", compute, place_param
  )
  model = RewardModel(
      config=config,
      params=params,
      normalization=ScoreNormalization(
          gain=jnp.float32(extra["gain"]), bias=jnp.float32(extra["bias"])
      ),
      tokenizer=tokenizer,
  )
  return placed(_with_compute(place, model, compute), place_param)


def _with_compute(place: str, model: Any, compute: ComputeConfig | None):
  if compute is None:
    return model
  try:
    config = compute.changed(model.config)
  except ValueError as error:
    raise ConfigError(f"compute: {place}: {error}") from error
  return dataclasses.replace(
      model, config=config, params=compute_lib.cast(model.params, config)
  )


def _load(
    place: str,
    kind: str,
    compute: ComputeConfig | None,
    place_param: PlaceParam | None,
):
  if place.startswith(HUGGING_FACE):
    return _load_hugging_face(place, kind, compute, place_param)
  folder = pathlib.Path(place) / "model"
  if not folder.is_dir():
    raise FileNotFoundError(
        f"{place} holds no finished model ({folder} is not there); "
        + advice(place)
    )
  config, params, extra = checkpoint.load_model(folder, place_param)
  _check_kind(place, extra["kind"], kind)
  config = config_lib.from_config(TransformerConfig, config, str(folder))
  tokenizer = Tokenizer.load(pathlib.Path(place) / "tokenizer")
  _check_vocabulary(place, config, tokenizer)
  return config, params, tokenizer, extra


def _load_hugging_face(
    place: str,
    kind: str,
    compute: ComputeConfig | None,
    place_param: PlaceParam | None,
):
  folder = place.removeprefix(HUGGING_FACE)
  dtype = compute.param_dtype if compute and compute.param_dtype else "float32"
  loaded = huggingface.load_folder(
      folder, param_dtype=dtype, sharding=place_param
  )
  _check_kind(place, loaded.kind, kind)
  tokenizer = _tokenizer_of(folder)
  _check_vocabulary(place, loaded.config, tokenizer)
  # Their scores are what they are.
  return loaded.config, loaded.params, tokenizer, {"gain": 1.0, "bias": 0.0}


def _tokenizer_of(folder: str) -> Tokenizer:
  with buckets.local_copy(folder) as local:
    return Tokenizer.from_pretrained_folder(local)


def _check_kind(place: str, found: str, wanted: str) -> None:
  if found != wanted:
    raise FileNotFoundError(
        f"{place} holds a {found}, and a {wanted} is needed here"
    )


def _check_vocabulary(
    place: str, config: TransformerConfig, tokenizer: Tokenizer
) -> None:
  # A token without an embedding would read as NaN.
  if tokenizer.vocab_size > config.vocab_size:
    raise checkpoint.CheckpointError(
        f"{place}: the tokenizer has {tokenizer.vocab_size} tokens, more than "
        f"the model's vocabulary {config.vocab_size}; give the tokenizer that "
        "the model was trained with"
    )
