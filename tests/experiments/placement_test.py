"""Models on devices of their own, and rollouts that are sampled ahead."""

import math
import shutil

import jax
import numpy as np
import pytest

from experiments import ppo
from experiments.harness import devices
from experiments.harness.config import ConfigError, from_config
from rlhf_jax.device_mesh import MeshConfig
from tests.experiments import tiny

OWN = devices.OwnDevices


def _run(finished_run, workdir, num_steps=3, **changes):
  """A PPO stage: its metrics by step."""
  config = tiny.stage("ppo", finished_run)
  config.loop.update(
      tiny.loop(num_steps, eval_every=1, checkpoint_every=1)
  )
  for name, value in changes.items():
    section, _, field = name.rpartition("__")
    target = config
    for part in section.split("__") if section else ():
      target = target[part]
    target[field] = value
  if config.overlap:
    config.ppo.importance_correction = True
  ppo.run(from_config(ppo.Config, config), str(workdir))
  rows = tiny.read_jsonl(workdir / "metrics.jsonl")
  return [row for row in rows if "ppo/score" in row]


def _assert_close(found, wanted):
  for name, value in wanted.items():
    np.testing.assert_allclose(
        found[name], value, rtol=1e-4, atol=1e-4, err_msg=name
    )


def test_models_on_devices_of_their_own_change_nothing(finished_run, tmp_path):
  # A number of held-out prompts that no mesh divides.
  odd = dict(heldout_prompts__limit=7)
  wanted = _run(finished_run, tmp_path / "one", **odd)
  found = _run(
      finished_run,
      tmp_path / "apart",
      **odd,
      mesh__data=2,
      placement__reward_model__devices=2,
      placement__reward_model__fsdp=2,
      placement__ref_policy__devices=2,
      placement__ref_policy__tensor=2,
  )
  for found_row, row in zip(found, wanted, strict=True):
    _assert_close(found_row, row)
  arrays = tiny.model_arrays(tmp_path / "one")
  for name, array in tiny.model_arrays(tmp_path / "apart").items():
    np.testing.assert_allclose(array, arrays[name], atol=1e-4, err_msg=name)


def test_meshes_share_no_device():
  meshes = devices.make_meshes(
      MeshConfig(data=-1),
      devices.PlacementConfig(
          ref_policy=OWN(devices=1, fsdp=1, tensor=1),
          reward_model=OWN(devices=4, fsdp=2, tensor=1),
      ),
  )
  used = [x for mesh in meshes.values() for x in mesh.devices.flat]
  assert sorted(x.id for x in used) == [x.id for x in jax.devices()]
  assert meshes["policy"].shape["data"] == 3
  assert meshes["reward_model"].shape["fsdp"] == 2


# ---- Overlap -----------------------------------------------------------------


def test_a_rollout_ahead_is_of_the_policy_before_the_update(
    finished_run, tmp_path
):
  still = dict(optimizer__learning_rate=1e-30)
  in_turns = _run(finished_run, tmp_path / "turns", **still)
  ahead = _run(finished_run, tmp_path / "ahead", overlap=1, **still)
  # The same prompts and the same draws, where the policy stays what it is.
  for found, wanted in zip(ahead, in_turns, strict=True):
    _assert_close(found, wanted)
    np.testing.assert_allclose(found["ppo/importance_weight"], 1, atol=1e-5)

  moving = dict(optimizer__learning_rate=0.01)
  in_turns = _run(finished_run, tmp_path / "turns_2", **moving)
  ahead = _run(finished_run, tmp_path / "ahead_2", overlap=1, **moving)
  # The first was sampled by the policy that it is scored by, later ones by the
  # one before.
  _assert_close(ahead[0], in_turns[0])
  assert ahead[0]["ppo/rollout_logprob_gap"] < 1e-5
  for row in ahead[1:]:
    assert row["ppo/rollout_logprob_gap"] > 1e-3
    assert abs(row["ppo/importance_weight"] - 1) > 1e-4
    # The step is bounded by the policy that it starts from.
    assert row["ppo/first_ratio_gap"] < 1e-5
  for row in in_turns:
    assert row["ppo/rollout_logprob_gap"] < 1e-5


