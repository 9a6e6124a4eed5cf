"""Devices of slices that are not there, to compile for.

`libtpu` (the extra `tpu`) compiles for any slice on any Linux machine. A slice
has two names, and both are taken:

    v5e:8x8   generation and chips a dimension of its torus; v4 and v5p have
              three dimensions: v5p:4x4x8
    v5e-64    Cloud's accelerator type. For v4 and v5p it counts TensorCores,
              two a chip: v5p-256 is v5p:4x4x8, 128 chips. v5litepod-64 is
              v5e-64.
"""

from collections.abc import Sequence
import importlib.util
import math
import os
import re
from typing import Any

import jax

from rlhf_jax.planning.chips import CHIPS

# Chips -> the shape that Cloud gives the accelerator type of so many.
_SHAPES_2D = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8",
    128: "8x16", 256: "16x16",
}
_SHAPES_3D = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4",
    128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16",
    2048: "8x16x16",
}
_DIMENSIONS = {
    chip.name: chip.num_dimensions for chip in CHIPS if chip.platform == "tpu"
}


class TopologyError(ValueError):
  """No such slice, or nothing here that can compile for it."""


def full_name(name: str) -> str:
  """'v5p-256' -> 'v5p:4x4x8'; a name with its shape stays as it is.

  Raises:
    TopologyError: it is neither; says what there is.
  """
  name = name.replace("v5litepod", "v5e")
  generation, separator, size = name.partition(":" if ":" in name else "-")
  num = _DIMENSIONS.get(generation)
  if num is None:
    raise TopologyError(
        f"topology {name!r}: its chip is none of {', '.join(_DIMENSIONS)}; a "
        "topology is v5e:8x8 or v5e-64"
    )
  if separator == ":":
    if not re.fullmatch("x".join([r"[1-9]\d*"] * num), size):
      raise TopologyError(
          f"topology {name!r}: a slice of {generation} has {num} dimensions, "
          f"as {generation}:{_shapes(generation)[16]}"
      )
    return name
  sizes = {str(n * _counted(generation)): n for n in _shapes(generation)}
  if size not in sizes:
    raise TopologyError(
        f"topology {name!r}: {generation} comes as "
        + ", ".join(f"{generation}-{x}" for x in sizes)
    )
  return f"{generation}:{_shapes(generation)[sizes[size]]}"


def _shapes(generation: str) -> dict[int, str]:
  return _SHAPES_2D if _DIMENSIONS[generation] == 2 else _SHAPES_3D


def _counted(generation: str) -> int:
  """What an accelerator type counts a chip as."""
  return 2 if _DIMENSIONS[generation] == 3 else 1


def accelerator_type(name: str) -> str:
  """Cloud's name: 'v5p:4x4x8' -> 'v5p-256'."""
  generation, _, shape = full_name(name).partition(":")
  chips = math.prod(int(x) for x in shape.split("x"))
  return f"{generation}-{chips * _counted(generation)}"


def make_devices(name: str) -> Sequence[Any]:
  """The devices of a slice, for `jax.sharding.Mesh`; nothing runs on them.

  Raises:
    TopologyError: libtpu is not installed, or knows no such slice.
  """
  name = full_name(name)
  if importlib.util.find_spec("libtpu") is None:
    raise TopologyError(
        f"topology {name!r}: the package libtpu compiles for it, and is not "
        "installed; pip install 'rlhf_jax[tpu]'"
    )
  # It asks the machine that it is on who it is, and lets only one process of it
  # use a TPU; here none is used.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies  # pylint: disable=g-import-not-at-top

  # A chip of v4 is one device, as it is on Cloud, and not two.
  options = {"chip_config_name": "megacore"} if name[:3] == "v4:" else {}
  try:
    return topologies.get_topology_desc(
        name, platform="tpu", **options
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise TopologyError(f"topology {name!r}: {error}") from error
