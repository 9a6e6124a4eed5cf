import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.sharding import MeshConfig

RULES = (
    (r"query/kernel$", (None, "fsdp", "tensor", None)),
    (r"embedding$", (("tensor", "fsdp"), None)),
    (r"scale$", ()),
)


def _mesh(**sizes):
  return sharding.make_mesh(MeshConfig(**sizes))


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
  assert mesh.axis_names == sharding.AXES
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
  assert sharding.make_mesh(MeshConfig(data=-1), devices).size == 4
  with pytest.raises(ValueError, match="2 of the 4 devices of all processes"):
    sharding.make_mesh(MeshConfig(data=2), devices)


# --- rows ---------------------------------------------------------------------


def test_rows_are_split_over_every_row_axis_and_no_other():
  mesh = _mesh(replica=2, fsdp=2, tensor=2)
  rows = sharding.shard_rows({"x": np.arange(32).reshape(16, 2)}, mesh)["x"]
  assert [s.data.shape for s in rows.addressable_shards] == [(4, 2)] * 8
  np.testing.assert_array_equal(rows, np.arange(32).reshape(16, 2))
  state = sharding.replicate({"w": jnp.arange(3), "none": None}, mesh)
  assert state["w"].sharding.is_fully_replicated
  assert len(state["w"].sharding.device_set) == 8


def test_rows_that_do_not_divide_over_devices_are_an_error():
  with pytest.raises(ValueError, match="12 rows do not divide over 8 devices"):
    sharding.shard_rows({"x": np.zeros((12, 2))}, _mesh(data=2, fsdp=4))


def test_one_process_has_all_rows_of_every_mesh():
  for sizes in ({}, {"data": 2, "fsdp": 4}, {"tensor": 8}, {"fsdp": 2}):
    mine = sharding.local_rows(_mesh(**sizes), 16)
    np.testing.assert_array_equal(mine, np.arange(16))
  with pytest.raises(ValueError, match="12 rows do not divide over 8 devices"):
    sharding.local_rows(_mesh(data=2, fsdp=4), 12)


# --- rules --------------------------------------------------------------------


def test_the_first_rule_that_matches_counts_and_scalars_need_none():
  mesh = _mesh(fsdp=4, tensor=2)
  spec = lambda path, shape: sharding.spec_of(path, shape, RULES, mesh)
  assert spec("trunk/query/kernel", (3, 8, 4, 2)) == PartitionSpec(
      None, "fsdp", "tensor", None
  )
  assert spec("count", ()) == PartitionSpec()
  first = ((r"query", ()), *RULES)
  assert sharding.spec_of(
      "trunk/query/kernel", (3, 8, 4, 2), first, mesh
  ) == PartitionSpec()


@pytest.mark.parametrize(
    "path,shape,rules,message",
    [
        ("head/kernel", (4, 4), RULES, r"head/kernel .*no sharding rule"),
        (
            "a/query/kernel",
            (3, 8, 3, 2),
            RULES,
            r"a/query/kernel .*dimension 2 of 3 does not divide over tensor",
        ),
        ("embedding", (12, 2), RULES, "dimension 0 of 12 .*tensor x fsdp = 8"),
        ("embedding", (8,), RULES, "fewer dimensions than its sharding rule"),
        ("x", (8,), (("x", ("width",)),), "'width' is none of the mesh's axes"),
    ],
)
def test_a_parameter_that_no_rule_can_place_is_an_error(
    path, shape, rules, message
):
  with pytest.raises(ValueError, match=message):
    sharding.spec_of(path, shape, rules, _mesh(fsdp=4, tensor=2))


def test_each_model_of_a_state_has_its_own_rules():
  mesh = _mesh(fsdp=8)
  model = {"query": {"kernel": jnp.zeros((1, 8, 2, 2))}}
  state = {
      "params": {"policy": model, "value": model},
      "moments": ({"policy": model, "value": model},),
      "step": jnp.zeros((), jnp.int32),
      "rng": jax.random.key(0),
  }
  rules = {"policy": RULES, "value": ((".*", ()),)}
  placed = sharding.place(state, rules, mesh)
  for tree in (placed["params"], placed["moments"][0]):
    assert tree["policy"]["query"]["kernel"].sharding.spec[1] == "fsdp"
    assert tree["value"]["query"]["kernel"].sharding.is_fully_replicated
  assert placed["rng"].sharding.is_fully_replicated
  with pytest.raises(ValueError, match="value/query.*no sharding rule"):
    sharding.place(state, rules | {"value": ()}, mesh)


def test_a_copy_may_be_donated_and_the_original_stays():
  mesh = _mesh()
  params = sharding.place({"scale": jnp.arange(4.0)}, RULES, mesh)
  copied = sharding.place(params, RULES, mesh, copy=True)
  jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), donate_argnums=0)(copied)
  np.testing.assert_array_equal(params["scale"], np.arange(4.0))


# --- activations --------------------------------------------------------------


def _spec_in(fn, x):
  """How `fn` leaves a traced x, as its compiled program says."""
  return jax.jit(fn).lower(x).compile().output_shardings


def test_an_activation_lies_as_told_where_it_divides():
  mesh = _mesh(fsdp=2, tensor=2, sequence=2)
  x = sharding.shard_rows(np.zeros((4, 6, 5)), mesh)
  place = (sharding.ROWS, "sequence", "tensor")
  put = lambda x: sharding.constrain(x * 2, place)
  spec = _spec_in(put, x)
  wanted = jax.NamedSharding(mesh, PartitionSpec(sharding.ROWS, "sequence"))
  assert spec.is_equivalent_to(wanted, 3)


def test_on_one_device_and_under_pmap_nothing_is_constrained():
  place = (sharding.ROWS, None)
  seen = []

  def put(x):
    seen.append(sharding.mesh_of(x))
    return sharding.constrain(x, place)

  jax.jit(put)(jnp.zeros((4, 2)))
  jax.jit(put)(sharding.shard_rows(np.zeros((4, 2)), _mesh()))
  jax.pmap(put, axis_name="devices")(jnp.zeros((8, 4, 2)))
  assert seen and not any(seen)
