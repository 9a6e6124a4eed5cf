"""A run that is killed and started again ends as one that never was."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from experiments import ppo, sft
from experiments.harness import models
from experiments.harness.config import ConfigError, from_config
from rlhf_jax import array_folder, checkpoint
from tests.experiments import tiny

EXACT = ("metrics.jsonl", "samples.jsonl", "finished.json")


def sft_config(run: pathlib.Path):
  config = tiny.stage("sft", run)
  config.train.loop.update(
      tiny.loop(
          12,
          eval_every=2,
          checkpoint_every=2,
          best_metric="eval/loss",
          best_mode="min",
      )
  )
  return config


def ppo_config(run: pathlib.Path):
  config = tiny.stage("ppo", run)
  config.loop.update(tiny.loop(6, eval_every=2, checkpoint_every=2))
  return config


CONFIGS = {"sft": sft_config, "ppo": ppo_config}


@pytest.fixture(scope="module")
def uninterrupted(finished_run, tmp_path_factory):
  """binary -> (its config file, the workdir of a run that nothing stopped)."""

  @functools.cache
  def run(binary):
    folder = tmp_path_factory.mktemp(binary)
    config = tiny.write_config(
        folder / "config.py", CONFIGS[binary](finished_run)
    )
    done = tiny.call(binary, config, folder / "whole")
    assert done.returncode == 0, done.stderr
    return config, folder / "whole"

  return run


def assert_same_run(found: pathlib.Path, wanted: pathlib.Path) -> None:
  for name in EXACT:
    assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
  tiny.assert_bitwise(tiny.model_arrays(found), tiny.model_arrays(wanted))
  tiny.assert_bitwise(
      tiny.last_checkpoint(found), tiny.last_checkpoint(wanted)
  )


# ---- Kills -------------------------------------------------------------------


def _last_step(workdir: pathlib.Path) -> int:
  """The step of the last whole line of metrics.jsonl, -1 without one."""
  path = workdir / "metrics.jsonl"
  lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
  return json.loads(lines[-1])["step"] if lines else -1


def _checkpoints(workdir: pathlib.Path, finished: bool) -> list[pathlib.Path]:
  return [
      path
      for path in sorted((workdir / "checkpoints").glob("step_*"))
      if path.suffix != ".deleted"
      and array_folder.is_finished(path) == finished
  ]


def _evaluating_for_the_first_time(workdir):
  return (workdir / "samples.jsonl").exists()


def _half_way_through_a_save(workdir):
  return bool(_checkpoints(workdir, finished=False))


def _beyond_a_checkpoint(workdir):
  """Lines are written that the resumed run has to take back."""
  saved = _checkpoints(workdir, finished=True)
  return bool(saved) and _last_step(workdir) > int(saved[-1].name[5:13])


def _after_the_last_step(workdir, num_steps):
  """The training is over and its result is not yet written."""
  name = f"step_{num_steps:08d}"
  return array_folder.is_finished(workdir / "checkpoints" / name)


def kill_when(process: subprocess.Popen, moment, workdir) -> bool:
  """Kills the process at that moment; False if it ended before."""
  while process.poll() is None:
    if moment(workdir) and not (workdir / "finished.json").exists():
      # Stopped, it cannot get past the moment before the kill comes.
      os.kill(process.pid, signal.SIGSTOP)
      if moment(workdir) and not (workdir / "finished.json").exists():
        process.kill()
        process.communicate()
        return True
      os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.0005)
  process.communicate()
  return False


def _kill_again_and_again(binary, moments, uninterrupted, tmp_path):
  config, whole = uninterrupted(binary)
  workdir = tmp_path / "killed"
  hit = [
      kill_when(tiny.start(binary, config, workdir), moment, workdir)
      for moment in moments
  ]
  # On a busy machine one may be over before it is seen.
  assert sum(hit) >= len(moments) - 1
  done = tiny.call(binary, config, workdir)
  assert done.returncode == 0, done.stderr
  assert_same_run(workdir, whole)
  assert not _half_way_through_a_save(workdir)


def test_sft_killed_again_and_again_ends_bitwise_as_uninterrupted(
    uninterrupted, tmp_path
):
  moments = [
      _evaluating_for_the_first_time,
      _half_way_through_a_save,
      _beyond_a_checkpoint,
      functools.partial(_after_the_last_step, num_steps=12),
  ]
  _kill_again_and_again("sft", moments, uninterrupted, tmp_path)


# Random moments of all stages are in tests/faults.
@pytest.mark.slow
def test_ppo_killed_again_and_again_resumes_with_its_value_network_bitwise(
    uninterrupted, finished_run, tmp_path
):
  moments = [_half_way_through_a_save, _beyond_a_checkpoint]
  _kill_again_and_again("ppo", moments, uninterrupted, tmp_path)
  # What was compared held a value network that had left the reward model,
  # with an optimizer state of its own, and the controller.
  saved = tiny.last_checkpoint(tmp_path / "killed")
  start = tiny.model_arrays(finished_run / "reward")
  name = "train.params.value.trunk.token_embedding"
  assert (saved[name] != start["['trunk']['token_embedding']"]).any()
  assert sum(name.removeprefix("train.params") in x for x in saved) == 3
  assert "kl_coef" in saved and "iteration" in saved


def _unfinish(workdir: pathlib.Path) -> None:
  (workdir / "finished.json").unlink()
  shutil.rmtree(workdir / "model")


def test_half_written_checkpoint_is_passed_over_with_a_warning(
    uninterrupted, tmp_path
):
  config, whole = uninterrupted("ppo")
  workdir = tmp_path / "damaged"
  shutil.copytree(whole, workdir)
  _unfinish(workdir)
  newest = workdir / "checkpoints" / "step_00000006"
  (newest / "checkpoint.json").unlink()
  # What a kill leaves of the line it was writing.
  with (workdir / "metrics.jsonl").open("a") as f:
    f.write('{"step": 7, "ppo/k')
  done = tiny.call("ppo", config, workdir)
  assert done.returncode == 0, done.stderr
  assert f"{newest} passed over" in done.stderr
  assert "resumed at step 4" in done.stderr
  assert_same_run(workdir, whole)


# ---- The same run, and others ------------------------------------------------


def test_the_same_seed_reproduces_a_run_bitwise_and_another_does_not(
    uninterrupted, finished_run, tmp_path
):
  config, whole = uninterrupted("sft")
  done = tiny.call("sft", config, tmp_path / "again")
  assert done.returncode == 0, done.stderr
  assert_same_run(tmp_path / "again", whole)
  other = sft_config(finished_run)
  other.train.seed = 1
  sft.run(from_config(sft.Config, other), str(tmp_path / "other"))
  first, second = (
      tiny.model_arrays(x) for x in (tmp_path / "other", whole)
  )
  assert all((first[name] != second[name]).any() for name in first)


def test_another_config_is_refused_with_the_fields(
    uninterrupted, finished_run, tmp_path
):
  _, whole = uninterrupted("sft")
  config = sft_config(finished_run)
  config.train.optimizer.learning_rate = 0.5
  config.train.loop.num_steps = 14
  path = tiny.write_config(tmp_path / "other.py", config)
  before = _contents(whole)
  tiny.assert_one_message(
      tiny.call("sft", path, whole),
      str(whole),
      "train.optimizer.learning_rate: saved 0.001, given 0.5",
      "train.loop.num_steps: saved 12, given 14",
      "--workdir",
  )
  assert _contents(whole) == before


def test_checkpoints_alone_refuse_another_config(
    uninterrupted, finished_run, tmp_path
):
  """Also where config.json was lost."""
  _, whole = uninterrupted("sft")
  workdir = tmp_path / "copy"
  shutil.copytree(whole, workdir)
  _unfinish(workdir)
  (workdir / "config.json").unlink()
  config = sft_config(finished_run)
  config.train.seed = 1
  with pytest.raises(checkpoint.ConfigMismatch, match="train.seed: saved 0"):
    sft.run(from_config(sft.Config, config), str(workdir))


def test_what_changes_no_result_may_change_on_the_way(
    uninterrupted, finished_run, tmp_path
):
  _, whole = uninterrupted("sft")
  workdir = tmp_path / "sft"
  shutil.copytree(whole, workdir)
  _unfinish(workdir)
  # Back to where the newest checkpoint but one was saved.
  shutil.rmtree(workdir / "checkpoints" / "step_00000012")
  config = sft_config(finished_run)
  config.train.loop.update(
      tensorboard=True, keep_checkpoints=5, max_nonfinite_steps=99
  )
  # On one device, as what it is held against: with the threads of eight XLA may
  # round otherwise.
  path = tiny.write_config(tmp_path / "config.py", config)
  done = tiny.call("sft", path, workdir)
  assert done.returncode == 0, done.stderr
  assert_same_run(workdir, whole)
  assert "train.loop.keep_checkpoints: saved 2, given 5" in done.stderr
  assert "rounds otherwise" not in done.stderr
  saved = json.loads((workdir / "config.json").read_text())
  assert saved["train"]["loop"]["max_nonfinite_steps"] == 99


def test_other_microbatches_are_taken_and_told(
    uninterrupted, finished_run, tmp_path, caplog
):
  _, whole = uninterrupted("sft")
  workdir = tmp_path / "sft"
  shutil.copytree(whole, workdir)
  _unfinish(workdir)
  shutil.rmtree(workdir / "checkpoints" / "step_00000012")
  config = sft_config(finished_run)
  config.train.sft.num_microbatches = 2
  with caplog.at_level("WARNING", logger="absl"):
    sft.run(from_config(sft.Config, config), str(workdir))
  assert "rounds otherwise" in caplog.text
  found, wanted = tiny.model_arrays(workdir), tiny.model_arrays(whole)
  for name, array in wanted.items():
    np.testing.assert_allclose(found[name], array, atol=1e-4, err_msg=name)
  # But not the size of a step.
  config.train.batch_size *= 2
  with pytest.raises(checkpoint.ConfigMismatch, match="train.batch_size"):
    sft.run(from_config(sft.Config, config), str(workdir))


def test_a_finished_stage_is_skipped(uninterrupted, finished_run):
  _, whole = uninterrupted("sft")
  before = _contents(whole)
  # init_from is not even read.
  sft.run(from_config(sft.Config, sft_config(finished_run)), str(whole))
  assert _contents(whole) == before


def _contents(folder: pathlib.Path) -> dict[pathlib.Path, tuple[int, bytes]]:
  return {
      path: (path.stat().st_mtime_ns, path.read_bytes())
      for path in sorted(folder.rglob("*"))
      if path.is_file()
  }


def test_every_stage_remembers_what_it_was_trained_on(finished_run):
  inputs = {
      name: set(
          array_folder.read_info(
              finished_run / name / "checkpoints" / "step_00000002"
          )["iterator_state"]["inputs"]
      )
      for name in ("pretrain", "sft", "reward", "ppo")
  }
  text = {"training data", "held-out data"}
  assert inputs == {
      "pretrain": text,
      "sft": text,
      "reward": {"comparisons", "held-out comparisons"},
      "ppo": {
          "prompts",
          "held-out prompts",
          "documents",
          "reference policy",
          "reward model",
      },
  }


def test_a_reward_model_that_was_trained_anew_in_place_is_noticed(
    finished_run, tmp_path
):
  run = tmp_path / "run"
  shutil.copytree(finished_run, run)
  _unfinish(run / "ppo")
  config = from_config(ppo.Config, tiny.stage("ppo", run))
  model = models.load_reward_model(str(run / "reward"))
  normalization = dataclasses.replace(
      model.normalization, bias=model.normalization.bias + 1
  )
  models.save_reward_model(
      run / "reward", dataclasses.replace(model, normalization=normalization)
  )
  with pytest.raises(ConfigError, match="changed since: reward model. Put"):
    ppo.run(config, str(run / "ppo"))
  # What it was before is taken.
  models.save_reward_model(run / "reward", model)
  ppo.run(config, str(run / "ppo"))
  assert_same_run(run / "ppo", finished_run / "ppo")


def test_best_and_last_checkpoints_are_kept(uninterrupted):
  _, whole = uninterrupted("sft")
  losses = {
      row["step"]: row["eval/loss"]
      for row in tiny.read_jsonl(whole / "metrics.jsonl")
      if "eval/loss" in row and row["step"] > 0
  }
  best = min(losses, key=losses.get)
  kept = {int(path.name[5:13]) for path in (whole / "checkpoints").iterdir()}
  assert kept == {10, 12, best}
