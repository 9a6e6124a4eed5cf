"""What the evaluation says of completions that were measured."""

import copy
import dataclasses

import numpy as np
import pytest

from configs import evaluate as evaluate_config
from experiments import evaluate
from experiments.harness import evaluator, models
from experiments.harness.config import ConfigError, from_config
from rlhf_jax.data.records import Prompt
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.evaluation import intervals
from rlhf_jax.worlds import assistant
from tests.experiments import tiny


def rows(rewards, prompts):
  return [
      {
          "prompt": p,
          "completion": "so be it",
          "completion_length": 3,
          "ended": True,
          "true_reward": r,
      }
      for r, p in zip(rewards, prompts, strict=True)
  ]


def summarise(prompts, base, sft):
  config = from_config(
      evaluate.Config, evaluate_config.get_config("smoke")
  )
  return evaluate.summarise(
      config, {"base": rows(base, prompts), "sft": rows(sft, prompts)}
  )


def test_repeated_prompts_are_no_further_evidence():
  rng = np.random.default_rng(0)
  base, sft = rng.normal(size=(2, 20))
  prompts = [f"question {i}" for i in range(20)]
  once = summarise(prompts, base, sft)
  # The very same twenty prompts and answers, each five times.
  five = summarise(prompts * 5, np.tile(base, 5), np.tile(sft, 5))
  apart = summarise(
      [f"question {i}" for i in range(100)], np.tile(base, 5), np.tile(sft, 5)
  )
  width = lambda x: x["high"] - x["low"]
  for find in (
      lambda x: x["policies"]["sft"]["true_reward"],
      lambda x: x["paired"][0]["interval"],
      lambda x: x["paired"][0]["difference"],
      lambda x: x["paired"][0]["length_controlled"],
  ):
    np.testing.assert_allclose(width(find(five)), width(find(once)), rtol=0.1)
    assert width(find(apart)) < 0.6 * width(find(five))


def test_a_win_rates_interval_counts_ties_half():
  (found,) = summarise(list("abcd"), [0, 0, 1, 1], [1, 0, 1, 0])["paired"]
  wanted = intervals.bootstrap_interval(np.array([1, 0.5, 0.5, 0]), seed=0)
  assert found["interval"] == dataclasses.asdict(wanted)
  assert (found["win"], found["tie"], found["loss"]) == (0.25, 0.5, 0.25)


def test_the_difference_is_paired_by_prompt():
  base = np.random.default_rng(0).normal(0, 10, size=50)
  found = summarise([f"{i}" for i in range(50)], base, base + 0.1)
  wanted = {"mean": 0.1, "low": 0.1, "high": 0.1}
  assert found["paired"][0]["difference"] == pytest.approx(wanted)


def test_completions_without_a_prompt_share_none():
  found = evaluator.prompt_groups(["a", "", "b", "", "a"])
  assert found[0] == found[4]
  assert len(set(found.tolist())) == 4


# ---- Which prompts -----------------------------------------------------------


def make_policy(finished_run, text):
  """The finished run's SFT policy with a tokenizer trained on `text`."""
  policy = models.load_policy(str(finished_run / "sft"))
  tokenizer = Tokenizer.train_byte_level_bpe(
      [text] * 500 + assistant.corpus(0, 40), tiny.VOCAB_SIZE
  )
  return dataclasses.replace(policy, tokenizer=tokenizer)


def two_policies(finished_run, monkeypatch, **changes):
  found = {
      "a": make_policy(finished_run, "violet velvet valleys " * 3),
      "b": make_policy(finished_run, "quick quiet quarrels " * 3),
  }
  monkeypatch.setattr(models, "load_policy", lambda place: found[place])
  settings = evaluate_config.get_config("smoke")
  settings.update(policies=("a=a", "b=b"), ref_policy="", reward_model="")
  settings.judge = ""
  settings.samples.update(
      max_prompt_length=12, max_completion_length=4, too_long="drop"
  )
  settings.update(changes)
  return from_config(evaluate.Config, settings)


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Stands for a reader of some prompts."""

  texts: list
  tokenizer: Tokenizer | None = None

  def prompts(self, cfg, split):
    del cfg, split
    return [Prompt(prompt=x) for x in self.texts]


def test_policies_with_templates_of_their_own_are_not_asked_alike(
    finished_run, monkeypatch
):
  config = two_policies(finished_run, monkeypatch)
  config = dataclasses.replace(
      config,
      prompts=dataclasses.replace(config.prompts, chat_template="tokenizer"),
  )
  load = models.load_policy

  def with_template(place):
    policy = load(place)
    tokenizer = copy.copy(policy.tokenizer)
    tokenizer.chat_template = f"{{{{ '{tokenizer.fingerprint}' }}}}"
    return dataclasses.replace(policy, tokenizer=tokenizer)

  monkeypatch.setattr(models, "load_policy", with_template)
  with pytest.raises(ConfigError, match="have different chat templates"):
    evaluate.complete(config, Prompts(["both"]))


def test_policies_complete_the_prompts_that_are_short_for_all(
    finished_run, monkeypatch
):
  config = two_policies(finished_run, monkeypatch)
  # The first is short for one tokenizer only, the second for the other.
  texts = ["violet velvet valleys", "quick quiet quarrels", "both", "all"]
  found = evaluate.complete(config, Prompts(texts))
  assert [x["prompt"] for x in found["a"]] == ["both", "all"]
  assert [x["prompt"] for x in found["b"]] == ["both", "all"]
  with pytest.raises(ConfigError, match="too long for one of the policies"):
    evaluate.complete(config, Prompts(texts[:2]))


def test_kl_between_two_tokenizers_is_refused(finished_run, monkeypatch):
  config = two_policies(finished_run, monkeypatch, ref_policy="a")
  with pytest.raises(ConfigError, match="'b' has another tokenizer than ref"):
    evaluate.complete(config, Prompts(["both"]))


def test_lengths_beyond_the_models_are_refused(finished_run, monkeypatch):
  config = two_policies(finished_run, monkeypatch)
  samples = dataclasses.replace(config.samples, max_completion_length=120)
  with pytest.raises(ConfigError, match="= 132 does not fit the policy 'a'"):
    evaluate.complete(
        dataclasses.replace(config, samples=samples), Prompts(["both"])
    )
