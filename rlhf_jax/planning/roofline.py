"""The shortest time that a program can take on its chips.

A phase of a program takes no less than its matmuls at the matrix units' peak,
and no less than its bytes at the memory's bandwidth; a program no less than its
phases one after the other, and no less than what its chips send at the links'.
Where all overlap perfectly it takes the largest of these, which is what is said
here. What a program reaches in practice is a part of it.

Bytes of memory are those of the matmuls' operands and results, each once, and
of the optimizer's state: what is between two matmuls is taken to stay on the
chip.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from rlhf_jax.planning.chips import Chip
from rlhf_jax.planning.flops import Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """A part of a program whose work is of one kind, for one chip.

  flops, memory_bytes: a chip's.
  """

  name: str
  flops: float
  memory_bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """Seconds that each resource would need alone, and what the program takes.

  bound: the name of what it waits for.
  """

  compute: float
  memory: float
  links: float
  seconds: float
  bound: str


def phase(
    name: str,
    work: Work,
    *,
    itemsize: int,
    row_shards: int,
    weight_shards: int,
    extra_bytes: float = 0.0,
) -> Phase:
  """One chip's share.

  Args:
    itemsize: bytes of an element, in the compute dtype.
    row_shards: chips over which rows (and positions) are split.
    weight_shards: chips over which a matmul's weights are split while it runs;
      those that are gathered for it are not.
    extra_bytes: a chip's, beside the matmuls'.
  """
  chips = row_shards * weight_shards
  num_bytes = work.weights / weight_shards + work.activations / chips
  return Phase(
      name=name,
      flops=work.flops / chips,
      memory_bytes=num_bytes * itemsize + extra_bytes,
  )


def roofline(
    phases: Sequence[Phase],
    sent: Mapping[tuple[str, ...], float],
    bandwidths: Mapping[tuple[str, ...], float],
    chip: Chip,
) -> Roofline:
  """Of a program on one kind of chip.

  Args:
    sent: mesh axes -> bytes that a chip sends along them.
    bandwidths: mesh axes -> bytes a second, see `axes_bandwidth`.
  """
  compute = [x.flops / chip.matmul_flops for x in phases]
  memory = [x.memory_bytes / chip.memory_bandwidth for x in phases]
  links = sum(num / bandwidths[axes] for axes, num in sent.items())
  on_chip = sum(max(pair) for pair in zip(compute, memory, strict=True))
  seconds = max(on_chip, links)
  if links > on_chip:
    bound = "links"
  else:
    bound = "memory" if sum(memory) > sum(compute) else "compute"
  return Roofline(
      compute=sum(compute),
      memory=sum(memory),
      links=links,
      seconds=seconds,
      bound=bound,
  )


def axes_bandwidth(
    chip: Chip,
    places: np.ndarray | None,
    mesh_axes: Sequence[str],
    axes: Sequence[str],
) -> float:
  """Bytes a second that a chip can send to the others of its group.

  In a torus a group has the links of the dimensions that it extends along: two
  of each where the dimension is a ring and the group fills it, and else, on
  average, one. Other groups that cross the same links are not thought of.

  Args:
    places: [mesh shape..., dimensions], each chip's coordinates; None where
      there are none.
    mesh_axes: names of the mesh's axes.
    axes: those that the group extends along.
  """
  if places is None or not chip.num_dimensions:
    return chip.link_bandwidth
  size = places.reshape(-1, places.shape[-1]).max(axis=0) + 1
  closed = size % chip.wraps_at == 0
  if chip.num_dimensions == 3:
    closed &= closed.all()
  index = tuple(
      slice(None) if name in axes else 0 for name in mesh_axes
  )
  group = places[index].reshape(-1, places.shape[-1])
  links = 0
  for dimension, length in enumerate(size):
    extent = len(set(group[:, dimension].tolist()))
    if extent > 1:
      ring = closed[dimension] and extent == length
      links += 2 if ring else 1
  return chip.link_bandwidth * max(links, 1)
