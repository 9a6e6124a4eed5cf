"""LoRA adapters in the folders of the package `peft`, both ways.

    config, adapter = load_adapter("path/to/adapter", "llama", base_params)
    save_adapter("path/to/adapter", config, adapter, family="llama", base=...)

A folder holds adapter_config.json and adapter_model.safetensors. The tensors'
names are those of the family's table with what `peft` puts around them:

    base_model.model.<module>.lora_A.weight [rank, in]
    base_model.model.<module>.lora_B.weight [out, rank]

Where a family has query, key and value in one fused projection, its adapter has
one A for the three. Read, each of ours gets a copy of A and its part of B.
Written, three A that are equal become one again; if they are not, A are put one
below the other and B onto a block diagonal, of three times the rank, with alpha
so that the scale stays what it is: the same outputs, in the same format.
"""

from collections.abc import Iterator
import dataclasses
import functools
import json
import math
import re
from typing import Any

from etils import epath
import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import lora
from rlhf_jax.models.families import huggingface, tensor_files
from rlhf_jax.models.families.hf_config import FamilyError, Fields
from rlhf_jax.models.families.table import Tensor
from rlhf_jax.models.families.tensor_files import (
    TensorFileError,
    TensorReader,
    TensorSource,
)

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What says nothing about the outputs of a trained adapter. fan_in_fan_out is
# set by `peft` itself, by the kind of the module.
_NEUTRAL = (
    "auto_mapping base_model_name_or_path ensure_weight_tying fan_in_fan_out "
    "inference_mode megatron_core peft_version qalora_group_size revision "
    "runtime_config"
).split()


# --- reading ------------------------------------------------------------------


def load_adapter(
    folder: epath.PathLike, family: str, base: dict[str, Any]
) -> tuple[lora.LoraConfig, dict[str, Any]]:
  """Reads an adapter of `base`.

  Args:
    family: the base's model_type.
    base: language-model params, or their shapes.

  Returns:
    What was adapted and the adapter, float32. Of several ranks the config has
    the largest, the others are filled up with zeros.

  Raises:
    FamilyError: adapter_config.json asks for what is not implemented.
    TensorFileError: a tensor is missing, too many, or of another shape.
  """
  folder = epath.Path(folder)
  modules = _read_config(folder / CONFIG_FILE)
  reader = TensorReader(folder, TENSOR_FILE)
  shapes = _kernel_shapes(base)
  rows = [row for row in _rows(family, base) if modules.has(row, shapes)]
  if not rows:
    raise FamilyError(
        f"{folder / CONFIG_FILE}: target_modules={modules.targets!r} matches "
        f"no projection of the family {family}"
    )
  names = [x for row in rows for x in _module_names(row, shapes)]
  used = {tensor for name in names for tensor in _tensor_names(name)}
  extra = sorted(set(reader.names()) - used)
  if extra:
    raise TensorFileError(
        f"{folder / TENSOR_FILE}: tensor {extra[0]} belongs to no projection "
        f"that target_modules={modules.targets!r} names in the family {family}"
    )
  paths = [path for row in rows for path in row.paths]
  config = dataclasses.replace(
      modules.config,
      rank=max(modules.rank(name) for name in names),
      targets=tuple(_projection(path) for path in paths),
  )
  leaves: dict[str, Any] = {}
  for row in rows:
    leaves |= _read_row(row, reader, modules, config, shapes)
  return config, lora.from_layers(
      {name: jnp.asarray(x) for name, x in leaves.items()}
  )


def _read_config(path: epath.Path) -> "_Modules":
  try:
    values = json.loads(path.read_text())
  except OSError as error:
    raise FamilyError(f"{path}: {error.strerror or error}") from error
  except (ValueError, RecursionError) as error:
    raise FamilyError(f"{path}: not JSON: {error}") from error
  if not isinstance(values, dict):
    raise FamilyError(f"{path}: is no object of fields")
  # A feature that is off is as good as one that is not there.
  on = {name: x for name, x in values.items() if not _is_off(x)}
  try:
    return _Modules(Fields(on, str(path)))
  except FamilyError:
    raise
  except (TypeError, ValueError, AttributeError, re.error) as error:
    raise FamilyError(f"{path}: {error}") from error


