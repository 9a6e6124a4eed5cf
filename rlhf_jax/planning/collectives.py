"""What chips send one another, read from a compiled program.

Bytes are those that each chip sends while the program runs once: a loop's as
often as it runs, of a conditional's branches those of the one that sends most.
Of n chips that share a result of R bytes, each sends

    all-gather         R (n - 1) / n        R what all of them have together
    reduce-scatter     R (n - 1)            R what each keeps
    all-reduce         2 R (n - 1) / n
    all-to-all         R (n - 1) / n
    collective-permute R                    n is 1 where nothing moves

which is what a ring sends, the least that there is.

Axes are those of the mesh along which the chips of a group differ: of a mesh of
4 x 2, replica_groups={{0,2,4,6},{1,3,5,7}} is the first axis.
"""

from collections.abc import Mapping
import dataclasses
import logging
import math
import re

import numpy as np

from rlhf_jax.planning import hlo
from rlhf_jax.planning.hlo import HloError, Instruction, Module

_log = logging.getLogger(__name__)

_KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
    "collective-permute", "collective-broadcast", "ragged-all-to-all",
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """What one axis (or several at once) carries by operations of one kind.

  axes: names of the mesh's axes, in its order.
  num_bytes: that a chip sends, over all runs of the operations.
  count: how many run.
  """

  axes: tuple[str, ...]
  kind: str
  num_bytes: float
  count: float


def collectives(
    text: str, mesh_shape: Mapping[str, int], *, unknown_trip_count: int = 1
) -> list[Collective]:
  """All of a program's, those that send most first.

  Args:
    text: `compiled.as_text()`.
    mesh_shape: axis name -> size, in the mesh's order.
    unknown_trip_count: of loops whose text does not bound them.

  Raises:
    HloError: replica groups of a form that is not known here.
  """
  module = hlo.parse(text)
  reader = _Reader(module, dict(mesh_shape), unknown_trip_count)
  totals: dict[tuple, list[float]] = {}
  for collective, times in reader.sent(module.entry).values():
    total = totals.setdefault((collective.axes, collective.kind), [0.0, 0.0])
    total[0] += collective.num_bytes * times
    total[1] += times
  found = [Collective(*key, *total) for key, total in totals.items() if key[0]]
  return sorted(found, key=lambda x: -x.num_bytes)


def bytes_by_axes(found: list[Collective]) -> dict[tuple[str, ...], float]:
  """Summed over kinds."""
  totals: dict[tuple[str, ...], float] = {}
  for x in found:
    totals[x.axes] = totals.get(x.axes, 0.0) + x.num_bytes
  return totals


class _Reader:
  """Walks computations from the entry."""

  def __init__(
      self, module: Module, mesh_shape: dict[str, int], unknown_trip_count: int
  ):
    self._module = module
    self._mesh_shape = mesh_shape
    self._unknown_trip_count = unknown_trip_count
    self._known: dict[str, dict] = {}

  def sent(self, name: str) -> dict[str, tuple[Collective, float]]:
    """Of a computation: key -> (an operation, how often it runs).

    A compiler may spread one operation over several fusions, also into loops
    that run meanwhile. All of its parts have its channel, which is the key, and
    it runs as often as the part that runs least.
    """
    if name not in self._known:
      found = {}
      for x in self._module.computations[name]:
        _merge(found, self._of_instruction(name, x))
      self._known[name] = found
    return self._known[name]

  def _of_instruction(self, where: str, x: Instruction) -> dict:
    kind = x.opcode.removesuffix("-start")
    if kind in _KINDS:
      channel = x.attribute("channel_id")
      key = f"channel {channel}" if channel else f"{where}/{x.name}"
      return {key: (self._collective(kind, x), 1)}
    if x.opcode == "while":
      times = hlo.trip_count(
          self._module, self._module.computations[where], x
      )
      body = self.sent(x.attribute("body"))
      if times is None:
        times = self._unknown_trip_count
        if body and times == 1:
          _log.warning(
              "%s: nothing bounds this loop: what it sends is counted once, "
              "and may be sent more often",
              x.name,
          )
      return {
          key: (collective, times * inner)
          for key, (collective, inner) in body.items()
      }
    if x.opcode == "conditional":
      return max(map(self.sent, hlo.branches(x)), key=_num_bytes)
    found = {}
    for name in hlo.callees(x):
      _merge(found, self.sent(name))
    return found

  def _collective(self, kind: str, x: Instruction) -> Collective:
    result = _result_bytes(x)
    pairs = re.search(r"source_target_pairs=(\{\{.*?\}\})", x.attributes)
    if pairs:
      groups = _explicit(pairs[1])
      groups = groups[groups[:, 0] != groups[:, 1]]
    else:
      groups = _groups(x.attributes, math.prod(self._mesh_shape.values()))
    n = groups.shape[1] if groups.size else 1
    share = {
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": n - 1,
        "collective-permute": 1 if n > 1 else 0,
        "collective-broadcast": 1 if n > 1 else 0,
    }.get(kind, (n - 1) / n)
    axes = self._axes(groups) if n > 1 else ()
    return Collective(axes, kind, result * share, 1)

  def _axes(self, groups: np.ndarray) -> tuple[str, ...]:
    sizes = tuple(self._mesh_shape.values())
    places = np.stack(np.unravel_index(groups, sizes), axis=-1)
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(np.array(list(self._mesh_shape))[differ].tolist())