def test_a_rollout_ahead_survives_a_kill(finished_run, tmp_path):
  changes = dict(overlap=1, optimizer__learning_rate=0.01, mesh__data=2)
  _run(finished_run, tmp_path / "whole", **changes)
  shutil.copytree(tmp_path / "whole", tmp_path / "killed")
  (tmp_path / "killed" / "finished.json").unlink()
  shutil.rmtree(tmp_path / "killed" / "model")
  shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step_00000003")
  _run(finished_run, tmp_path / "killed", **changes)
  for read in (tiny.model_arrays, tiny.last_checkpoint):
    tiny.assert_bitwise(read(tmp_path / "killed"), read(tmp_path / "whole"))


def test_the_next_rollout_is_under_way_before_this_one_is_scored(
    finished_run, tmp_path, monkeypatch
):
  calls = []
  make = ppo.ppo_programs.make_programs

  def watched(*args):
    programs = make(*args)
    for name in ("rollout", "score", "update"):
      program = getattr(programs, name)

      def call(*args, name=name, program=program, **kwargs):
        calls.append(name)
        return program(*args, **kwargs)

      object.__setattr__(programs, name, call)
    return programs

  monkeypatch.setattr(ppo.ppo_programs, "make_programs", watched)
  monkeypatch.setattr(
      ppo.evaluator,
      "load_reward_rule",
      lambda name: lambda episodes: (
          calls.append("reward"), np.ones(8, np.float32)
      )[1],
  )
  rule = dict(
      reward_model="", reward_rule="any:rule", value_init="policy", num_steps=2
  )
  _run(finished_run, tmp_path / "ahead", overlap=1, **rule)
  order = [x for x in calls if x != "reward"]
  # As many as there are iterations: in the last there is no next.
  assert order == [*["rollout"] * 2, "score", "update", "score", "update"]
  # Between the next rollout's start and the score of this one.
  second = calls.index("rollout", calls.index("rollout") + 1)
  assert "reward" in calls[second : calls.index("score")]


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"overlap": 1, "ppo": {"importance_correction": False}},
            "overlap=1 and ppo.importance_correction=False",
        ),
        (
            {"ppo": {"importance_correction": True}},
            "overlap=0 and ppo.importance_correction=True",
        ),
        (
            {"placement": {"reward_model": {"devices": 3}}},
            "rollout_batch_size=8 does not divide",
        ),
        (
            {"placement": {"reward_model": {"devices": 2, "fsdp": 4}}},
            "4 devices|do not divide by the 4",
        ),
        (
            {"placement": {"ref_policy": {"fsdp": 2}}},
            "it has none",
        ),
        (
            {
                "placement": {"reward_model": {"devices": 7}},
                "mesh": {"data": 2},
            },
            "has 2 devices, and there are 1",
        ),
        (
            {
                "placement": {"ref_policy": {"devices": 2}},
                "lora": {"rank": 2},
            },
            "cannot have other devices",
        ),
        ({"overlap": 2}, "overlap"),
        ({"ppo": {"importance_cap": math.inf}}, "importance_cap"),
    ],
)
def test_what_cannot_be_placed_is_refused(finished_run, changes, message):
  config = tiny.stage("ppo", finished_run)
  config.update(changes)
  with pytest.raises(ConfigError, match=message):
    from_config(ppo.Config, config)


def test_the_rest_of_the_devices_is_what_others_leave(finished_run):
  config = tiny.stage("ppo", finished_run)
  config.mesh.update(data=-1, tensor=3)
  # Eight devices do not divide by 3, the six that are left do.
  config.placement.reward_model.devices = 2
  assert from_config(ppo.Config, config).mesh.sizes(6)["data"] == 2
