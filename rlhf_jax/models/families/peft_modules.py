"""What modules and tensors are called in a folder of `peft`, and their shapes.

The names are those of the family's table with what `peft` puts around them:

    base_model.model.<module>.lora_A.weight [rank, in]
    base_model.model.<module>.lora_B.weight [out, rank]
"""

import dataclasses
from typing import Any

import flax.traverse_util

from rlhf_jax.models import lora
from rlhf_jax.models.families import huggingface
from rlhf_jax.models.families.table import Shape, Tensor

# 'layers/attention/query/kernel' -> [L, ...], as tables name it.
Shapes = dict[str, Shape]

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def rows_of(family: str, base: dict[str, Any]) -> list[Tensor]:
  """The projections of the family's table that this model has."""
  table = huggingface.find_family(family, "family").WEIGHTS
  names = lora.projections(base)
  return [
      row
      for row in table
      if row.kind == "matrix" and projection_of(row.paths[0]) in names
  ]


def kernel_shapes(base: dict[str, Any]) -> Shapes:
  """Of params, or of their shapes."""
  flat = flax.traverse_util.flatten_dict(base["trunk"], sep="/")
  return {path: tuple(leaf.shape) for path, leaf in flat.items()}


def projection_of(path: str) -> str:
  """'layers/attention/query/kernel' -> 'attention/query'."""
  return path.removeprefix("layers/").removesuffix("/kernel")


def module_names(row: Tensor, shapes: Shapes) -> list[str]:
  """The row's module in each layer."""
  name = row.name.removesuffix(".weight")
  return [name.format(i) for i in range(shapes[row.paths[0]][0])]


def tensor_names(module: str) -> tuple[str, str]:
  """Of its A and its B."""
  return (
      f"{_PREFIX}{module}.lora_A.weight",
      f"{_PREFIX}{module}.lora_B.weight",
  )


def sizes_of(row: Tensor, shapes: Shapes) -> tuple[int, int]:
  """(in, out) of the row's module."""
  size = row.file_shape(tuple(shapes[path][1:] for path in row.paths))
  return size[::-1] if row.transposed else size


def out_shape(path: str, shapes: Shapes) -> Shape:
  """Of a kernel, without the layers and without what it takes in."""
  # The one kernel that takes heads in: [L, H, K, D].
  return shapes[path][3:] if "attention/out" in path else shapes[path][2:]


def b_row(row: Tensor) -> Tensor:
  """How B is laid out: as the weight's output, always [out, rank]."""
  paths = tuple(f"{path}/{lora.B}" for path in row.paths)
  return dataclasses.replace(row, paths=paths, transposed=True)
