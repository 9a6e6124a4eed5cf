"""Stages by pmap: as by jit on one device, and each may go on by the other."""

import json
import shutil

import numpy as np
import pytest

from experiments import ppo, reward, sft
from experiments.harness.config import from_config
from tests.experiments import tiny

STAGES = {"sft": sft, "reward": reward, "ppo": ppo}
METRICS = {
    "sft": "sft/loss",
    "reward": "reward/loss",
    "ppo": "ppo/value_loss",
}


def run(name, finished_run, workdir, parallelism, num_devices):
  config = tiny.stage(name, finished_run)
  part = config.train if name == "sft" else config
  part.loop.update(tiny.loop(4, checkpoint_every=2, eval_every=2))
  part.parallelism, part.mesh.data = parallelism, num_devices
  if name == "ppo":
    config.ppo.update(num_minibatches=2, whiten_rewards=True)
    # The state then holds a rollout, which is rows.
    config.overlap, config.ppo.importance_correction = 1, True
  STAGES[name].run(
      from_config(STAGES[name].Config, config), str(workdir)
  )


def assert_as(found, wanted, name):
  arrays, expected = tiny.model_arrays(found), tiny.model_arrays(wanted)
  assert arrays.keys() == expected.keys()
  for key, array in expected.items():
    np.testing.assert_allclose(arrays[key], array, atol=1e-4, err_msg=key)
  rows, expected = (
      [row[METRICS[name]] for row in tiny.read_jsonl(x / "metrics.jsonl")
       if METRICS[name] in row]
      for x in (found, wanted)
  )
  assert len(rows) == 4
  np.testing.assert_allclose(rows, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    # tests/updates/pmap_test.py has the updates of all three.
    [
        pytest.param(x, marks=() if x == "ppo" else pytest.mark.slow)
        for x in STAGES
    ],
)
def test_a_stage_by_pmap_is_that_of_one_device(name, finished_run, tmp_path):
  one, many = tmp_path / "one", tmp_path / "many"
  run(name, finished_run, one, "jit", 1)
  run(name, finished_run, many, "pmap", 4)
  assert_as(many, one, name)
  # Half a run by the one, the rest by the other.
  for folder, parallelism, num_devices in ((one, "pmap", 4), (many, "jit", 1)):
    rest = tmp_path / f"{folder.name}_and_{parallelism}"
    shutil.copytree(folder, rest)
    (rest / "finished.json").unlink()
    shutil.rmtree(rest / "checkpoints" / "step_00000004")
    run(name, finished_run, rest, parallelism, num_devices)
    assert_as(rest, one, name)
    saved = json.loads((rest / "config.json").read_text())
    part = saved["train"] if name == "sft" else saved
    assert part["parallelism"] == parallelism
