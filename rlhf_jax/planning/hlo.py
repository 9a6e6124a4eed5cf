"""Compiled text, as much of it as the planner reads: a module's instructions.

    ENTRY %main (p: f32[8]) -> f32[8] {
      ROOT %all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, ...
    }
"""

from collections.abc import Iterator
import dataclasses
import math
import re

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16,
    "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f8e4m3fn": 8, "f8e5m2": 8,
    "token": 0,
}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# A kernel's metadata may have lines of its own that begin with braces.
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class HloError(ValueError):
  """Text that is not as it is read here."""


@dataclasses.dataclass(frozen=True)
class Instruction:
  """name = shape opcode(operands), attributes."""

  name: str
  shape: str
  opcode: str
  operands: str
  attributes: str
  is_root: bool

  @property
  def operand_names(self) -> list[str]:
    return re.findall(r"%([\w.\-]+)", self.operands)

  def attribute(self, name: str) -> str | None:
    """What `name=` names: a computation or a number."""
    match = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
    return match and match[1]

  def attribute_list(self, name: str) -> list[str]:
    match = re.search(rf"\b{name}={{([^}}]*)}}", self.attributes)
    return re.findall(r"%?([\w.\-]+)", match[1]) if match else []


@dataclasses.dataclass(frozen=True)
class Module:
  """Computations by name, each its instructions in order."""

  computations: dict[str, list[Instruction]]
  entry: str


def parse(text: str) -> Module:
  """Reads `compiled.as_text()`.

  Raises:
    HloError: it has no entry computation.
  """
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if match := _HEADER.match(line):
      current = computations.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif _END.match(line):
      current = None
    elif current is not None and (match := _INSTRUCTION.match(line)):
      current.append(_instruction(match[1], match[2], "ROOT " in line[:12]))
  if entry is None:
    raise HloError("the compiled text has no ENTRY computation")
  return Module(computations, entry)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
  end = _closing(rest, 0) if rest[0] == "(" else rest.index(" ")
  shape, rest = rest[:end], rest[end:].strip()
  opening = rest.index("(")
  end = _closing(rest, opening)
  return Instruction(
      name=name,
      shape=shape,
      opcode=rest[:opening],
      operands=rest[opening + 1 : end - 1],
      attributes=rest[end:],
      is_root=is_root,
  )


def _closing(text: str, opening: int) -> int:
  """One past the parenthesis that closes the one at `opening`."""
  depth = 0
  for i in range(opening, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i + 1
  raise HloError(f"a parenthesis is not closed in {text[:200]!r}")


def num_bytes(shape: str) -> int:
  """Of an array or of all in a tuple, without a layout's padding."""
  return sum(
      math.prod(int(x) for x in dims.split(",") if x) * _BITS[kind] // 8
      for kind, dims in _ARRAY.findall(shape)
      if kind in _BITS
  )


def tuple_items(shape: str) -> list[str]:
  """The shapes in a tuple's; of an array, itself."""
  if not shape.startswith("("):
    return [shape]
  items, depth, start = [], 0, 1
  for i, char in enumerate(shape):
    depth += {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}.get(char, 0)
    if (char == "," and depth == 1) or (depth == 0 and i):
      items.append(shape[start:i].strip())
      start = i + 1
  return items


def callees(instruction: Instruction) -> list[str]:
  """Computations that run once where the instruction does."""
  if instruction.opcode == "call":
    return [instruction.attribute("to_apply")]
  if instruction.opcode in ("fusion", "async-start"):
    return [instruction.attribute("calls")]
  return []


def branches(instruction: Instruction) -> list[str]:
  """Computations of which one runs, of a conditional."""
  names = instruction.attribute_list("branch_computations")
  if names:
    return names
  return [
      instruction.attribute("true_computation"),
      instruction.attribute("false_computation"),
  ]


# ---- Loops -------------------------------------------------------------------


def trip_count(
    module: Module, where: list[Instruction], loop: Instruction
) -> int | None:
  """How often a while loop runs, at most; None where the text does not say.

  Backends that know it write it down. Others leave a condition `i < constant`,
  perhaps with more that may end the loop early, to be read with the constant
  that i starts from and the one that the body adds to it.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
  if known:
    return int(known[1])
  bound = _bound(module, loop.attribute("condition"))
  if bound is None:
    return None
  index, limit = bound
  first = _initial_value(where, loop, index)
  step = _step(module, loop.attribute("body"), index)
  return max(-(-(limit - (first or 0)) // (step or 1)), 0)


def _bound(module: Module, condition: str) -> tuple[int, int] | None:
  """(which item of the carry, the constant that it is below)."""
  instructions = module.computations[condition]
  found = {
      (index, limit)
      for name, value in _values(module, instructions)
      if (index := _carry_index(instructions, name)) is not None
      and (limit := _constant(instructions, value)) is not None
  }
  return found.pop() if len(found) == 1 else None


def _values(
    module: Module, instructions: list[Instruction]
) -> Iterator[tuple[str, str]]:
  """(a, b) of every a < b, in these instructions or in a fusion of them."""
  for x in instructions:
    if x.opcode == "compare" and x.attribute("direction") == "LT":
      yield tuple(x.operand_names)
    elif x.opcode == "fusion":
      inner = module.computations[x.attribute("calls")]
      outer = {
          p.name: x.operand_names[int(p.operands)]
          for p in inner
          if p.opcode == "parameter"
      }
      for a, b in _values(module, inner):
        constant = _constant(inner, b)
        if a in outer and b in outer:
          yield outer[a], outer[b]
        elif a in outer and constant is not None:
          yield outer[a], str(constant)


def _find(instructions: list[Instruction], name: str) -> Instruction | None:
  for x in instructions:
    if x.name == name:
      return x
  return None


def _carry_index(instructions: list[Instruction], name: str) -> int | None:
  x = _source(instructions, name)
  if x is None or x.opcode != "get-tuple-element":
    return None
  return int(x.attribute("index"))


def _constant(instructions: list[Instruction], name: str) -> int | None:
  if name.isdigit():
    return int(name)
  x = _source(instructions, name)
  if x is None or x.opcode != "constant" or not x.operands.isdigit():
    return None
  return int(x.operands)


def _source(instructions: list[Instruction], name: str) -> Instruction | None:
  """Where a value comes from, through copies of it."""
  x = _find(instructions, name)
  while x and x.opcode in ("copy", "copy-done", "copy-start", "bitcast"):
    x = _find(instructions, x.operand_names[0])
  return x


def _initial_value(
    where: list[Instruction], loop: Instruction, index: int
) -> int | None:
  carry = _source(where, loop.operand_names[0])
  if carry is None or carry.opcode != "tuple":
    return None
  return _constant(where, carry.operand_names[index])


def _step(module: Module, body: str, index: int) -> int | None:
  instructions = module.computations[body]
  root = next(x for x in instructions if x.is_root)
  if root.opcode != "tuple":
    return None
  new = _source(instructions, root.operand_names[index])
  if new is None or new.opcode != "add":
    return None
  steps = [_constant(instructions, name) for name in new.operand_names]
  steps = [x for x in steps if x is not None]
  return steps[0] if steps else None