def _is_off(value: Any) -> bool:
  # 0 is a number, not a feature that is off.
  return value is False or value in (None, [], {}, "")


class _Modules:
  """What adapter_config.json says of each module, by `peft`'s own rules."""

  def __init__(self, fields: Fields):
    fields.require("peft_type", "LORA")
    fields.require("task_type", "CAUSAL_LM")
    fields.require("bias", "none")
    # Others start from a changed base, which this folder would not tell.
    fields.require("init_lora_weights", True, "gaussian")
    fields.ignore(*_NEUTRAL)
    self.targets = fields["target_modules"]
    self.config = lora.LoraConfig(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        targets=(lora.ALL_LINEAR,),
        dropout=float(fields.get("lora_dropout", 0.0)),
        rank_stabilized=bool(fields.get("use_rslora", False)),
    )
    self._ranks = dict(fields.get("rank_pattern", {}))
    self._alphas = dict(fields.get("alpha_pattern", {}))
    fields.check_nothing_left()
    for rank in (self.config.rank, *self._ranks.values()):
      if type(rank) is not int or rank < 1:
        raise ValueError(f"{rank!r} is no rank")
    whole = [self.targets] if isinstance(self.targets, str) else []
    for pattern in (*whole, *self._ranks, *self._alphas):
      re.compile(pattern)

  def has(self, row: Tensor, shapes: dict[str, tuple[int, ...]]) -> bool:
    found = {self._matches(x) for x in _module_names(row, shapes)}
    if len(found) > 1:
      raise FamilyError(
          f"{CONFIG_FILE}: target_modules={self.targets!r} names "
          f"{row.name.removesuffix('.weight')} in some layers only, and here "
          "an adapter is in all of them"
      )
    return found.pop()

  def _matches(self, module: str) -> bool:
    if self.targets == lora.ALL_LINEAR:
      return True
    if isinstance(self.targets, str):
      return re.fullmatch(self.targets, module) is not None
    return any(f".{module}".endswith(f".{x}") for x in self.targets)

  def rank(self, module: str) -> int:
    return _by_pattern(self._ranks, module, self.config.rank)

  def scale(self, module: str) -> float:
    rank = self.rank(module)
    alpha = float(_by_pattern(self._alphas, module, self.config.alpha))
    return dataclasses.replace(self.config, rank=rank, alpha=alpha).scale


def _by_pattern(patterns: dict[str, Any], module: str, otherwise):
  for pattern, value in patterns.items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      return value
  return otherwise


