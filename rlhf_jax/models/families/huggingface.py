"""Models in Hugging Face's folders: config.json and *.safetensors, both ways.

    config, params, kind = load_folder("path/to/folder")
    save_folder("path/to/folder", config, params, family="llama")

A family is a module of this package with the name of its model_type:

    ARCHITECTURES  the first parts of its classes' names: ("Llama",)
    PREFIX, HEAD   of the trunk's tensors; the untied output head's name
    WEIGHTS        its table, see `table.py`
    BUFFERS        regexes of tensors that hold no parameters
    to_ours(fields) -> TransformerConfig fields
    to_theirs(config) -> config.json fields

`tensor_map.py` carries the tensors over, one at a time.
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib
import importlib.util
import json
import pkgutil
import re
from types import ModuleType
from typing import Any, Literal

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import families, heads
from rlhf_jax.models.families import hf_config, tensor_files, tensor_map
from rlhf_jax.models.families.hf_config import FamilyError, Fields
from rlhf_jax.models.families.tensor_files import TensorReader
from rlhf_jax.models.transformer import TransformerConfig

Kind = Literal["policy", "reward_model"]

_CLASSES = {
    "policy": ("ForCausalLM", "LMHeadModel"),
    "reward_model": ("ForSequenceClassification",),
}


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model from a folder; params of a LanguageModel or a ScalarModel."""

  config: TransformerConfig
  params: dict[str, Any]
  kind: Kind


def family_names() -> list[str]:
  """model_types that can be read and written."""
  names = [x.name for x in pkgutil.iter_modules(families.__path__)]
  return [name for name in names if hasattr(_import(name), "WEIGHTS")]


def load_folder(
    folder: epath.PathLike,
    *,
    param_dtype: str = "float32",
    sharding: Callable[[str, tuple[int, ...]], Any] | None = None,
    **changes: Any,
) -> Loaded:
  """Reads a folder; nothing is fetched from anywhere.

  Args:
    folder: local, or whatever etils reads.
    param_dtype: of the parameters; converted tensor by tensor.
    sharding: (path, shape) -> where a parameter goes; None is the default
      device.
    changes: TransformerConfig fields that change no result (dtype, remat, ...).

  Raises:
    FamilyError: the config asks for what is not implemented; names the field.
    TensorFileError: a tensor is missing, too many, or of another shape; names
      file and tensor.
  """
  folder = epath.Path(folder)
  model_type, fields = hf_config.read_fields(folder)
  family = find_family(model_type, f"{folder / 'config.json'}")
  config = make_config(family, fields, param_dtype=param_dtype, **changes)
  reader = TensorReader(folder)
  kind = _kind_in(reader)
  shapes = _param_shapes(config, kind)
  params = tensor_map.read_params(
      family,
      reader,
      shapes,
      dtype=param_dtype,
      place=sharding or (lambda path, shape: None),
  )
  return Loaded(config, params, kind)


def family_of(folder: epath.PathLike) -> str:
  """The model_type of a folder."""
  return hf_config.read_fields(epath.Path(folder))[0]


def find_family(model_type: str, named_by: str) -> ModuleType:
  """The family's module.

  Raises:
    FamilyError: there is none of this name.
  """
  if not re.fullmatch(r"[a-z]\w*", str(model_type)) or not hasattr(
      _import(model_type), "WEIGHTS"
  ):
    raise FamilyError(
        f"{named_by}: model_type={model_type!r} is none of "
        f"{', '.join(family_names())}"
    )
  return _import(model_type)


@functools.cache
def _import(name: str) -> ModuleType | None:
  path = f"{families.__name__}.{name}"
  if importlib.util.find_spec(path) is None:
    return None
  return importlib.import_module(path)


