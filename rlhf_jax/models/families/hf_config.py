"""A Hugging Face config, read so that nothing in it is passed over in silence.

`Fields` remembers which fields a family has asked for; what is left when it is
done, and is not known to change nothing, is an error that names it.
"""

from collections.abc import Mapping
import json
import math
from typing import Any

from etils import epath

from rlhf_jax.models.attention import RopeScaling
from rlhf_jax.models.transformer import TransformerConfig

# What says nothing about a forward pass, or what its name says of training
# (there is no dropout in a policy whose log-probs are to mean something).
_NEUTRAL = frozenset(
    "transformers_version architectures output_hidden_states return_dict dtype "
    "torch_dtype chunk_size_feed_forward id2label label2id problem_type "
    "pad_token_id bos_token_id eos_token_id use_cache initializer_range "
    "_name_or_path model_type output_attentions _attn_implementation "
    "attn_implementation num_labels torchscript use_bfloat16 "
    "attention_dropout hidden_dropout classifier_dropout resid_pdrop "
    "embd_pdrop attn_pdrop summary_first_dropout dropout activation_dropout "
    "layerdrop attention_probs_dropout_prob hidden_dropout_prob _commit_hash "
    # Left in published files by older versions and other tools.
    "_num_labels gradient_checkpointing prefix max_sequence_length "
    "transformers.js_config is_llama_config unsloth_version unsloth_fixed "
    "task_specific_params".split()
)


class FamilyError(ValueError):
  """A config or a model that a family cannot express. Names the field."""


class Fields:
  """The fields of one config.json, with the defaults of its family."""

  def __init__(self, values: Mapping[str, Any], name: str):
    self._values = dict(values)
    self._left = set(values) - _NEUTRAL
    self._name = name
    self.require("is_encoder_decoder", False)

  def __getitem__(self, field: str) -> Any:
    self._left.discard(field)
    if field not in self._values:
      raise FamilyError(f"{self._name}: field {field!r} is missing")
    return self._values[field]

  def get(self, field: str, default: Any) -> Any:
    """The field, or `default` where it is missing or null."""
    self._left.discard(field)
    value = self._values.get(field)
    return default if value is None else value

  def require(self, field: str, *allowed: Any) -> None:
    """Refuses any value but these; a missing field is at its default."""
    self._left.discard(field)
    if field in self._values and self._values[field] not in allowed:
      wanted = " or ".join(map(repr, allowed))
      raise FamilyError(
          f"{self._name}: {field}={self._values[field]!r} is not implemented, "
          f"only {wanted}"
      )

  def choose(self, field: str, choices: Mapping[str, str]) -> str:
    """Our word for the field's value."""
    self.require(field, *choices)
    return choices[self[field]]

  def ignore(self, *fields: str) -> None:
    """Fields that a family knows to change nothing."""
    self._left.difference_update(fields)

  def check_nothing_left(self) -> None:
    """Refuses what nobody asked for."""
    left = {name: self._values[name] for name in sorted(self._left)}
    if left:
      raise FamilyError(
          f"{self._name}: not implemented: "
          + ", ".join(f"{name}={value!r}" for name, value in left.items())
      )


def read_fields(folder: epath.Path) -> tuple[str, Fields]:
  """(model_type, fields) of a folder's config.json.

  Raises:
    FamilyError: there is none, or transformers does not know it.
  """
  # Here and not above: the import takes seconds and is seldom needed.
  import transformers  # pylint: disable=g-import-not-at-top

  path = folder / "config.json"
  try:
    given = json.loads(path.read_text())
    model_type = given["model_type"]
    # Its own class knows the defaults, and the older names of fields.
    config_class = transformers.CONFIG_MAPPING[model_type]
  except OSError as error:
    raise FamilyError(f"{path}: {error.strerror or error}") from error
  except (KeyError, TypeError) as error:
    raise FamilyError(
        f"{path}: model_type is missing, or {error} is unknown"
    ) from error
  except (ValueError, RecursionError) as error:
    raise FamilyError(f"{path}: not JSON: {error}") from error
  return model_type, fill_in(given, config_class, str(path))


def fill_in(given: Mapping[str, Any], config_class: type, name: str) -> Fields:
  """The fields with the defaults of transformers' own class for them.

  Raises:
    FamilyError: it refuses them.
  """
  try:
    values = config_class.from_dict(given).to_dict()
  except Exception as error:  # whatever its validation raises
    raise FamilyError(f"{name}: transformers refuses it: {error}") from error
  return Fields(values, name)


# --- both ways ----------------------------------------------------------------


def read_names(hf: Fields, names: Mapping[str, str]) -> dict[str, Any]:
  """TransformerConfig fields of `names`: ours -> theirs, where values agree."""
  return {ours: hf[theirs] for ours, theirs in names.items()}


