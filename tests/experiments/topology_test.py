"""A checkpoint of one mesh is read on another, bitwise, and the run goes on."""

import jax
import numpy as np
import pytest

from experiments import sft
from experiments.harness import loop, stopping
from experiments.harness.config import from_config
from rlhf_jax import array_folder
from tests.experiments import tiny

MESHES = {
    "fsdp 8": dict(fsdp=8),
    "fsdp 2 x tensor 2": dict(fsdp=2, tensor=2),
    "one device": dict(),
}


def _config(run, mesh):
  config = tiny.stage("sft", run)
  config.train.batch_size = 8
  config.train.mesh.update(mesh)
  config.train.loop.update(tiny.loop(6, checkpoint_every=6, eval_every=6))
  return from_config(sft.Config, config)


@pytest.fixture
def stop_at(monkeypatch):
  """From here on a run is told to stop after so many steps; None for not."""
  asked = []

  def at(step):
    asked.clear()
    monkeypatch.setattr(
        stopping,
        "requested",
        lambda: asked.append(0) or step is not None and len(asked) == step + 2,
    )

  return at


@pytest.fixture(scope="module")
def whole(finished_run, tmp_path_factory):
  """A run on eight devices that was never stopped."""
  workdir = tmp_path_factory.mktemp("whole")
  with jax.numpy_dtype_promotion("standard"):
    sft.run(_config(finished_run, MESHES["fsdp 8"]), str(workdir))
  return workdir


@pytest.mark.parametrize("other", ["fsdp 2 x tensor 2", "one device"])
def test_saved_on_eight_devices_and_read_elsewhere(
    finished_run, whole, tmp_path, stop_at, monkeypatch, other
):
  stop_at(3)
  with pytest.raises(stopping.Stopped, match="at step 3 of 6"):
    sft.run(_config(finished_run, MESHES["fsdp 8"]), str(tmp_path))
  saved = tiny.last_checkpoint(tmp_path)
  stop_at(None)
  restored = _restored_by(monkeypatch)
  sft.run(_config(finished_run, MESHES[other]), str(tmp_path))
  assert restored["devices"] == {"one device": 1}.get(other, 4)
  names = restored["arrays"].keys()
  assert {x for x in names if x.startswith("params")} == {
      x for x in saved if x.startswith("params")
  }
  for name, array in restored["arrays"].items():
    assert array.tobytes() == saved[name].tobytes(), name
  # And its end is that of the run on eight, up to rounding.
  found, wanted = tiny.last_checkpoint(tmp_path), tiny.last_checkpoint(whole)
  for name, array in found.items():
    np.testing.assert_allclose(array, wanted[name], atol=1e-5, err_msg=name)


def _restored_by(monkeypatch) -> dict:
  """What a loop has restored, seen where it restores it."""
  seen, restore = {}, array_folder.restore_arrays

  def spy(folder, specs, abstract_state, **how):
    state = restore(folder, specs, abstract_state, **how)
    seen["devices"] = len(jax.tree.leaves(state.params)[0].sharding.device_set)
    seen["arrays"] = {
        name: np.asarray(x)
        for name, x in array_folder._named_leaves(state).items()
        if name.startswith(("params", "opt_state"))
    }
    return state

  monkeypatch.setattr(loop.checkpoint.array_folder, "restore_arrays", spy)
  return seen
