"""Bytes a chip: what the compiler says of a program, and what else is there."""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
import re
import tempfile
from typing import Any

import jax

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLarge(ValueError):
  """The compiler refused a program that would not fit.

  needed, available: bytes a chip, None where its message does not say.
  """

  def __init__(self, message: str):
    super().__init__(message)
    self.needed, self.available = _numbers_of(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryUse:
  """A program's, while it runs; bytes a chip.

  arguments: what it is given.
  outputs: what it gives back, beside what it writes over its arguments.
  temporaries: what it needs meanwhile.
  code: its instructions, where they are in the same memory.
  """

  arguments: int
  outputs: int
  temporaries: int
  code: int

  @property
  def peak(self) -> int:
    """All at once: what must be free before the program, and its arguments."""
    return self.arguments + self.outputs + self.temporaries + self.code


def compile_program(
    lowered: jax.stages.Lowered,
) -> tuple[jax.stages.Compiled, str]:
  """Compiles: (the program, its text).

  A compiler that is newer than jaxlib may write what jaxlib cannot read back;
  the text is then what the compiler itself has put down.

  Raises:
    TooLarge: the program does not fit into a chip's memory.
  """
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
      program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" in str(error):
        raise TooLarge(str(error)) from error
      raise
    try:
      return program, program.as_text()
    except jax.errors.JaxRuntimeError:
      dumped = [*pathlib.Path(folder).glob("*.after_codegen.txt")]
      if len(dumped) != 1:
        raise
      return program, dumped[0].read_text(encoding="utf-8")


def memory_use(compiled: jax.stages.Compiled) -> MemoryUse:
  """What the compiler laid out, for one device."""
  stats = compiled.memory_analysis()
  return MemoryUse(
      arguments=stats.argument_size_in_bytes,
      outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
      temporaries=stats.temp_size_in_bytes,
      code=stats.generated_code_size_in_bytes,
  )


def tree_bytes(tree: Any) -> int:
  """Of one device's share of arrays, or of shapes with shardings."""
  return sum(leaf_bytes(x) for x in jax.tree.leaves(tree))


def leaf_bytes(x: Any) -> int:
  """Of one device's share; of all of it where nothing says how it is split.

  A coefficient that is a Python number is nothing.
  """
  if isinstance(x, (int, float)):
    return 0
  shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
  return math.prod(shape) * x.dtype.itemsize


def largest(tree: Any, num: int = 5) -> list[tuple[str, int]]:
  """(path, bytes a chip) of the largest arrays."""
  sizes = [
      (jax.tree_util.keystr(path, simple=True, separator="/"), leaf_bytes(x))
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
  ]
  return sorted(sizes, key=lambda x: -x[1])[:num]


def _numbers_of(message: str) -> tuple[float | None, float | None]:
  """Of 'Used 23G of 15.75G hbm' or '(1.0T) exceeds available HBM (15.75G)'."""
  number = r"([\d.]+)([KMGT]?)i?B?"
  for pattern in (
      rf"Used {number} of {number} hbm",
      rf"\({number}\) exceeds available HBM \({number}\)",
  ):
    if match := re.search(pattern, message):
      numbers = match.groups()
      return tuple(
          float(numbers[i]) * _UNITS[numbers[i + 1]] for i in (0, 2)
      )
  return None, None


def resident_bytes(
    named: Mapping[str, Any], arguments: Mapping[str, Any]
) -> int:
  """Of what stays on the chip and is not among a program's arguments."""
  return sum(tree_bytes(x) for k, x in named.items() if k not in arguments)