def write_names(
    cfg: TransformerConfig, names: Mapping[str, str]
) -> dict[str, Any]:
  """The inverse of `read_names`."""
  return {theirs: getattr(cfg, ours) for ours, theirs in names.items()}


def write_choice(
    cfg: TransformerConfig, field: str, choices: Mapping[str, str]
) -> str:
  """Their word for our field's value: the inverse of `Fields.choose`."""
  value = getattr(cfg, field)
  theirs = [x for x, ours in choices.items() if ours == value]
  if not theirs:
    raise FamilyError(
        f"the family cannot express this model: {field}={value!r} is none of "
        f"{', '.join(map(repr, choices.values()))}"
    )
  return theirs[0]


def read_layer_types(hf: Fields) -> dict[str, Any]:
  """sliding_window and full_attention_layers from their `layer_types`."""
  types, window = hf["layer_types"], hf["sliding_window"]
  hf.require("num_hidden_layers", len(types))
  strange = set(types) - {"full_attention", "sliding_attention"}
  if strange:
    raise FamilyError(f"layer_types: {min(strange)!r} is not implemented")
  full = tuple(i for i, kind in enumerate(types) if kind == "full_attention")
  if len(full) == len(types):
    return {}
  if not window:
    raise FamilyError(
        f"layer_types has 'sliding_attention', and sliding_window={window}"
    )
  return {"sliding_window": window, "full_attention_layers": full}


def write_layer_types(cfg: TransformerConfig) -> dict[str, Any]:
  """The inverse of `read_layer_types`."""
  is_full = lambda i: (
      not cfg.sliding_window or i in cfg.full_attention_layers
  )
  return {
      "sliding_window": cfg.sliding_window or cfg.max_length,
      "layer_types": [
          "full_attention" if is_full(i) else "sliding_attention"
          for i in range(cfg.num_layers)
      ],
  }


def read_rope(hf: Fields) -> dict[str, Any]:
  """rope_theta, rotary_fraction and rope_scaling from `rope_parameters`."""
  return read_rope_parameters(hf["rope_parameters"])


def read_rope_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
  """The same from the section itself."""
  rope = Fields(given, "rope_parameters")
  kind = rope.get("rope_type", "default")
  rope.require("type", kind)  # its older name
  ours = {
      "rope_theta": float(rope["rope_theta"]),
      "rotary_fraction": float(rope.get("partial_rotary_factor", 1.0)),
  }
  if kind == "linear":
    ours["rope_scaling"] = RopeScaling(
        kind="linear", factor=float(rope["factor"])
    )
  elif kind == "llama3":
    ours["rope_scaling"] = RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        original_length=rope["original_max_position_embeddings"],
        low_frequency_factor=float(rope["low_freq_factor"]),
        high_frequency_factor=float(rope["high_freq_factor"]),
    )
  elif kind == "yarn":
    rope.require("truncate", True)
    factor = float(rope["factor"])
    ours["rope_scaling"] = RopeScaling(
        kind="yarn",
        factor=factor,
        original_length=rope["original_max_position_embeddings"],
        low_frequency_factor=float(rope.get("beta_slow", 1)),
        high_frequency_factor=float(rope.get("beta_fast", 32)),
        # arXiv 2309.00071, equation 22.
        attention_factor=float(
            rope.get("attention_factor", 0.1 * math.log(factor) + 1)
        ),
    )
  elif kind == "dynamic":
    # What it changes begins where a row of ours ends.
    rope.ignore("original_max_position_embeddings")
    ours["rope_scaling"] = RopeScaling(
        kind="dynamic", factor=float(rope["factor"])
    )
  elif kind != "default":
    raise FamilyError(f"rope_parameters: rope_type={kind!r} is not implemented")
  rope.check_nothing_left()
  return ours


def write_rope(cfg: TransformerConfig) -> dict[str, Any]:
  """The fields `rope_theta` and `rope_scaling`, which all readers know."""
  scaling = cfg.rope_scaling
  if scaling is None:
    return {"rope_theta": cfg.rope_theta}
  theirs = {"rope_type": scaling.kind, "factor": scaling.factor}
  if scaling.kind == "llama3":
    theirs |= {
        "original_max_position_embeddings": scaling.original_length,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
    }
  if scaling.kind == "yarn":
    theirs |= {
        "original_max_position_embeddings": scaling.original_length,
        "beta_slow": scaling.low_frequency_factor,
        "beta_fast": scaling.high_frequency_factor,
        "attention_factor": scaling.attention_factor,
    }
  return {"rope_theta": cfg.rope_theta, "rope_scaling": theirs}
