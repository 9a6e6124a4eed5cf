"""The whole pipeline end to end, as users run it and as they get it wrong."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
from ml_collections import ConfigDict
import numpy as np
import pytest

from experiments import ppo, preferences, pretrain, reward, rlhf, sft
from experiments.harness import cli, models
from experiments.harness.config import ConfigError, from_config
from rlhf_jax import checkpoint
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import functions
from rlhf_jax.updates import reward as reward_update
from tests.experiments import tiny

STAGES = ("pretrain", "sft", "preferences", "reward", "ppo", "evaluate")


def run_stage(module, settings: ConfigDict, workdir) -> None:
  module.run(from_config(module.Config, settings), str(workdir))


def told(capsys, call) -> str:
  """The one message with which a program ends on what its user can mend."""
  capsys.readouterr()
  with pytest.raises(SystemExit) as ended, cli.told_errors():
    call()
  assert ended.value.code == 1
  message = capsys.readouterr().err
  assert message.count("\nerror: ") == 1
  return message.partition("\nerror: ")[2]


def write_prompts(path: pathlib.Path, num: int, bad: int = 0) -> str:
  rows = [{"prompt": f"What color is number {i}?\n"} for i in range(num)]
  path.write_text(
      "".join(json.dumps(row) + "\n" for row in rows) + "{not json\n" * bad
  )
  return str(path)


# ---- A finished run ----------------------------------------------------------


def test_every_stage_leaves_what_the_next_one_reads(finished_run):
  for name in STAGES:
    folder = finished_run / name
    for file in ("config.json", "versions.json", "finished.json"):
      assert json.loads((folder / file).read_text()), f"{name}/{file}"
    assert not list(folder.rglob("*.writing"))
  for name in ("pretrain", "sft", "reward", "ppo"):
    assert (finished_run / name / "model").is_dir()
    assert (finished_run / name / "tokenizer").is_dir()
  versions = json.loads((finished_run / "versions.json").read_text())
  assert {"python", "jax", "commit", "device", "command"} <= versions.keys()
  # The whole run has the mark of a stage: it is done.
  finished = json.loads((finished_run / "finished.json").read_text())
  assert finished == {"stages": list(STAGES)}


def test_every_stage_measures_under_its_own_name(finished_run):
  for name in ("pretrain", "sft", "reward", "ppo"):
    rows = tiny.read_jsonl(finished_run / name / "metrics.jsonl")
    names = {key for row in rows for key in row}
    prefixes = {key.split("/")[0] for key in names - {"step"}}
    assert prefixes == {name, "eval", "nonfinite", "optimizer"}
    assert all(row["nonfinite/steps"] == 0 for row in rows if len(row) > 9)
  ppo_rows = tiny.read_jsonl(finished_run / "ppo" / "metrics.jsonl")
  names = {key for row in ppo_rows for key in row}
  assert {
      "ppo/score",
      "ppo/kl",
      "ppo/kl_k3",
      "ppo/kl_exact",
      "ppo/kl_coef",
      "ppo/entropy",
      "ppo/completion_length",
      "ppo/ended",
      "ppo/policy_loss",
      "ppo/value_loss",
      "ppo/clip_fraction",
      "ppo/explained_variance",
      "eval/true_reward",
      "eval/score",
      "eval/kl",
      "eval/completion_length",
      "eval/flattery",
  } <= names
  first = ppo_rows[1]
  # The first ratio is 1, and the reference policy is where the policy starts.
  assert first["ppo/first_ratio_gap"] < 1e-5
  assert abs(first["ppo/kl_exact"]) < 1e-4
  assert first["ppo/rollout_logprob_gap"] < 1e-4


def test_every_metric_is_explained_in_one_line(finished_run):
  text = (tiny.REPO / "CONTRIBUTING.md").read_text()
  section = text.partition("\n## Metrics\n")[2].partition("\n## ")[0]
  explained = [
      name
      for line in section.splitlines()
      if line.startswith("| `")
      for name in re.findall("`([^`]+)`", line.split("|")[1])
  ]
  written = {
      name
      for file in ("metrics.jsonl", "timing.jsonl")
      for path in finished_run.glob(f"*/{file}")
      for row in tiny.read_jsonl(path)
      for name in row
  }
  evaluation = json.loads(
      (finished_run / "evaluate" / "evaluation.json").read_text()
  )
  for numbers in evaluation["policies"].values():
    measured = numbers.keys() - {"families", "parts"}
    written |= {
        name if name == "distinct_2" else f"eval/{name}" for name in measured
    }
  assert len(written) > 40
  times = {name: explained.count(name) for name in written - {"step"}}
  assert {name: n for name, n in times.items() if n != 1} == {}


@pytest.mark.parametrize("name", ["pretrain", "sft", "ppo"])
def test_samples_of_the_same_prompts_can_be_followed_over_time(
    finished_run, name
):
  rows = tiny.read_jsonl(finished_run / name / "samples.jsonl")
  by_step = {}
  for row in rows:
    by_step.setdefault(row["step"], []).append(row)
  # Before the first step, and at the last evaluation.
  assert list(by_step) == [0, 2]
  first, last = by_step.values()
  prompts = [row["prompt"] for row in first]
  assert len(prompts) == len(set(prompts)) == (2 if name == "ppo" else 4)
  assert [row["prompt"] for row in last] == prompts
  for row in rows:
    assert row["prompt"].strip() and isinstance(row["completion"], str)
    assert 1 <= row["completion_length"] <= tiny.COMPLETION_LENGTH
    if name == "ppo":
      assert {"score", "true_reward", "kl"} <= row.keys()
  assert any(row["completion"] for row in rows)
  # They are the policy's of their own step: at first it is its reference.
  if name == "ppo":
    assert max(abs(row["kl"]) for row in first) < 1e-6
    assert min(row["kl"] for row in last) > 1e-5


def test_missing_eos_penalty_is_what_a_run_trains_on(finished_run):
  rows = tiny.read_jsonl(finished_run / "ppo" / "metrics.jsonl")
  # Iterations in which no completion ended, as tiny ones seldom do.
  rows = [row for row in rows if row.get("ppo/ended") == 0]
  assert rows
  for row in rows:
    assert row["ppo/score_after_eos_rule"] == -1 != row["ppo/score"]
    np.testing.assert_allclose(
        row["ppo/reward_sum"],
        -1 - row["ppo/kl_coef"] * row["ppo/kl"],
        rtol=1e-5,
    )


def test_the_report_needs_nothing_beside_itself(finished_run):
  page = (finished_run / "report.html").read_text()
  assert "<script" not in page and "<link" not in page
  for attribute in re.findall(r'(?:src|srcset|data|poster)="([^"]*)"', page):
    assert attribute.startswith("data:"), attribute[:80]
  for address in re.findall(r'url\(([^)]*)\)', page):
    assert address.strip("'\"").startswith(("data:", "#")), address[:80]
  assert "@import" not in page
  for word in ("sft", "ppo", "reward", "commit", "kl_coef"):
    assert word in page.lower()


def test_the_reward_models_scores_are_normalised(finished_run):
  extra = json.loads(
      (finished_run / "reward" / "model" / "checkpoint.json").read_text()
  )["contents"]["extra"]
  assert extra["kind"] == "reward_model"
  assert np.isfinite(extra["gain"]) and extra["gain"] > 0


def test_preferences_count_what_was_left_out(finished_run):
  folder = finished_run / "preferences"
  summary = json.loads((folder / "finished.json").read_text())
  for split in ("train", "heldout"):
    rows = tiny.read_jsonl(folder / f"{split}_comparisons.jsonl")
    assert summary[split]["num_records"] == len(rows) > 0
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert sum(summary[split]["by_annotator"].values()) == len(rows)


def _contents(run: pathlib.Path) -> dict[str, tuple[int, int]]:
  return {
      str(path.relative_to(run)): (path.stat().st_mtime_ns, path.stat().st_size)
      for path in run.rglob("*")
      if path.is_file() and path.name != "report.html"
  }


def test_a_second_run_does_nothing_again(finished_run, capsys):
  before = _contents(finished_run)
  tiny.run_pipeline(finished_run)
  assert _contents(finished_run) == before
  # It still tells the outcome.
  assert "True reward" in capsys.readouterr().out


def test_a_moved_run_goes_on_where_it_is_now(finished_run, tmp_path):
  moved = tmp_path / "elsewhere" / "run"
  shutil.copytree(finished_run, moved)
  shutil.rmtree(moved / "evaluate")
  tiny.run_pipeline(moved)
  found, wanted = (
      (run / "evaluate" / "completions.jsonl").read_text()
      for run in (moved, finished_run)
  )
  assert found == wanted
  texts = [path.read_text() for path in moved.glob("*/config.json")]
  assert any("@run/sft" in text for text in texts)
  assert not any(str(tmp_path) in text for text in texts)


def test_another_config_is_refused_with_its_stage(finished_run, capsys):
  settings = tiny.pipeline()
  settings.ppo.ppo.kl_coef = 0.7
  message = told(
      capsys, lambda: run_stage(rlhf, settings, finished_run)
  )
  assert re.search(r"ppo\.ppo\.kl_coef: saved 0\.\d+, given 0\.7", message)


# ---- Where it starts ---------------------------------------------------------


def test_start_at_passes_over_what_is_before(finished_run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished_run, workdir)
  # As if these had been made elsewhere: no finished.json, nothing to resume.
  for name in ("pretrain", "sft"):
    (workdir / name / "finished.json").unlink()
    shutil.rmtree(workdir / name / "checkpoints")
  shutil.rmtree(workdir / "evaluate")
  tiny.run_pipeline(workdir, start_at="evaluate")
  assert (workdir / "evaluate" / "finished.json").exists()
  assert not (workdir / "pretrain" / "checkpoints").exists()
  found, wanted = (
      (run / "evaluate" / "completions.jsonl").read_text()
      for run in (workdir, finished_run)
  )
  assert found == wanted


def test_another_run_is_reused_as_far_as_it_would_be_repeated(
    finished_run, tmp_path, capsys
):
  settings = tiny.pipeline()
  settings.ppo.ppo.kl_coef = 0.7
  config = from_config(rlhf.Config, settings)
  workdir = tmp_path / "run"
  before = _contents(finished_run)
  for _ in range(2):  # the second time, everything is there
    rlhf.run(config, str(workdir), reuse=str(finished_run))
    assert "PPO" in capsys.readouterr().out
    links = [x.name for x in sorted(workdir.iterdir()) if x.is_symlink()]
    assert links == ["preferences", "pretrain", "reward", "sft"]
  assert _contents(finished_run) == before
  rows = tiny.read_jsonl(workdir / "ppo" / "metrics.jsonl")
  coef = [row["ppo/kl_coef"] for row in rows if "ppo/kl_coef" in row]
  np.testing.assert_allclose(coef[0], 0.7, rtol=0.1)
  message = told(
      capsys, lambda: rlhf.run(config, str(workdir), reuse="nosuch")
  )
  assert "--reuse=nosuch: no such run" in message


def test_starting_too_late_names_what_is_missing(tmp_path, capsys):
  workdir = tmp_path / "run"
  message = told(capsys, lambda: tiny.run_pipeline(workdir, start_at="ppo"))
  assert f"{workdir}/sft holds no finished model" in message
  message = told(capsys, lambda: tiny.run_pipeline(workdir, start_at="pppo"))
  assert "--start_at='pppo' is none of pretrain, sft" in message


def test_a_stage_that_is_none_is_left_out(finished_run, tmp_path):
  settings = tiny.pipeline()
  settings = ConfigDict(tiny.in_run(settings.to_dict(), finished_run))
  for name in STAGES[:5]:
    with settings.ignore_type():
      settings[name] = None
  run_stage(rlhf, settings, tmp_path / "run")
  assert sorted(x.name for x in (tmp_path / "run").iterdir() if x.is_dir()) == [
      "evaluate"
  ]
  assert (tmp_path / "run" / "report.html").exists()


# ---- Sampling in the terminal ------------------------------------------------


def test_sample_shows_policies_side_by_side(finished_run):
  places = ",".join(str(finished_run / name) for name in ("sft", "ppo"))
  done = tiny.sample(
      f"--policies={places}",
      "--prompts=What color is grass?\\n",
      "--prompts=Hello!",
      "--max_completion_length=8",
  )
  assert done.returncode == 0, done.stderr
  shown = done.stdout
  assert shown.count("=" * 100) == 2
  assert "What color is grass?" in shown and "Hello!" in shown
  assert " | [" in shown


def test_sample_names_what_is_no_policy(finished_run):
  done = tiny.sample(f"--policies={finished_run}/preferences")
  tiny.assert_one_message(done, "preferences holds no finished model")


# ---- Variants, one tiny step each --------------------------------------------


def one_ppo_step(run, workdir, **changes) -> dict[str, float]:
  settings = tiny.stage("ppo", run)
  settings.loop.update(tiny.loop(1))
  settings.heldout_prompts.limit = 4
  for name, value in changes.items():
    section = settings
    *path, last = name.split("__")
    for part in path:
      section = section[part]
    section[last] = value
  run_stage(ppo, settings, workdir)
  rows = tiny.read_jsonl(workdir / "metrics.jsonl")
  numbers = {k: v for row in rows for k, v in row.items()}
  assert numbers["nonfinite/steps"] == 0
  assert numbers["ppo/first_ratio_gap"] < 1e-5
  assert all(np.isfinite(v) for v in numbers.values())
  before = tiny.model_arrays(run / "sft")
  after = tiny.model_arrays(workdir)
  assert any((after[k] != before[k]).any() for k in after)
  return numbers


def test_what_is_saved_of_a_bad_iteration_holds_the_ptx_batch(
    finished_run, tmp_path
):
  text = tmp_path / "text.txt"
  text.write_text("\n\n".join(f"Grass is green, day {i}." for i in range(200)))
  settings = tiny.stage("ppo", finished_run)
  settings.loop.update(tiny.loop(1), max_nonfinite_steps=9)
  settings.heldout_prompts.limit = 4
  settings.ppo.vf_coef = 3e38  # whose product with the loss is infinite
  settings.update(ptx_batch_size=8, ptx_seq_len=32)
  settings.ptx_documents.source = f"text:{text}"
  settings.ppo.update(ptx_coef=0.5, num_epochs=1)
  run_stage(ppo, settings, tmp_path / "ppo")
  saved = np.load(tmp_path / "ppo" / "nonfinite" / "step_1.npz")
  assert saved["ptx.tokens"].shape == (8, 32)
  assert saved["scored.rollout.prompts"].shape == (8, tiny.PROMPT_LENGTH)
  after, before = (
      tiny.model_arrays(x) for x in (tmp_path / "ppo", finished_run / "sft")
  )
  tiny.assert_bitwise(after, before)


def test_ppo_with_ptx_minibatches_and_devices(finished_run, tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("\n\n".join(f"Grass is green, day {i}." for i in range(200)))
  numbers = one_ppo_step(
      finished_run,
      tmp_path / "ppo",
      ptx_documents__source=f"text:{text}",
      ptx_batch_size=8,
      ptx_seq_len=32,
      ppo__ptx_coef=0.5,
      ppo__num_minibatches=2,
      ppo__num_microbatches=2,
      mesh__data=2,
      value_init="policy",
      ppo__kl_estimator="exact",
      ppo__whiten_rewards=True,
  )
  assert 0 < numbers["ppo/ptx_loss"] < 20


def test_ppo_with_a_shared_value_network(finished_run, tmp_path):
  numbers = one_ppo_step(
      finished_run,
      tmp_path / "ppo",
      value_network="shared",
      value_init="zero",
      optimizer__epsilon_placement="tf",
      ppo__max_update_kl=1e-9,
      ref_policy=str(finished_run / "pretrain"),
  )
  # A head of zeros says 0 before it learns.
  assert numbers["ppo/value"] == 0
  # The reference is not where the policy starts.
  assert numbers["ppo/kl_exact"] > 1e-6
  assert numbers["ppo/stopped_early"] == 1


def test_ppo_trains_on_draws_from_the_whole_distribution_however_it_is_judged(
    finished_run, tmp_path
):
  # What is drawn from less has a KL and ratios that mean nothing.
  cuts = {
      "whole": {},
      "likeliest": dict(samples__greedy=True),
      "cut": dict(samples__top_k=2, samples__top_p=0.5),
  }
  numbers, params, samples = {}, {}, {}
  for name, changes in cuts.items():
    folder = tmp_path / name
    found = one_ppo_step(finished_run, folder, **changes)
    numbers[name] = {k: v for k, v in found.items() if k.startswith("ppo/")}
    params[name] = tiny.model_arrays(folder)
    rows = tiny.read_jsonl(folder / "samples.jsonl")
    samples[name] = [row["completion"] for row in rows]
  for name in ("likeliest", "cut"):
    assert numbers[name] == numbers["whole"]
    tiny.assert_bitwise(params[name], params["whole"])
    assert samples[name] != samples["whole"]


def count_digits(prompt: str, completion: str) -> float:
  """A rule that the test below names by module and function."""
  del prompt
  return float(sum(x.isdigit() for x in completion))


def test_ppo_with_a_users_own_reward_rule_and_no_reward_model(
    finished_run, tmp_path
):
  numbers = one_ppo_step(
      finished_run,
      tmp_path / "ppo",
      reward_model="",
      reward_rule=f"{__name__}:count_digits",
      value_init="zero",
  )
  samples = tiny.read_jsonl(tmp_path / "ppo" / "samples.jsonl")
  assert all(
      row["score"] == count_digits(row["prompt"], row["completion"])
      for row in samples
  )
  # The mean of whole numbers over eight episodes.
  assert numbers["ppo/score"] >= 0 and numbers["ppo/score"] * 8 % 1 == 0


def test_ppo_with_a_reward_model_of_another_tokenizer(finished_run, tmp_path):
  model = models.load_reward_model(str(finished_run / "reward"))
  policy = models.load_policy(str(finished_run / "sft"))
  other = Tokenizer.train_byte_level_bpe(
      ["What color is grass? Grass is green."] * 9, tiny.VOCAB_SIZE
  )
  text = "What color is grass?"
  assert other.encode(text) != policy.tokenizer.encode(text)
  models.save_reward_model(
      tmp_path / "reward", dataclasses.replace(model, tokenizer=other)
  )
  one_ppo_step(
      finished_run,
      tmp_path / "ppo",
      reward_model=str(tmp_path / "reward"),
      value_init="policy",
  )
  score = jax.jit(functions.make_score_fn(model.config))
  samples = tiny.read_jsonl(tmp_path / "ppo" / "samples.jsonl")
  for row in samples:
    ids = [other.bos_id, *other.encode(row["prompt"])]
    ids += other.encode(row["completion"], continues=True)
    ids += [other.eos_id] if row["ended"] else []
    tokens = np.zeros((1, tiny.MAX_LENGTH), np.int32)
    tokens[0, : len(ids)] = ids
    mask = (np.arange(tiny.MAX_LENGTH) < len(ids))[None].astype(np.int32)
    raw = float(score(model.params, tokens, mask)[0])
    expected = model.normalization.gain * raw + model.normalization.bias
    np.testing.assert_allclose(row["score"], expected, rtol=1e-4, atol=1e-4)
  assert len({row["score"] for row in samples}) > 1


def test_a_reward_rule_that_is_not_there_is_named(finished_run, tmp_path):
  with pytest.raises(ConfigError, match="'math:no_such' is not"):
    one_ppo_step(
        finished_run,
        tmp_path / "ppo",
        reward_model="",
        reward_rule="math:no_such",
        value_init="zero",
    )


def no_score(prompt: str, completion: str) -> float:
  """A rule that breaks its promise of a finite number."""
  del prompt, completion
  return float("nan")


@pytest.mark.parametrize("rule, part", [
    (f"{__name__}:no_score", "the reward rule gave nan for the completion"),
    ("math:pi", "3.14159"),
])
def test_a_reward_rule_that_gives_no_score_is_told(
    finished_run, tmp_path, capsys, rule, part
):
  changes = dict(reward_model="", reward_rule=rule, value_init="zero")
  message = told(
      capsys, lambda: one_ppo_step(finished_run, tmp_path / "ppo", **changes)
  )
  assert part in message


def test_a_reward_model_that_scores_all_alike_is_told(
    finished_run, tmp_path, capsys, monkeypatch
):
  settings = tiny.stage("reward", finished_run)
  settings.loop.update(tiny.loop(1))
  fit = reward_update.fit_score_normalization
  monkeypatch.setattr(
      reward_update, "fit_score_normalization", lambda score: fit(0 * score)
  )
  message = told(
      capsys, lambda: run_stage(reward, settings, tmp_path / "reward")
  )
  assert "has not learnt to tell them apart" in message


def test_sample_reads_a_checkpoint_of_a_stage(finished_run):
  step = max((finished_run / "ppo" / "checkpoints").glob("step_*")).name
  number = int(step.removeprefix("step_"))
  last = models.load_policy(f"{finished_run}/ppo@last")
  same = models.load_policy(f"{finished_run}/ppo@{number}")
  final = models.load_policy(f"{finished_run}/ppo")
  for a, b, c in zip(
      *(jax.tree.leaves(x.params) for x in (last, same, final)), strict=True
  ):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
  with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of step"):
    models.load_policy(f"{finished_run}/ppo@{number + 1}")


def test_a_reward_model_from_rankings(finished_run, tmp_path):
  settings = tiny.stage("preferences", finished_run)
  settings.kind = "ranking"
  run_stage(preferences, settings, tmp_path / "preferences")
  rows = tiny.read_jsonl(tmp_path / "preferences" / "train_rankings.jsonl")
  assert rows and all(len(row["completions"]) <= 4 for row in rows)

  settings = tiny.stage("reward", finished_run)
  for name, split in (("comparisons", "train"), ("heldout", "heldout")):
    settings[name].source = f"{tmp_path}/preferences/{split}_rankings.jsonl"
  settings.loop.update(tiny.loop(1))
  settings.batch_size = 8
  # Normalised on the held-out completions: no policy is sampled.
  settings.ref_policy = ""
  run_stage(reward, settings, tmp_path / "reward")
  report = json.loads((tmp_path / "reward" / "calibration.json").read_text())
  assert report["num_pairs"] > 0 and report["ceiling"] is None
  assert 0 <= report["accuracy"]["mean"] <= 1


# ---- What users get wrong ----------------------------------------------------


def test_missing_init_from_is_named(finished_run, tmp_path, capsys):
  settings = tiny.stage("sft", finished_run)
  settings.init_from = str(tmp_path / "nothing")
  message = told(capsys, lambda: run_stage(sft, settings, tmp_path / "sft"))
  assert f"{tmp_path}/nothing holds no finished model" in message


def test_missing_environment_variable_is_named(
    finished_run, tmp_path, capsys, monkeypatch
):
  monkeypatch.delenv("RLHF_JAX_DATA", raising=False)
  settings = tiny.stage("sft", finished_run)
  settings.demonstrations.source = "stories:${RLHF_JAX_DATA}/stories.txt"
  settings.demonstrations.limit = 0
  message = told(capsys, lambda: run_stage(sft, settings, tmp_path / "sft"))
  assert "the environment variable RLHF_JAX_DATA is not set" in message


def _told_by_preferences(run, tmp_path, capsys, source, **changes) -> str:
  settings = tiny.stage("preferences", run)
  for prompts in (settings.prompts, settings.heldout_prompts):
    prompts.update(source=source, limit=0, **changes)
  return told(
      capsys, lambda: run_stage(preferences, settings, tmp_path / "out")
  )


def test_empty_prompts_file_is_named(finished_run, tmp_path, capsys):
  path = write_prompts(tmp_path / "prompts.jsonl", 0)
  message = _told_by_preferences(finished_run, tmp_path, capsys, path)
  assert f"{path}: holds no records" in message


def test_malformed_line_is_named(finished_run, tmp_path, capsys):
  path = write_prompts(tmp_path / "prompts.jsonl", 3, bad=1)
  message = _told_by_preferences(finished_run, tmp_path, capsys, path)
  assert f"{path}:4: not JSON" in message


def test_too_many_malformed_lines_are_an_error(finished_run, tmp_path, capsys):
  path = write_prompts(tmp_path / "prompts.jsonl", 18, bad=2)
  message = _told_by_preferences(
      finished_run, tmp_path, capsys, path, on_error="skip"
  )
  assert "2 of 20 records skipped" in message and "5.0%" in message
  assert len(list((tmp_path / "out" / "skipped").iterdir())) == 1


def test_few_malformed_lines_are_written_down(finished_run, tmp_path, capsys):
  path = write_prompts(tmp_path / "prompts.jsonl", 20, bad=1)
  message = _told_by_preferences(
      finished_run, tmp_path, capsys, path, on_error="skip"
  )
  # That line was no reason to stop, but the simulated annotators can only
  # tell what answers their own domain's requests.
  assert "world:assistant judges its own requests alone" in message
  assert "'What color is number 0?\\n'" in message
  (skipped,) = (tmp_path / "out" / "skipped").iterdir()
  (row,) = tiny.read_jsonl(skipped)
  assert row["line"] == 21 and row["text"] == "{not json"


def test_too_long_a_prompt_is_an_error_with_its_length(
    finished_run, tmp_path, capsys
):
  path = tmp_path / "prompts.jsonl"
  # Of origins of their own, so that they can be divided.
  rows = [{"prompt": f"{i} " + "word " * 200} for i in range(20)]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  settings = tiny.stage("sft", finished_run)
  settings.train.sample_prompts.update(source=str(path), limit=0)
  message = told(capsys, lambda: run_stage(sft, settings, tmp_path / "sft"))
  assert f"max_prompt_length={tiny.PROMPT_LENGTH}" in message
  assert re.search(r"record 0: its prompt has \d{3} tokens", message)


def test_lengths_that_no_model_holds_are_an_error(
    finished_run, tmp_path, capsys
):
  settings = tiny.stage("ppo", finished_run)
  settings.samples.max_completion_length = tiny.MAX_LENGTH
  message = told(capsys, lambda: run_stage(ppo, settings, tmp_path / "ppo"))
  assert f"does not fit the policy's max_length={tiny.MAX_LENGTH}" in message


@pytest.mark.parametrize("name", ["reward", "ppo"])
def test_no_room_for_the_end_token_that_is_scored_is_an_error(
    finished_run, tmp_path, capsys, name
):
  settings = tiny.stage(name, finished_run)
  settings.samples.max_completion_length = tiny.MAX_LENGTH - tiny.PROMPT_LENGTH
  if name == "ppo":
    settings.value_init = "zero"
  run = lambda: run_stage(
      {"reward": reward, "ppo": ppo}[name], settings, tmp_path / name
  )
  message = told(capsys, run)
  assert f"+ 1 (an end token) = {tiny.MAX_LENGTH + 1} does not fit" in message
  assert not (tmp_path / name / "metrics.jsonl").exists()


@pytest.mark.parametrize("change, part", [
    (lambda c: c.update(ref_policy="no/such"), "no/such holds no finished"),
    (
        lambda c: c.normalize_on.update(source="no/such.jsonl"),
        "no/such.jsonl: no such file",
    ),
    (lambda c: c.samples.update(max_prompt_length=1), "max_prompt_length=1,"),
    (lambda c: c.samples.update(stop_tokens=("no one",)), "stop_tokens"),
])
def test_what_normalises_the_score_is_read_before_the_training(
    finished_run, tmp_path, capsys, change, part
):
  settings = tiny.stage("reward", finished_run)
  change(settings)
  message = told(
      capsys, lambda: run_stage(reward, settings, tmp_path / "reward")
  )
  assert part in message
  assert not (tmp_path / "reward" / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["comparison", "ranking"])
def test_a_policy_that_always_says_the_same_is_told(
    finished_run, tmp_path, capsys, kind
):
  settings = tiny.stage("preferences", finished_run)
  settings.kind = kind
  settings.samples.temperature = 1e-6
  message = told(
      capsys, lambda: run_stage(preferences, settings, tmp_path / "out")
  )
  assert f"train: of the completions of 16 prompts no {kind}" in message
  assert "all the same" in message and "1e-06" in message
  assert not (tmp_path / "out" / f"train_{kind}s.jsonl").exists()


def test_fewer_rows_than_a_batch_is_an_error(finished_run, tmp_path, capsys):
  settings = tiny.stage("ppo", finished_run)
  settings.rollout_batch_size = 64
  message = told(capsys, lambda: run_stage(ppo, settings, tmp_path / "ppo"))
  assert "batch_size=64 does not fit 16 rows" in message


def test_more_devices_than_there_are_is_an_error(
    finished_run, tmp_path, capsys
):
  settings = tiny.stage("sft", finished_run)
  settings.train.mesh.data = 4096
  settings.train.batch_size = 4096
  message = told(capsys, lambda: run_stage(sft, settings, tmp_path / "sft"))
  assert "mesh {data: 4096} has 4096 devices, and there are 8" in message


def test_a_tokenizer_of_another_size_is_an_error(tmp_path, capsys):
  """A corpus too small for the vocabulary asked for."""
  settings = tiny.pipeline().pretrain
  settings.documents.limit = 3
  settings.tokenizer.vocab_size = settings.model.vocab_size = 5_000
  message = told(
      capsys, lambda: run_stage(pretrain, settings, tmp_path / "pretrain")
  )
  assert "5000" in message


def test_all_that_a_run_lacks_is_told_before_it_starts(
    tmp_path, capsys, monkeypatch
):
  monkeypatch.delenv("RLHF_JAX_DATA", raising=False)
  settings = tiny.pipeline()
  settings.pretrain.tokenizer.path = "no/tokenizer"
  settings.pretrain.documents.source = "text:${RLHF_JAX_DATA}/stories.txt"
  settings.sft.init_from = "no/policy"
  settings.sft.demonstrations.source = "no/demonstrations.jsonl"
  settings.preferences.prompts.source = "no/*.jsonl"
  settings.reward.ref_policy = "llama2c:no/model.bin:no/tokenizer.model"
  settings.reward.heldout.source = "polarity:no/sentences.zip:0"
  settings.ppo.update(
      reward_model="", reward_rule="math:pi", value_init="zero"
  )
  settings.ppo.judge = "reward_model:no/judge"
  settings.evaluate.policies += ("other=no/other@last",)
  settings.evaluate.reward_model = "no/reward"
  workdir = tmp_path / "run"
  message = told(capsys, lambda: run_stage(rlhf, settings, workdir))
  lines = message.strip().splitlines()[1:]
  wanted = [
      ("pretrain.documents.source", "RLHF_JAX_DATA is not set"),
      ("pretrain.tokenizer.path", "no/tokenizer"),
      ("sft.init_from", "no/policy"),
      ("sft.demonstrations.source", "no/demonstrations.jsonl"),
      ("preferences.prompts.source", "no/*.jsonl"),
      ("reward.ref_policy", "no/model.bin"),
      ("reward.heldout.source", "no/sentences.zip"),
      ("ppo.reward_rule", "3.14159"),
      ("ppo.judge", "no/judge"),
      ("evaluate.policies[other]", "no/other"),
      ("evaluate.reward_model", "no/reward"),
  ]
  for line, (field, part) in zip(lines, wanted, strict=True):
    assert line.startswith(f"  {field}: ") and part in line
  assert not workdir.exists()


def test_a_passed_over_or_finished_stage_needs_no_input(tmp_path, capsys):
  settings = tiny.pipeline()
  settings.sft.demonstrations.source = "no/demonstrations.jsonl"
  settings.evaluate.reward_model = "no/reward"
  config = from_config(rlhf.Config, settings)
  workdir = tmp_path / "run"
  message = told(
      capsys, lambda: rlhf.run(config, str(workdir), start_at="reward")
  )
  assert "no/reward" in message and "no/demonstrations" not in message
  (workdir / "evaluate").mkdir(parents=True)
  (workdir / "evaluate" / "finished.json").write_text("{}")
  message = told(capsys, lambda: rlhf.run(config, str(workdir)))
  assert "no/demonstrations" in message and "no/reward" not in message


# ---- As a process ------------------------------------------------------------


def test_flags_of_a_binary(finished_run, tmp_path):
  path = tiny.write_config(
      tmp_path / "config.py", tiny.stage("sft", finished_run)
  )
  done = tiny.call(
      "sft",
      path,
      tmp_path / "sft",
      "--config.train.loop.num_steps=0",
      "--config.train.batch_size=10",
      "--config.train.mesh.data=4",
  )
  tiny.assert_one_message(done, "num_steps must be at least 1")
  # Nothing was begun.
  assert not (tmp_path / "sft").exists()
