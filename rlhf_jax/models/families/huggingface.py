"""Models in Hugging Face's folders: config.json and *.safetensors, both ways.

    config, params, kind = load_folder("path/to/folder")
    save_folder("path/to/folder", config, params, family="llama")

A family is a module of this package with the name of its model_type:

    ARCHITECTURE   the first part of its classes' names: "Llama"
    PREFIX, HEAD   of the trunk's tensors; the untied output head's name
    WEIGHTS        its table, see `table.py`
    BUFFERS        regexes of tensors that hold no parameters
    to_ours(fields) -> TransformerConfig fields
    to_theirs(config) -> config.json fields

Tensors stream one at a time from the file to their place on the devices, so
that the host never holds more than one or two of them beside the result.
"""

from collections.abc import Callable, Iterator
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
from rlhf_jax.models.families import hf_config, tensor_files
from rlhf_jax.models.families.hf_config import FamilyError, Fields
from rlhf_jax.models.families.table import Tensor, linear
from rlhf_jax.models.families.tensor_files import (
    TensorFileError,
    TensorReader,
    TensorSource,
)
from rlhf_jax.models.transformer import TransformerConfig

Kind = Literal["policy", "reward_model"]

_CLASSES = {
    "policy": ("ForCausalLM", "LMHeadModel"),
    "reward_model": ("ForSequenceClassification",),
}
_SCORE = "score"
_BYTES_CHECKED = 2**31


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
  place = sharding or (lambda path, shape: None)
  names = _file_names(family, reader)
  leaves = {}
  for tensor in _table(family, config, kind, shapes):
    leaves |= _read_tensor(tensor, reader, names, shapes, param_dtype, place)
  _check_tied_head(family, config, reader, names)
  _refuse_extra(family, reader, names, folder)
  if kind == "reward_model":
    # Their score has no bias.
    leaves["head/bias"] = jnp.zeros(shapes["head/bias"], param_dtype)
  return Loaded(config, _unflatten(leaves), kind)


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
  named = f"{_SCORE}.weight" in reader.names()
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


def _table(
    family: ModuleType,
    config: TransformerConfig,
    kind: Kind,
    shapes: dict[str, tuple[int, ...]],
) -> tuple[Tensor, ...]:
  """The family's rows for the parameters that there are, head included."""
  rows = [
      dataclasses.replace(row, paths=tuple(f"trunk/{x}" for x in row.paths))
      for row in family.WEIGHTS
  ]
  head = _SCORE if kind == "reward_model" else family.HEAD
  rows.append(linear(head, "head")[0])
  rows = [row for row in rows if row.paths[0] in shapes]
  found = [path for row in rows for path in row.paths]
  no_file = {"head/bias"}  # our reward model's own
  missing = set(shapes) - set(found) - no_file
  if missing or len(found) != len(set(found)):
    raise FamilyError(
        f"{family.__name__}: this model has parameters that the family has no "
        f"tensor for: {', '.join(sorted(missing)) or 'some twice'}"
    )
  del config
  return tuple(rows)


def _file_names(family: ModuleType, reader: TensorReader) -> dict[str, str]:
  """Our name of a tensor -> the file's; old ones leave out the prefix."""
  names = {}
  for name in reader.names():
    top = name.startswith((family.PREFIX, f"{family.HEAD}.", f"{_SCORE}."))
    whole = name if top else family.PREFIX + name
    if whole in names:
      raise TensorFileError(
          f"{reader.file(name)}: tensor {name} is also there as {names[whole]}"
      )
    names[whole] = name
  return names


def _check_tied_head(
    family: ModuleType,
    config: TransformerConfig,
    reader: TensorReader,
    names: dict[str, str],
) -> None:
  """A head that is said to be the embedding and is in the file must be it."""
  name = f"{family.HEAD}.weight"
  if not config.tie_head or name not in names:
    return
  embedding = names[family.WEIGHTS[0].name]
  if not np.array_equal(reader.read(names[name]), reader.read(embedding)):
    raise TensorFileError(
        f"{reader.file(names[name])}: tensor {name} is another than {embedding}"
        ", and the config says that they are tied"
    )


def _refuse_extra(
    family: ModuleType,
    reader: TensorReader,
    names: dict[str, str],
    folder: epath.Path,
) -> None:
  layers = [
      re.escape(row.name).replace(r"\{\}", r"\d+") for row in family.WEIGHTS
  ]
  known = [*layers, *family.BUFFERS, rf"({family.HEAD}|{_SCORE})\.weight"]
  extra = [n for n in names if not any(re.fullmatch(x, n) for x in known)]
  if extra:
    raise TensorFileError(
        f"{reader.file(names[extra[0]])}: tensor {names[extra[0]]} is none of "
        f"the model's in {folder}"
        + (f", nor are {len(extra) - 1} more" if len(extra) > 1 else "")
    )


# --- reading ------------------------------------------------------------------


