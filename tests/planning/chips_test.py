"""Figures, names of slices, rooflines: arithmetic by hand."""

import dataclasses

import numpy as np
import pytest

from rlhf_jax.planning import chips, roofline, topologies
from rlhf_jax.planning.flops import Work
from rlhf_jax.planning.memory import TooLarge
from rlhf_jax.planning.roofline import Phase

BY_NAME = {chip.name: chip for chip in chips.CHIPS}


def test_every_figure_has_its_source():
  for chip in chips.CHIPS:
    figures = {"matmul_flops", "memory_bytes", "memory_bandwidth"}
    figures |= {"link_bandwidth"}
    assert figures <= set(chip.sources)
    for field in dataclasses.fields(chip):
      if field.name in chip.sources:
        assert getattr(chip, field.name) > 0
  assert set(BY_NAME) == {"v4", "v5e", "v5p", "v6e", "H100", "H200"}


def test_a_chip_is_found_by_what_jax_calls_it():
  assert chips.chip_of("TPU v5 lite").name == "v5e"
  assert chips.chip_of("TPU v5").name == "v5p"
  assert chips.chip_of("NVIDIA H200").name == "H200"
  assert chips.chip_of("cpu") is None


@pytest.mark.parametrize(
    "name, full",
    [
        ("v5e:8x8", "v5e:8x8"),
        ("v5e-64", "v5e:8x8"),
        ("v5litepod-16", "v5e:4x4"),
        ("v6e-64", "v6e:8x8"),
        # By TensorCores, two a chip.
        ("v5p-64", "v5p:2x4x4"),
        ("v5p-256", "v5p:4x4x8"),
        ("v4-32", "v4:2x2x4"),
    ],
)
def test_a_slice_has_two_names(name, full):
  assert topologies.full_name(name) == full
  shorter = topologies.accelerator_type(full)
  assert topologies.full_name(shorter) == full


@pytest.mark.parametrize(
    "name",
    ["", "8x8", "v5e", "v5e:8", "v5e-63", "v5p:8x8", "h100-8", "v5e:0x8"],
)
def test_no_slice_has_another(name):
  with pytest.raises(topologies.TopologyError, match="topology"):
    topologies.full_name(name)


def test_a_program_waits_for_the_slowest_of_its_resources():
  chip = dataclasses.replace(
      BY_NAME["v5e"], matmul_flops=100.0, memory_bandwidth=10.0
  )
  phases = [
      Phase(name="compute bound", flops=500.0, memory_bytes=20.0),
      Phase(name="memory bound", flops=100.0, memory_bytes=30.0),
  ]
  on_chip = roofline.roofline(phases, {}, {}, chip)
  assert (on_chip.compute, on_chip.memory, on_chip.links) == (6.0, 5.0, 0.0)
  assert on_chip.seconds == 5.0 + 3.0
  axes = ("fsdp",)
  sent = roofline.roofline(phases, {axes: 90.0}, {axes: 10.0}, chip)
  assert (sent.seconds, sent.bound) == (9.0, "links")


def test_weights_are_read_by_every_row_shard_and_split_over_tensor():
  work = Work(flops=800.0, weights=40.0, activations=80.0)
  found = roofline.phase(
      "x", work, itemsize=2, row_shards=4, weight_shards=2, extra_bytes=1.0
  )
  assert found.flops == 100.0
  assert found.memory_bytes == 2 * (40 / 2 + 80 / 8) + 1


def places(*shape: int) -> np.ndarray:
  """Chips of a torus as a mesh of the same shape."""
  return np.stack(np.indices(shape), axis=-1)


def test_an_axis_has_the_links_of_the_dimensions_along_which_it_extends():
  chip = BY_NAME["v5e"]
  links = lambda places, axes, names="xy": (
      roofline.axes_bandwidth(chip, places, names, axes) / chip.link_bandwidth
  )
  # A line of 8 is no ring, one of 16 is.
  assert links(places(8, 8), "x") == 1
  assert links(places(8, 8), "xy") == 2
  assert links(places(16, 16), "x") == 2
  assert links(places(16, 16), "xy") == 4
  # Half of a ring is a line.
  halves = places(16, 16).reshape(2, 8, 16, 2)
  assert links(halves, "b", "abc") == 1


def test_three_dimensions_are_rings_together_or_not_at_all():
  chip = BY_NAME["v5p"]
  links = lambda shape, axes: (
      roofline.axes_bandwidth(chip, places(*shape), "xyz", axes)
      / chip.link_bandwidth
  )
  assert links((4, 4, 8), "z") == 2
  assert links((2, 4, 4), "z") == 1


def test_behind_a_switch_all_axes_have_the_one_link():
  chip = BY_NAME["H100"]
  assert roofline.axes_bandwidth(chip, None, "xy", "x") == 450e9


@pytest.mark.parametrize(
    "message, needed, available",
    [
        (
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries "
            "(1.00T) exceeds available HBM (15.75G).",
            2.0**40,
            15.75 * 2**30,
        ),
        (
            "Ran out of memory in memory space hbm. Used 23.11G of 15.75G hbm. "
            "Exceeded hbm capacity by 7.36G.",
            23.11 * 2**30,
            15.75 * 2**30,
        ),
        ("out of memory", None, None),
    ],
)
def test_a_refusals_numbers_are_read(message, needed, available):
  error = TooLarge(message)
  assert (error.needed, error.available) == (needed, available)
