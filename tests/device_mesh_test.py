import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import device_mesh
from rlhf_jax.device_mesh import MeshConfig


def _mesh(**sizes):
  return device_mesh.make_mesh(MeshConfig(**sizes))


# --- meshes -------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes,wanted",
    [
        ({}, (1, 1, 1, 1, 1)),
        ({"data": -1}, (1, 8, 1, 1, 1)),
        ({"fsdp": 4, "tensor": 2}, (1, 1, 4, 2, 1)),
        ({"fsdp": -1, "tensor": 2}, (1, 1, 4, 2, 1)),
        ({"replica": 2, "sequence": -1}, (2, 1, 1, 1, 4)),
        ({"data": 8, "tensor": -1}, (1, 8, 1, 1, 1)),
    ],
)
def test_a_mesh_has_all_axes_and_the_rest_where_it_says_so(sizes, wanted):
  mesh = _mesh(**sizes)
  assert mesh.axis_names == device_mesh.AXES
  assert mesh.devices.shape == wanted
  assert list(mesh.devices.flat) == jax.devices()[: math.prod(wanted)]


@pytest.mark.parametrize(
    "sizes,message",
    [
        ({"data": 9}, "mesh {data: 9} has 9 devices, and there are 8"),
        ({"fsdp": 3, "data": -1}, "8 devices do not divide by the 3"),
        ({"data": -1, "fsdp": -1}, "one of them may be -1"),
        ({"data": 0}, "each axis is 1 or more"),
        ({"data": -2}, "each axis is 1 or more"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_with_the_numbers(sizes, message):
  with pytest.raises(ValueError, match=message):
    _mesh(**sizes)


def test_devices_of_other_processes_may_not_be_left_over():
  @dataclasses.dataclass(frozen=True)
  class Device:
    process_index: int
    id: int = 0
    platform: str = "cpu"

  devices = [Device(i // 2, i) for i in range(4)]
  assert device_mesh.make_mesh(MeshConfig(data=-1), devices).size == 4
  with pytest.raises(ValueError, match="2 of the 4 devices of all processes"):
    device_mesh.make_mesh(MeshConfig(data=2), devices)


# --- rows ---------------------------------------------------------------------


def test_rows_are_split_over_every_row_axis_and_no_other():
  mesh = _mesh(replica=2, fsdp=2, tensor=2)
  rows = device_mesh.shard_rows({"x": np.arange(32).reshape(16, 2)}, mesh)["x"]
  assert [s.data.shape for s in rows.addressable_shards] == [(4, 2)] * 8
  np.testing.assert_array_equal(rows, np.arange(32).reshape(16, 2))
  state = device_mesh.replicate({"w": jnp.arange(3), "none": None}, mesh)
  assert state["w"].sharding.is_fully_replicated
  assert len(state["w"].sharding.device_set) == 8


def test_rows_that_do_not_divide_over_devices_are_an_error():
  with pytest.raises(ValueError, match="12 rows do not divide over 8 devices"):
    device_mesh.shard_rows({"x": np.zeros((12, 2))}, _mesh(data=2, fsdp=4))


def test_one_process_has_all_rows_of_every_mesh():
  for sizes in ({}, {"data": 2, "fsdp": 4}, {"tensor": 8}, {"fsdp": 2}):
    mine = device_mesh.local_rows(_mesh(**sizes), 16)
    np.testing.assert_array_equal(mine, np.arange(16))
  with pytest.raises(ValueError, match="12 rows do not divide over 8 devices"):
    device_mesh.local_rows(_mesh(data=2, fsdp=4), 12)