def _read_tensor(
    row: Tensor,
    reader: TensorReader,
    names: dict[str, str],
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    place: Callable[[str, tuple[int, ...]], Any],
) -> dict[str, jax.Array]:
  """The parameters of one row of the table, all layers of it."""
  whole = {path: shapes[path] for path in row.paths}
  if not row.is_layered:
    parts = _read_one(
        row, row.name, reader, names, tuple(whole.values()), dtype
    )
    return {
        path: jax.device_put(part, place(path, part.shape))
        for path, part in zip(row.paths, parts, strict=True)
    }
  each = tuple(shape[1:] for shape in whole.values())
  stacked = {
      path: jnp.zeros(shape, dtype, device=place(path, shape))
      for path, shape in whole.items()
  }
  for layer in range(next(iter(whole.values()))[0]):
    parts = _read_one(row, row.name.format(layer), reader, names, each, dtype)
    for path, part in zip(row.paths, parts, strict=True):
      stacked[path] = _set_layer(stacked[path], part, layer)
  return stacked


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: jax.Array, part: jax.Array, layer) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stacked, part, layer, 0)


def _read_one(
    row: Tensor,
    name: str,
    reader: TensorReader,
    names: dict[str, str],
    shapes: tuple[tuple[int, ...], ...],
    dtype: str,
) -> tuple[np.ndarray, ...]:
  if name not in names:
    raise TensorFileError(f"{reader.folder}: tensor {name} is missing")
  in_file, wanted = names[name], row.file_shape(shapes)
  if reader.shape(in_file) != wanted:
    raise TensorFileError(
        f"{reader.file(in_file)}: tensor {in_file} has shape "
        f"{list(reader.shape(in_file))}, and by config.json it is "
        f"{list(wanted)}"
    )
  array = reader.read(in_file)
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise TensorFileError(
        f"{reader.file(in_file)}: tensor {in_file} holds {array.dtype}, and "
        "quantized weights are not implemented"
    )
  if not _is_finite(array):
    raise TensorFileError(
        f"{reader.file(in_file)}: tensor {in_file} holds NaN or Inf"
    )
  # Before it is turned round: the file's bytes are then no longer needed.
  array = array.astype(dtype, copy=False)
  return row.to_ours(array, shapes)


def _is_finite(array: np.ndarray) -> bool:
  flat = array.reshape(-1)
  step = _BYTES_CHECKED // 1024  # a piece at a time: no copy of the tensor
  return all(
      np.isfinite(flat[i : i + step]).all() for i in range(0, flat.size, step)
  )


def _unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


# --- writing ------------------------------------------------------------------


def save_folder(
    folder: epath.PathLike,
    config: TransformerConfig,
    params: dict[str, Any],
    *,
    family: str,
    kind: Kind = "policy",
    token_ids: dict[str, int | None] | None = None,
    max_file_bytes: int = tensor_files.MAX_FILE_BYTES,
) -> None:
  """Writes config.json and *.safetensors, which `transformers` loads.

  Args:
    family: a model_type, see `family_names`.
    kind: what `params` are.
    token_ids: bos, eos and pad, for config.json.
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
  table = _table(module, config, kind, shapes)
  tensor_files.write_tensors(folder, _sources(table, flat), max_file_bytes)
  (folder / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")


def _their_config(
    module: ModuleType,
    family: str,
    config: TransformerConfig,
    kind: Kind,
    token_ids: dict[str, int | None],
) -> dict[str, Any]:
  import transformers  # pylint: disable=g-import-not-at-top

  theirs = module.to_theirs(config)
  # Read back, it must be the same model: what the family has no field for
  # would be lost otherwise.
  values = transformers.CONFIG_MAPPING[family].from_dict(theirs).to_dict()
  free = (
      "dtype param_dtype remat scan_unroll head_chunk_size attention_backend"
  ).split()
  again = make_config(
      module,
      Fields(values, f"family {family}"),
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
      module.ARCHITECTURE + end
      for end in _CLASSES[kind]
      if hasattr(transformers, module.ARCHITECTURE + end)
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


def _sources(
    table: tuple[Tensor, ...], flat: dict[str, Any]
) -> Iterator[TensorSource]:
  for row in table:
    leaves = [flat[path] for path in row.paths]
    dtype = np.dtype(leaves[0].dtype)
    if not row.is_layered:
      shape = row.file_shape(tuple(tuple(x.shape) for x in leaves))
      yield TensorSource(
          row.name, shape, dtype, functools.partial(_to_theirs, row, leaves)
      )
      continue
    shape = row.file_shape(tuple(tuple(x.shape[1:]) for x in leaves))
    for i in range(leaves[0].shape[0]):
      yield TensorSource(
          row.name.format(i),
          shape,
          dtype,
          functools.partial(_to_theirs, row, leaves, i),
      )


def _to_theirs(
    row: Tensor, leaves: list[Any], layer: int | None = None
) -> np.ndarray:
  parts = leaves if layer is None else [leaf[layer] for leaf in leaves]
  return row.to_theirs(tuple(np.asarray(part) for part in parts))