def make_config(
    family: ModuleType, fields: Fields, **changes: Any
) -> TransformerConfig:
  """Our config; refuses every field that the family did not ask for."""
  try:
    ours = family.to_ours(fields)
    fields.check_nothing_left()
    return TransformerConfig(**ours | changes)
  except FamilyError:
    raise
  except (ValueError, TypeError) as error:
    raise FamilyError(f"config.json: {error}") from error


# --- what is where ------------------------------------------------------------


def _kind_in(reader: TensorReader) -> Kind:
  named = f"{tensor_map.SCORE}.weight" in reader.names()
  return "reward_model" if named else "policy"


def _param_shapes(
    config: TransformerConfig, kind: Kind
) -> dict[str, tuple[int, ...]]:
  make = heads.LanguageModel if kind == "policy" else heads.ScalarModel
  tree = jax.eval_shape(
      make(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
  )["params"]
  return {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


# --- writing ------------------------------------------------------------------


def save_folder(
    folder: epath.PathLike,
    config: TransformerConfig,
    params: dict[str, Any],
    *,
    family: str,
    kind: Kind = "policy",
    token_ids: dict[str, int | list[int] | None] | None = None,
    max_file_bytes: int = tensor_files.MAX_FILE_BYTES,
) -> None:
  """Writes config.json and *.safetensors, which `transformers` loads.

  Args:
    family: a model_type, see `family_names`.
    kind: what `params` are.
    token_ids: bos, eos (one or several) and pad, for config.json.
    max_file_bytes: a file holds no more, unless one tensor does.

  Raises:
    FamilyError: the family cannot express this model; names the fields.
  """
  folder = epath.Path(folder)
  module = find_family(family, "family")
  theirs = _their_config(module, family, config, kind, token_ids or {})
  flat = {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  if kind == "reward_model" and np.any(flat.pop("head/bias", 0)):
    raise FamilyError(
        "a score has no bias in this layout: head/bias must be 0 or left out"
    )
  shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
  table = tensor_map.rows_for(module, shapes)
  sources = tensor_map.sources(table, flat)
  # Without it a folder is no model: an interruption leaves none, not a mixture.
  (folder / "config.json").unlink(missing_ok=True)
  tensor_files.write_tensors(folder, sources, max_file_bytes)
  (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")


def check_expressible(
    config: TransformerConfig, *, family: str, kind: Kind = "policy"
) -> None:
  """Checks what `save_folder` would, before anything is written.

  Raises:
    FamilyError: the family cannot express this model; names the fields.
  """
  _their_config(find_family(family, "family"), family, config, kind, {})


def _their_config(
    module: ModuleType,
    family: str,
    config: TransformerConfig,
    kind: Kind,
    token_ids: dict[str, int | list[int] | None],
) -> dict[str, Any]:
  import transformers  # pylint: disable=g-import-not-at-top

  theirs = module.to_theirs(config)
  # Read back, it must be the same model: what the family has no field for
  # would be lost otherwise.
  fields = hf_config.fill_in(
      theirs, transformers.CONFIG_MAPPING[family], f"family {family}"
  )
  free = (
      "dtype param_dtype remat scan_unroll head_chunk_size attention_backend"
  ).split()
  again = make_config(
      module,
      fields,
      **{name: getattr(config, name) for name in free},
  )
  lost = [
      f"{field.name}={getattr(config, field.name)!r}"
      for field in dataclasses.fields(config)
      if getattr(config, field.name) != getattr(again, field.name)
  ]
  if lost:
    raise FamilyError(
        f"the family {family} cannot express this model: {', '.join(lost)}"
    )
  names = [
      start + end
      for start in module.ARCHITECTURES
      for end in _CLASSES[kind]
      if hasattr(transformers, start + end)
  ]
  ids = {f"{name}_token_id": value for name, value in token_ids.items()}
  label = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
  return {
      "architectures": names[:1],
      "model_type": family,
      "torch_dtype": config.param_dtype,
      **theirs,
      **ids,
      **(label if kind == "reward_model" else {}),
  }
