"""Figures of chips, as their makers publish them, each with its source.

Decimal units as published: 1 TFLOP/s is 1e12, 1 GB/s 1e9 bytes a second; memory
is in GiB, which is what the makers' GB of memory are.
"""

import dataclasses
from typing import Literal

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One accelerator.

  matmul_flops: dense bfloat16, a second.
  memory_bytes: what a program may take: below what the maker publishes, for the
    runtime keeps some.
  memory_bandwidth: bytes a second.
  link_bandwidth: bytes a second that one link carries in one direction.
  num_dimensions: of the torus; a chip has two links in each. 0: a switch joins
    all, through one link.
  wraps_at: dimensions of the torus are closed to rings where their length is a
    multiple of this; of three dimensions, where all of them are.
  device_kinds: what jax calls it.
  sources: field -> where the figure is from.
  """

  name: str
  platform: Literal["tpu", "gpu"]
  matmul_flops: float
  memory_bytes: float
  memory_bandwidth: float
  link_bandwidth: float
  num_dimensions: int
  wraps_at: int
  device_kinds: tuple[str, ...]
  sources: dict[str, str]


def _tpu_sources(page: str, links: str) -> dict[str, str]:
  published = f"Google Cloud, docs.cloud.google.com/tpu/docs/{page}"
  return {
      "matmul_flops": published,
      "memory_bandwidth": published,
      "memory_bytes": (
          "the limit that libtpu 0.0.52's compiler names where it refuses a "
          "program"
      ),
      "link_bandwidth": links,
      "wraps_at": published + " and /system-architecture-tpu-vm",
  }


_PER_CHIP = (
    "{} GB/s a chip, both directions, over {} links: docs.cloud.google.com/tpu/"
    "docs/{}"
)

CHIPS = (
    Chip(
        name="v4",
        platform="tpu",
        matmul_flops=275e12,
        memory_bytes=30.75 * GIB,
        memory_bandwidth=1200e9,
        link_bandwidth=50e9,
        num_dimensions=3,
        wraps_at=4,
        device_kinds=("TPU v4",),
        sources=_tpu_sources(
            "v4", "6 links of 50 GB/s: Jouppi et al., arXiv 2304.01433, table 4"
        ),
    ),
    Chip(
        name="v5e",
        platform="tpu",
        matmul_flops=197e12,
        memory_bytes=15.75 * GIB,
        memory_bandwidth=819e9,
        link_bandwidth=50e9,
        num_dimensions=2,
        wraps_at=16,
        device_kinds=("TPU v5 lite", "TPU v5e"),
        sources=_tpu_sources("v5e", _PER_CHIP.format(400, 4, "v5e")),
    ),
    Chip(
        name="v5p",
        platform="tpu",
        matmul_flops=459e12,
        memory_bytes=95.73 * GIB,
        memory_bandwidth=2765e9,
        link_bandwidth=100e9,
        num_dimensions=3,
        wraps_at=4,
        device_kinds=("TPU v5", "TPU v5p"),
        sources=_tpu_sources("v5p", _PER_CHIP.format(1200, 6, "v5p")),
    ),
    Chip(
        name="v6e",
        platform="tpu",
        matmul_flops=918e12,
        memory_bytes=31.24 * GIB,
        memory_bandwidth=1638e9,
        link_bandwidth=100e9,
        num_dimensions=2,
        wraps_at=16,
        device_kinds=("TPU v6 lite", "TPU v6e"),
        sources=_tpu_sources("v6e", _PER_CHIP.format(800, 4, "v6e")),
    ),
    Chip(
        name="H100",
        platform="gpu",
        matmul_flops=989e12,
        memory_bytes=80e9,
        memory_bandwidth=3.35e12,
        link_bandwidth=450e9,
        num_dimensions=0,
        wraps_at=0,
        device_kinds=("NVIDIA H100 80GB HBM3",),
        sources={
            "matmul_flops": (
                "NVIDIA H100 datasheet, SXM: 1,979 TFLOP/s with sparsity, half "
                "of it dense"
            ),
            "memory_bytes": "the same: 80 GB",
            "memory_bandwidth": "the same: 3.35 TB/s",
            "link_bandwidth": "the same: NVLink 900 GB/s, both directions",
        },
    ),
    Chip(
        name="H200",
        platform="gpu",
        matmul_flops=989e12,
        memory_bytes=141e9,
        memory_bandwidth=4.8e12,
        link_bandwidth=450e9,
        num_dimensions=0,
        wraps_at=0,
        device_kinds=("NVIDIA H200",),
        sources={
            "matmul_flops": (
                "NVIDIA H200 datasheet, SXM: 1,979 TFLOP/s with sparsity, half "
                "of it dense"
            ),
            "memory_bytes": "the same: 141 GB",
            "memory_bandwidth": "the same: 4.8 TB/s",
            "link_bandwidth": "the same: NVLink 900 GB/s, both directions",
        },
    ),
)


def chip_of(device_kind: str) -> Chip | None:
  """The chip that jax calls so; None for one without figures, as a CPU."""
  for chip in CHIPS:
    if device_kind in chip.device_kinds:
      return chip
  return None
