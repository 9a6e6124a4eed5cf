"""The evaluator: the same rows whatever the batch size, and honest numbers."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from experiments import evaluate
from experiments.harness import evaluator, models, sources
from experiments.harness.config import ConfigError, from_config
from experiments.harness.reference import Reference
from rlhf_jax.rewards.episodes import Episodes
from tests.experiments import tiny


@pytest.fixture(scope="module")
def policy(finished_run):
  return models.load_policy(str(finished_run / "sft"))


@pytest.fixture(scope="module")
def prompts(policy):
  reader = sources.Reader(0, None)
  cfg = sources.SourceConfig(source=sources.ASSISTANT, limit=7)
  return evaluator.encode_prompts(
      reader.prompts(cfg, "heldout"), policy.tokenizer, sample_config()
  )


def sample_config(**changes):
  fields = dict(
      max_prompt_length=tiny.PROMPT_LENGTH,
      max_completion_length=tiny.COMPLETION_LENGTH,
      temperature=0.7,
      greedy=False,
      top_k=0,
      top_p=1.0,
      stop_tokens=(),
      stop_after=0,
      too_long="error",
      num_slots=0,
      num_cache_buckets=1,
      rollout_weights="compute",
  )
  return evaluator.SampleConfig(**fields | changes)


def make_evaluator(
    policy, prompts, *, seed=0, batch_size=7, samples=None, **kwargs
):
  return evaluator.Evaluator(
      policy.config,
      policy.tokenizer,
      prompts,
      sample_config(**(samples or {})),
      seed=seed,
      batch_size=batch_size,
      **kwargs,
  )


def test_what_only_rollouts_or_speed_depend_on_changes_no_row(
    policy, prompts, finished_run
):
  reward_model = models.load_reward_model(str(finished_run / "reward"))
  rows = [
      make_evaluator(
          policy,
          prompts,
          **sizes,
          judge=evaluator.make_judge(sources.ASSISTANT),
          reward_fn=evaluator.make_reward_fn(reward_model),
      ).rows(policy.params)
      for sizes in (
          {},
          {"batch_size": 3},
          {"samples": {"num_slots": 2}},
          {"samples": {"num_cache_buckets": 3}},
          # Which PPO's rollouts alone have.
          {"samples": {"rollout_weights": "int8"}},
      )
  ]
  assert [len(x) for x in rows] == [7] * 5
  for whole, *others in zip(*rows):
    score = whole.pop("score")
    for row in others:
      np.testing.assert_allclose(row.pop("score"), score, rtol=1e-4, atol=1e-5)
      assert row == whole


@pytest.mark.parametrize("sizes", [{}, {"num_slots": 4}])
def test_completions_of_a_prompt_are_those_of_its_repetitions(
    policy, prompts, sizes
):
  """In batches of 2 prompts (7 completions hold no third), and in slots."""
  make = lambda *args, **fields: evaluator.make_sampler(
      policy.config, policy.tokenizer, sample_config(**fields), *args
  )
  rng = jax.random.key(0)
  together = make(7, 3, **sizes)(policy.params, prompts, rng)
  repeated = jax.tree.map(lambda x: np.repeat(x, 3, axis=0), prompts)
  apart = make(21)(policy.params, repeated, rng)
  np.testing.assert_allclose(together.logprobs, apart.logprobs, atol=1e-4)
  for name in ("prompts", "completions", "completion_mask", "ended"):
    np.testing.assert_array_equal(getattr(together, name), getattr(apart, name))


def test_a_seed_gives_the_same_rows_and_another_gives_others(policy, prompts):
  sampler = make_evaluator(policy, prompts)
  first = sampler.rows(policy.params)
  assert sampler.rows(policy.params) == first
  assert make_evaluator(policy, prompts).rows(policy.params) == first
  other = make_evaluator(policy, prompts, seed=1).rows(policy.params)
  texts = lambda rows: [row["completion"] for row in rows]
  assert texts(other) != texts(first)


def reference_evaluator(policy, prompts):
  return make_evaluator(policy, prompts, reference=Reference(policy))


def test_kl_of_a_policy_from_itself_is_zero_and_of_another_is_not(
    policy, prompts
):
  rows = reference_evaluator(policy, prompts).rows(policy.params)
  assert max(abs(row["kl"]) for row in rows) < 1e-4
  moved = jax.tree.map(lambda x: x * np.float32(1.5), policy.params)
  rows = reference_evaluator(policy, prompts).rows(moved)
  # Exact over the vocabulary, so it is never negative.
  assert min(row["kl"] for row in rows) > 1e-3


def test_a_reward_model_as_judge_says_what_it_scores(
    policy, prompts, finished_run
):
  place = str(finished_run / "reward")
  score = evaluator.make_reward_fn(models.load_reward_model(place))
  rows = make_evaluator(
      policy,
      prompts,
      judge=evaluator.make_judge(f"reward_model:{place}"),
      reward_fn=score,
  ).rows(policy.params)
  for row in rows:
    assert row["true_reward"] == row["score"]
    assert "family" not in row


def test_a_judge_that_nobody_knows_is_refused():
  assert evaluator.make_judge("") is None
  with pytest.raises(ValueError, match="judge 'world:assistent' is neither"):
    evaluator.make_judge("world:assistent")
  with pytest.raises(FileNotFoundError, match="holds no finished model"):
    evaluator.make_judge("reward_model:/nowhere")


def test_a_policy_is_no_reward_model(finished_run):
  with pytest.raises(FileNotFoundError, match="holds a policy, and a reward"):
    models.load_reward_model(str(finished_run / "sft"))
  with pytest.raises(FileNotFoundError, match="holds a reward_model, and a"):
    models.load_policy(str(finished_run / "reward"))


def test_averages_are_means_of_what_the_rows_have():
  rows = [
      {"score": 1.0, "ended": True, "prompt": "a"},
      {"score": 2.0, "ended": False, "prompt": "b"},
  ]
  assert evaluator.averages(rows) == {"eval/score": 1.5, "eval/ended": 0.5}


def test_stop_texts_are_one_token_each(policy):
  sampling = sample_config(stop_tokens=(".",)).sampling(policy.tokenizer)
  assert len(sampling.stop_ids) == 1
  with pytest.raises(ConfigError, match="'no such token' is .* tokens"):
    sample_config(stop_tokens=("no such token",)).sampling(policy.tokenizer)


def test_every_policy_is_judged_on_the_same_prompts(finished_run):
  rows = tiny.read_jsonl(finished_run / "evaluate" / "completions.jsonl")
  asked = {
      name: [row["prompt"] for row in rows if row["policy"] == name]
      for name in ("base", "sft", "ppo")
  }
  assert asked["base"] == asked["sft"] == asked["ppo"]
  assert len(asked["base"]) == 8
  kl = [row["kl"] for row in rows if row["policy"] == "sft"]
  assert max(map(abs, kl)) < 1e-4


def test_evaluation_with_a_reward_model_as_judge(finished_run, tmp_path):
  settings = tiny.stage("evaluate", finished_run)
  settings.judge = f"reward_model:{finished_run}/reward"
  settings.policies = tuple(
      f"{name}={finished_run}/sft" for name in ("one", "two")
  )
  settings.ref_policy = ""
  settings.reward_model = ""
  evaluate.run(from_config(evaluate.Config, settings), str(tmp_path))
  rows = tiny.read_jsonl(tmp_path / "completions.jsonl")
  # The same policy, the same random numbers.
  one, two = (
      [{**row, "policy": ""} for row in rows if row["policy"] == name]
      for name in ("one", "two")
  )
  assert one == two
  assert "kl" not in one[0] and "score" not in one[0]


@pytest.mark.parametrize("changes, message", [
    (dict(policies=()), "at least one"),
    (dict(policies=("a=x", "a=y"), ref_policy=""), "a name of its own"),
    (dict(judge="world"), "judge 'world' is neither"),
])
def test_an_evaluation_that_makes_no_sense_is_refused(
    tmp_path, changes, message
):
  settings = tiny.stage("evaluate", tmp_path)
  settings.update(changes)
  with pytest.raises(ConfigError, match=message):
    from_config(evaluate.Config, settings)


def test_a_tokenizer_of_its_own_is_no_hindrance(policy, finished_run, prompts):
  """A reward model that reads the text again agrees with itself on tokens."""
  model = models.load_reward_model(str(finished_run / "reward"))
  sample = evaluator.make_sampler(
      policy.config, policy.tokenizer, sample_config(), 7
  )
  rollout = sample(policy.params, prompts, jax.random.key(0))
  score = evaluator.make_reward_fn(model)
  same = np.asarray(score(Episodes(rollout, policy.tokenizer)))

  class Renamed:
    """The same tokenizer under another fingerprint."""

    fingerprint = "another"

    def __getattr__(self, name):
      return getattr(policy.tokenizer, name)

  anew = np.asarray(score(Episodes(rollout, Renamed())))
  texts = Episodes(rollout, policy.tokenizer).completions
  again = policy.tokenizer.encode_batch(texts, continues=True)
  for i, ids in enumerate(again):
    # What is no text does not come back as the same tokens.
    mask = rollout.completion_mask[i] == 1
    kept = [int(t) for t in rollout.completions[i][mask]]
    if rollout.ended[i]:
      kept = kept[:-1]
    if ids == kept:
      np.testing.assert_allclose(anew[i], same[i], rtol=1e-4, atol=1e-5)


def test_a_damaged_model_is_told(finished_run, tmp_path):
  shutil.copytree(finished_run / "sft", tmp_path / "sft")
  (tmp_path / "sft" / "model" / "checkpoint.json").unlink()
  with pytest.raises(RuntimeError, match="no usable model in .*sft/model"):
    models.load_policy(str(tmp_path / "sft"))


def test_saving_and_loading_a_policy_changes_nothing(policy, tmp_path):
  models.save_policy(tmp_path / "copy", policy)
  again = models.load_policy(str(tmp_path / "copy"))
  assert again.config == policy.config
  assert again.tokenizer.fingerprint == policy.tokenizer.fingerprint
  tiny.assert_bitwise(
      dict(enumerate(map(np.asarray, jax.tree.leaves(again.params)))),
      dict(enumerate(map(np.asarray, jax.tree.leaves(policy.params)))),
  )
  assert dataclasses.replace(again, params=None, tokenizer=None) == (
      dataclasses.replace(policy, params=None, tokenizer=None)
  )
