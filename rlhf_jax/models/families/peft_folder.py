"""Reads LoRA adapters from folders of the package `peft`.

    config, adapter = load_adapter("path/to/adapter", "llama", base_params)

A folder holds adapter_config.json and adapter_model.safetensors. Where a family
has query, key and value in one fused projection, its adapter has one A for the
three: each of ours gets a copy of A and its part of B. `peft_export.py` writes
such folders.
"""

import dataclasses
import json
import re
from typing import Any

from etils import epath
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import lora
from rlhf_jax.models.families.hf_config import FamilyError, Fields
from rlhf_jax.models.families.peft_modules import (
    CONFIG_FILE,
    TENSOR_FILE,
    Shapes,
    b_row,
    kernel_shapes,
    module_names,
    out_shape,
    projection_of,
    rows_of,
    sizes_of,
    tensor_names,
)
from rlhf_jax.models.families.table import Tensor
from rlhf_jax.models.families.tensor_files import TensorFileError, TensorReader

# What says nothing about the outputs of a trained adapter. fan_in_fan_out is
# set by `peft` itself, by the kind of the module.
_NEUTRAL = (
    "auto_mapping base_model_name_or_path ensure_weight_tying fan_in_fan_out "
    "inference_mode megatron_core peft_version qalora_group_size revision "
    "runtime_config"
).split()


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
  shapes = kernel_shapes(base)
  rows = [row for row in rows_of(family, base) if modules.has(row, shapes)]
  if not rows:
    raise FamilyError(
        f"{folder / CONFIG_FILE}: target_modules={modules.targets!r} matches "
        f"no projection of the family {family}"
    )
  names = [x for row in rows for x in module_names(row, shapes)]
  used = {tensor for name in names for tensor in tensor_names(name)}
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
      targets=tuple(projection_of(path) for path in paths),
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

  def has(self, row: Tensor, shapes: Shapes) -> bool:
    found = {self._matches(x) for x in module_names(row, shapes)}
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
    shapes: Shapes,
) -> dict[str, np.ndarray]:
  """'attention/query/lora_a' and so on: all layers of a module."""
  layers, (size_in, size_out) = [], sizes_of(row, shapes)
  b_shapes = tuple(
      (config.rank, *out_shape(path, shapes)) for path in row.paths
  )
  for module in module_names(row, shapes):
    names = tensor_names(module)
    rank = modules.rank(module)
    a = _read(reader, names[0], (rank, size_in))
    b = _read(reader, names[1], (size_out, rank))
    b = b * np.float32(modules.scale(module) / config.scale)
    missing = config.rank - rank
    a, b = np.pad(a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing)))
    layers.append((a.T, b_row(row).to_ours(b, b_shapes)))
  leaves = {}
  for i, path in enumerate(row.paths):
    name = projection_of(path)
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