def _merge(found: dict, more: dict) -> None:
  for key, value in more.items():
    if key not in found or value[1] < found[key][1]:
      found[key] = value


def _num_bytes(sent: dict[str, tuple[Collective, float]]) -> float:
  return sum(x.num_bytes * times for x, times in sent.values())


def _result_bytes(x: Instruction) -> int:
  """Of what an operation gives; the start of one may hold its operands too."""
  items = hlo.tuple_items(x.shape)
  if x.opcode in ("all-gather-start", "collective-permute-start"):
    return hlo.num_bytes(items[1])
  return hlo.num_bytes(x.shape)


# ---- Replica groups ----------------------------------------------------------

_IOTA = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _groups(attributes: str, num_devices: int) -> np.ndarray:
  """[groups, n] of places in the mesh."""
  match = re.search(r"replica_groups=(.*)", attributes)
  if match is None or match[1].startswith("{}"):
    return np.arange(num_devices)[None]
  text = match[1]
  if text.startswith("{{"):
    return _explicit(text[: text.index("}}") + 2])
  if text.startswith("mesh["):
    return _of_mesh(text)
  if iota := re.match(_IOTA, text):
    return _iota(iota)
  raise HloError(f"replica groups of a form that is not known: {text[:120]!r}")


def _explicit(text: str) -> np.ndarray:
  """{{0,1},{2,3}}"""
  groups = [_numbers(x) for x in re.findall(r"\{([\d,]+)\}", text)]
  if len({len(group) for group in groups}) != 1:
    raise HloError(f"replica groups of different sizes: {text[:120]!r}")
  return np.array(groups)


def _iota(match: re.Match) -> np.ndarray:
  """[2,4]<=[4,2]T(1,0): 0 to 7 as 4 x 2, transposed, as 2 x 4."""
  shape, sizes = _numbers(match[1]), _numbers(match[2])
  places = np.arange(int(np.prod(sizes))).reshape(sizes)
  if match[3]:
    places = places.transpose(_numbers(match[3]))
  return places.reshape(shape)


def _of_mesh(text: str) -> np.ndarray:
  """mesh['a'=4,'b'=8] {'b':(2)4}: along 'b', as 2 x 4 x 1 its middle part.

  Before the axes, device_ids=([8,4]T(1,0)): 0 to 31 as 8 x 4, transposed; or
  the ids themselves.
  """
  match = re.match(
      r"mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", text
  )
  if match is None:
    raise HloError(f"a mesh of a form that is not known: {text[:120]!r}")
  sizes = {k: int(v) for k, v in re.findall(r"'([^']+)'=(\d+)", match[1])}
  places = np.arange(int(np.prod(list(sizes.values()))))
  if match[2]:
    iota = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", match[2])
    if iota:
      places = places.reshape(_numbers(iota[1]))
      places = places.transpose(_numbers(iota[2] or "") or None)
    else:
      places = np.array(_numbers(match[2]))
  chosen = {
      name: (int(before), int(size)) if size else None
      for name, before, size in re.findall(
          r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3]
      )
  }
  # Every axis in three parts: before, chosen, after.
  parts, inside = [], []
  for i, (name, size) in enumerate(sizes.items()):
    before, part = size, 1
    if name in chosen:
      before, part = chosen[name] or (1, size)
    parts += [before, part, size // before // part]
    inside.append(3 * i + 1)
  outside = [i for i in range(len(parts)) if i not in inside]
  order = places.reshape(parts).transpose(outside + inside)
  return order.reshape(-1, int(np.prod([parts[i] for i in inside])))


def _numbers(text: str) -> list[int]:
  return [int(x) for x in re.findall(r"\d+", text)]
