import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from rlhf_jax import device_mesh, sharding
from rlhf_jax.device_mesh import MeshConfig

RULES = (
    (r"query/kernel$", (None, "fsdp", "tensor", None)),
    (r"embedding$", (("tensor", "fsdp"), None)),
    (r"scale$", ()),
)


def _mesh(**sizes):
  return device_mesh.make_mesh(MeshConfig(**sizes))


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
  x = device_mesh.shard_rows(np.zeros((4, 6, 5)), mesh)
  place = (device_mesh.ROWS, "sequence", "tensor")
  put = lambda x: sharding.constrain(x * 2, place)
  spec = _spec_in(put, x)
  wanted = jax.NamedSharding(mesh, PartitionSpec(device_mesh.ROWS, "sequence"))
  assert spec.is_equivalent_to(wanted, 3)


def test_on_one_device_and_under_pmap_nothing_is_constrained():
  place = (device_mesh.ROWS, None)
  seen = []

  def put(x):
    seen.append(sharding.mesh_of(x))
    return sharding.constrain(x, place)

  jax.jit(put)(jnp.zeros((4, 2)))
  jax.jit(put)(device_mesh.shard_rows(np.zeros((4, 2)), _mesh()))
  jax.pmap(put, axis_name="devices")(jnp.zeros((8, 4, 2)))
  assert seen and not any(seen)
