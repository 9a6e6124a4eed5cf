"""The table over seeds: means and intervals of runs, not of prompts."""

import json

import numpy as np
import pytest
import scipy.stats

from experiments import seeds
from experiments.harness import cli


def write_run(folder, sft, ppo, config=None):
  (folder / "evaluate").mkdir(parents=True)
  (folder / "reward").mkdir()
  (folder / "ppo").mkdir()
  (folder / "config.json").write_text(json.dumps(config or {}))
  policies = {
      name: {"true_reward": {"mean": x}, "kl": {"mean": 10 * x}}
      for name, x in (("sft", sft), ("ppo", ppo))
  }
  (folder / "evaluate/evaluation.json").write_text(
      json.dumps({"policies": policies})
  )
  (folder / "reward/calibration.json").write_text(
      json.dumps({"accuracy": {"mean": ppo}, "ceiling": 0.9, "agreement": None})
  )
  (folder / "ppo/metrics.jsonl").write_text(
      "".join(
          json.dumps({"step": i, "eval/score": i, "eval/true_reward": ppo})
          + "\n"
          for i in range(3)
      )
  )


def test_gain_is_paired_by_seed_with_students_interval(tmp_path):
  sft, ppo = [0.1, 0.5, 0.3], [0.2, 0.7, 0.4]
  for i in range(3):
    write_run(tmp_path / f"run{i}", sft[i], ppo[i])
  text = "\n".join(seeds.make_table(seeds.find_runs(str(tmp_path / "run*"))))
  gain = np.subtract(ppo, sft)
  half = scipy.stats.t.ppf(0.975, 2) * gain.std(ddof=1) / np.sqrt(3)
  low, high = gain.mean() - half, gain.mean() + half
  assert f"ppo - sft of the same seed: {gain.mean():.3f}" in text
  assert f"[{low:.3f}, {high:.3f}]" in text
  assert "held-out reward-model accuracy: 0.433" in text
  assert "ceiling: 0.900" in text
  assert "agreement" not in text


def test_unfinished_runs_are_passed_over_and_named(tmp_path, capsys):
  for i in range(2):
    write_run(tmp_path / f"run{i}", 0.1, 0.2)
  (tmp_path / "run2").mkdir()
  assert len(seeds.find_runs(str(tmp_path / "run*"))) == 2
  assert "run2" in capsys.readouterr().out


def test_one_run_is_too_few(tmp_path):
  write_run(tmp_path / "run0", 0.1, 0.2)
  with pytest.raises(cli.UserError, match="two or more"):
    seeds.find_runs(str(tmp_path / "run*"))


def ppo_section(folder, seed, **changes):
  return {
      "seed": seed,
      "init_from": f"{folder}/sft",
      "reward_model": "@run/reward",
      "policies": [f"sft={folder}/sft"],
      "ppo": {"kl_coef": 0.1},
  } | changes


def test_runs_may_differ_in_seeds_and_in_their_own_folders(tmp_path):
  for i in range(3):
    folder = tmp_path / f"run{i}"
    write_run(folder, 0.1, 0.2, {"ppo": ppo_section(folder, i)})
  assert len(seeds.find_runs(str(tmp_path / "run*"))) == 3


def test_runs_that_differ_in_more_than_seeds_are_refused(tmp_path):
  for i in range(3):
    changes = {"ppo": {f"x{k}": k for k in range(9)}} if i == 2 else {}
    folder = tmp_path / f"run{i}"
    write_run(folder, 0.1, 0.2, {"ppo": ppo_section(folder, i, **changes)})
  with pytest.raises(cli.UserError) as error:
    seeds.find_runs(str(tmp_path / "run*"))
  message = str(error.value)
  assert "run2 (given)" in message and "run0 (saved)" in message
  assert "ppo.ppo.kl_coef: saved 0.1, given nothing" in message
  assert "and 5 more" in message and "seed:" not in message


def test_a_run_without_its_config_is_refused(tmp_path):
  for i in range(2):
    write_run(tmp_path / f"run{i}", 0.1, 0.2)
  (tmp_path / "run1" / "config.json").unlink()
  with pytest.raises(cli.UserError, match="run1 holds no config.json"):
    seeds.find_runs(str(tmp_path / "run*"))


def test_plot_is_drawn(tmp_path):
  for i in range(2):
    write_run(tmp_path / f"run{i}", 0.1, 0.2)
  path = tmp_path / "plot.png"
  seeds.plot(seeds.find_runs(str(tmp_path / "run*")), str(path))
  assert path.read_bytes().startswith(b"\x89PNG")
