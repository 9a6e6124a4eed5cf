import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding


def test_rows_are_split_and_states_are_copied_over_the_mesh():
  mesh = sharding.make_mesh()
  assert mesh.shape == {"data": 8}
  rows = sharding.shard_rows({"x": np.arange(32).reshape(16, 2)}, mesh)["x"]
  assert [s.data.shape for s in rows.addressable_shards] == [(2, 2)] * 8
  state = sharding.replicate({"w": jnp.arange(3), "none": None}, mesh)
  assert state["w"].sharding.is_fully_replicated
  assert len(state["w"].sharding.device_set) == 8
  np.testing.assert_array_equal(rows, np.arange(32).reshape(16, 2))


def test_mesh_of_fewer_devices_takes_the_first():
  assert list(sharding.make_mesh(2).devices) == jax.devices()[:2]


@pytest.mark.parametrize("num_devices", [9, 0, -2])
def test_mesh_of_devices_that_are_not_there_is_an_error(num_devices):
  with pytest.raises(ValueError, match=f"num_devices={num_devices}, but 8"):
    sharding.make_mesh(num_devices)


def test_rows_that_do_not_divide_over_devices_are_an_error():
  with pytest.raises(ValueError, match="12 rows do not divide over 8 devices"):
    sharding.shard_rows({"x": np.zeros((12, 2))}, sharding.make_mesh())