def _read_row(
    row: Tensor,
    reader: TensorReader,
    modules: _Modules,
    config: lora.LoraConfig,
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
  """'attention/query/lora_a' and so on: all layers of a module."""
  layers = []
  for module in _module_names(row, shapes):
    names = _tensor_names(module)
    rank = modules.rank(module)
    size_in, size_out = _sizes(row, shapes)
    a = _read(reader, names[0], (rank, size_in))
    b = _read(reader, names[1], (size_out, rank))
    b = b * np.float32(modules.scale(module) / config.scale)
    missing = config.rank - rank
    a, b = np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
    layers.append((a.T, _b_row(row).to_ours(b, _b_shapes(row, shapes, config))))
  leaves = {}
  for i, path in enumerate(row.paths):
    name = _projection(path)
    leaves[f"{name}/{lora.A}"] = np.stack([a for a, _ in layers])
    leaves[f"{name}/{lora.B}"] = np.stack(
        [parts[i].reshape(config.rank, -1) for _, parts in layers]
    )
  return leaves


def _read(
    reader: TensorReader, name: str, shape: tuple[int, ...]
) -> np.ndarray:
  if name not in reader.names():
    raise TensorFileError(
        f"{reader.folder / TENSOR_FILE}: tensor {name} is missing"
    )
  if reader.shape(name) != shape:
    raise TensorFileError(
        f"{reader.file(name)}: tensor {name} has shape "
        f"{list(reader.shape(name))}, and by {CONFIG_FILE} and the model it is "
        f"{list(shape)}"
    )
  array = reader.read(name)
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise TensorFileError(
        f"{reader.file(name)}: tensor {name} holds {array.dtype}"
    )
  array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise TensorFileError(
        f"{reader.file(name)}: tensor {name} holds NaN or Inf"
    )
  return array


# --- writing ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Module:
  """One row of the table as `peft` has it: A [L, in, rank], B [L, rank, ...].

  b: of each of the row's paths, with the heads of its kernel.
  """

  row: Tensor
  a: np.ndarray
  b: tuple[np.ndarray, ...]

  @property
  def rank(self) -> int:
    return self.a.shape[-1]


def save_adapter(
    folder: epath.PathLike,
    config: lora.LoraConfig,
    adapter: dict[str, Any],
    *,
    family: str,
    base: dict[str, Any],
    base_name: str | None = None,
) -> None:
  """Writes a folder that `peft` loads onto the base.

  Args:
    family: the base's model_type.
    base: language-model params, or their shapes.
    base_name: where the base is, for whoever reads the folder.

  Raises:
    FamilyError: the family has no module for a projection of the adapter.
    lora.LoraError: the adapter is none of this base.
  """
  folder = epath.Path(folder)
  lora.check_fits(adapter, base)
  shapes = _kernel_shapes(base)
  parts = {
      name: tuple(np.asarray(x) for x in pair)
      for name, pair in lora.by_projection(adapter).items()
  }
  rows = [
      row
      for row in _rows(family, base)
      if any(_projection(path) in parts for path in row.paths)
  ]
  found = {_projection(path) for row in rows for path in row.paths}
  if set(parts) - found:
    raise FamilyError(
        f"the family {family} has no module for "
        f"{', '.join(sorted(set(parts) - found))}"
    )
  modules = [_to_module(row, parts, shapes) for row in rows]
  theirs = _their_config(config, modules, _rows(family, base), base_name)
  folder.mkdir(parents=True, exist_ok=True)
  tensor_files.write_file(folder / TENSOR_FILE, list(_sources(modules)))
  (folder / CONFIG_FILE).write_text(json.dumps(theirs, indent=2) + "\n")


def _to_module(
    row: Tensor,
    parts: dict[str, tuple[np.ndarray, np.ndarray]],
    shapes: dict[str, tuple[int, ...]],
) -> _Module:
  """One A for all of the row's projections; see the module's docstring."""
  pairs = {path: parts.get(_projection(path)) for path in row.paths}
  there = [pair for pair in pairs.values() if pair is not None]
  a = there[0][0]
  if len(there) == len(pairs) and all(np.array_equal(a, x) for x, _ in there):
    b = [pair[1] for pair in there]
  else:
    num, (num_layers, _, rank) = len(there), a.shape
    a = np.concatenate([x for x, _ in there], axis=-1)
    b, block = [], 0
    for path, pair in pairs.items():
      size_out = math.prod(_out_shape(path, shapes))
      wide = np.zeros((num_layers, num * rank, size_out), np.float32)
      if pair is not None:
        wide[:, block * rank : (block + 1) * rank] = pair[1]
        block += 1
      b.append(wide)
  b = [
      x.reshape(*x.shape[:2], *_out_shape(path, shapes))
      for path, x in zip(row.paths, b, strict=True)
  ]
  return _Module(row, a, tuple(b))


def _their_config(
    config: lora.LoraConfig,
    modules: list[_Module],
    rows: list[Tensor],
    base_name: str | None,
) -> dict[str, Any]:
  names = _short_names([x.row for x in modules], rows)
  rank, alpha, stabilized = config.rank, config.alpha, config.rank_stabilized
  wider = {
      name: module.rank
      for name, module in zip(names, modules, strict=True)
      if module.rank != rank
  }
  if wider:  # scale = alpha / rank, of each module's own
    alpha, stabilized = config.scale * rank, False
  return {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base_name,
      "r": rank,
      "lora_alpha": _plain(alpha),
      "target_modules": names,
      "lora_dropout": config.dropout,
      "use_rslora": stabilized,
      "rank_pattern": wider,
      "alpha_pattern": {
          name: _plain(config.scale * wide) for name, wide in wider.items()
      },
      "bias": "none",
      "fan_in_fan_out": not modules[0].row.transposed,
      "modules_to_save": None,
      "init_lora_weights": True,
      "inference_mode": True,
      "use_dora": False,
  }


def _plain(number: float) -> int | float:
  return int(number) if float(number).is_integer() else number


def _short_names(adapted: list[Tensor], rows: list[Tensor]) -> list[str]:
  """A module's last name, or what stands after the layer if others share it."""
  inner = lambda row: row.name.removesuffix(".weight").partition("{}.")[2]
  last = lambda row: inner(row).rpartition(".")[2]
  shared = [last(row) for row in rows]
  return [
      last(row) if shared.count(last(row)) == 1 else inner(row)
      for row in adapted
  ]


def _sources(modules: list[_Module]) -> Iterator[TensorSource]:
  for module in modules:
    for layer in range(module.a.shape[0]):
      name = module.row.name.removesuffix(".weight").format(layer)
      arrays = (
          module.a[layer].T,
          _b_row(module.row).to_theirs(tuple(x[layer] for x in module.b)),
      )
      for tensor_name, array in zip(_tensor_names(name), arrays, strict=True):
        yield TensorSource(
            tensor_name,
            array.shape,
            np.dtype(array.dtype),
            functools.partial(np.asarray, array),
        )


# --- names and shapes ---------------------------------------------------------


def _rows(family: str, base: dict[str, Any]) -> list[Tensor]:
  """The projections of the family's table that this model has."""
  table = huggingface.find_family(family, "family").WEIGHTS
  names = lora.projections(base)
  return [
      row
      for row in table
      if row.kind == "matrix" and _projection(row.paths[0]) in names
  ]


def _kernel_shapes(base: dict[str, Any]) -> dict[str, tuple[int, ...]]:
  """'layers/attention/query/kernel' -> [L, ...], as tables name it."""
  flat = flax.traverse_util.flatten_dict(base["trunk"], sep="/")
  return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def _projection(path: str) -> str:
  return path.removeprefix("layers/").removesuffix("/kernel")


def _module_names(row: Tensor, shapes) -> list[str]:
  name = row.name.removesuffix(".weight")
  return [name.format(i) for i in range(shapes[row.paths[0]][0])]


def _tensor_names(module: str) -> tuple[str, str]:
  return (
      f"{_PREFIX}{module}.lora_A.weight",
      f"{_PREFIX}{module}.lora_B.weight",
  )


def _sizes(row: Tensor, shapes) -> tuple[int, int]:
  size = row.file_shape(tuple(shapes[path][1:] for path in row.paths))
  return size[::-1] if row.transposed else size


def _out_shape(path: str, shapes) -> tuple[int, ...]:
  """Of a kernel, without the layers and without what it takes in."""
  # The one kernel that takes heads in: [L, H, K, D].
  return shapes[path][3:] if "attention/out" in path else shapes[path][2:]


def _b_row(row: Tensor) -> Tensor:
  """How B is laid out: as the weight's output, always [out, rank]."""
  paths = tuple(f"{path}/{lora.B}" for path in row.paths)
  return dataclasses.replace(row, paths=paths, transposed=True)


def _b_shapes(row: Tensor, shapes, config: lora.LoraConfig):
  return tuple(
      (config.rank, *_out_shape(path, shapes)) for path in row.paths
  )
