"""Writes LoRA adapters as folders that the package `peft` loads.

    save_adapter("path/to/adapter", config, adapter, family="llama", base=...)

Where a family has query, key and value in one fused projection, its adapter has
one A for the three. Three of ours that are equal become one; if they are not,
they are put one below the other and their B onto a block diagonal, of three
times the rank, with alpha so that the scale stays what it is: the same outputs,
in the same format.
"""

from collections.abc import Iterator
import dataclasses
import functools
import json
import math
from typing import Any

from etils import epath
import numpy as np

from rlhf_jax.models import lora
from rlhf_jax.models.families import tensor_files
from rlhf_jax.models.families.hf_config import FamilyError
from rlhf_jax.models.families.peft_modules import (
    CONFIG_FILE,
    TENSOR_FILE,
    Shapes,
    b_row,
    kernel_shapes,
    out_shape,
    projection_of,
    rows_of,
    tensor_names,
)
from rlhf_jax.models.families.table import Tensor
from rlhf_jax.models.families.tensor_files import TensorSource


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
  shapes = kernel_shapes(base)
  parts = {
      name: tuple(np.asarray(x) for x in pair)
      for name, pair in lora.by_projection(adapter).items()
  }
  rows = [
      row
      for row in rows_of(family, base)
      if any(projection_of(path) in parts for path in row.paths)
  ]
  found = {projection_of(path) for row in rows for path in row.paths}
  if set(parts) - found:
    raise FamilyError(
        f"the family {family} has no module for "
        f"{', '.join(sorted(set(parts) - found))}"
    )
  modules = [_to_module(row, parts, shapes) for row in rows]
  theirs = _their_config(config, modules, rows_of(family, base), base_name)
  folder.mkdir(parents=True, exist_ok=True)
  tensor_files.write_file(folder / TENSOR_FILE, list(_sources(modules)))
  (folder / CONFIG_FILE).write_text(json.dumps(theirs, indent=2) + "\n")


def _to_module(
    row: Tensor,
    parts: dict[str, tuple[np.ndarray, np.ndarray]],
    shapes: Shapes,
) -> _Module:
  """One A for all of the row's projections; see the module's docstring."""
  pairs = {path: parts.get(projection_of(path)) for path in row.paths}
  there = [pair for pair in pairs.values() if pair is not None]
  a = there[0][0]
  if len(there) == len(pairs) and all(np.array_equal(a, x) for x, _ in there):
    b = [pair[1] for pair in there]
  else:
    num, (num_layers, _, rank) = len(there), a.shape
    a = np.concatenate([x for x, _ in there], axis=-1)
    b, block = [], 0
    for path, pair in pairs.items():
      size_out = math.prod(out_shape(path, shapes))
      wide = np.zeros((num_layers, num * rank, size_out), np.float32)
      if pair is not None:
        wide[:, block * rank : (block + 1) * rank] = pair[1]
        block += 1
      b.append(wide)
  b = [
      x.reshape(*x.shape[:2], *out_shape(path, shapes))
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
          b_row(module.row).to_theirs(tuple(x[layer] for x in module.b)),
      )
      for tensor_name, array in zip(tensor_names(name), arrays, strict=True):
        yield TensorSource(
            tensor_name,
            array.shape,
            np.dtype(array.dtype),
            functools.partial(np.asarray, array),
        )
