"""What is said of a reward model: over which pairs, and how surely."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import reward as reward_config
from experiments import reward
from experiments.harness.config import from_config
from rlhf_jax.data.records import Comparison, Ranking
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.types import PreferenceBatch, RankingBatch
from rlhf_jax.updates import reward as reward_update
from rlhf_jax.worlds import annotators


def pairs(scores, weight, margin):
  """A batch whose score is its first token, a tenth each."""
  tokens = np.round(np.asarray(scores) * 10).astype(np.int32)[..., None]
  return PreferenceBatch(
      tokens=tokens,
      attention_mask=np.ones_like(tokens),
      weight=np.asarray(weight, np.float32),
      margin=np.asarray(margin, np.float32),
  )


def rankings(scores, ranks, valid, weight):
  tokens = np.round(np.asarray(scores) * 10).astype(np.int32)[..., None]
  return RankingBatch(
      tokens=tokens,
      attention_mask=np.ones_like(tokens),
      ranks=np.asarray(ranks, np.int32),
      completion_valid=np.asarray(valid, bool),
      weight=np.asarray(weight, np.float32),
  )


def first_token_score(params, tokens, mask):
  del params, mask
  return tokens[:, 0].astype(jnp.float32) / 10


PAIRS = pairs(
    [[1.0, 0.0], [0.0, 2.0], [0.5, 0.3], [0.0, 3.0]],
    weight=[1.0, 0.5, 2.0, 0.0],
    margin=[0.0, 1.0, 0.4, 0.0],
)
RANKINGS = rankings(
    [[2.0, 1.0, 9.0], [0.0, 1.0, 0.5], [0.0, 4.0, 8.0]],
    ranks=[[0, 1, 0], [0, 1, 2], [0, 1, 2]],
    valid=[[1, 1, 0], [1, 1, 1], [1, 1, 1]],
    weight=[1.0, 2.0, 0.0],
)


@pytest.mark.parametrize(
    "batch, ranking_loss",
    [
        (PAIRS, "pairwise"),
        (RANKINGS, "pairwise"),
        (RANKINGS, "plackett_luce"),
        (RANKINGS, "best_of_k"),
    ],
)
def test_heldout_numbers_are_those_of_training(batch, ranking_loss):
  cfg = reward_update.RewardConfig(ranking_loss=ranking_loss)
  is_ranking = isinstance(batch, RankingBatch)
  objective = (
      reward_update.ranking_objective
      if is_ranking
      else reward_update.reward_objective
  )
  batch = jax.tree.map(jnp.asarray, batch)
  total = batch.weight.sum()
  loss, metrics = objective(
      {}, batch, first_token_score, cfg, total
  )
  host = jax.tree.map(np.asarray, batch)
  scores = reward_update.score_rows({}, batch, first_token_score)
  found = reward.evaluate(np.asarray(scores), host, cfg)
  np.testing.assert_allclose(found["eval/loss"], float(loss), rtol=1e-5)
  accuracy = metrics["reward/accuracy"]
  np.testing.assert_allclose(
      found["eval/accuracy"], float(accuracy.total / accuracy.count), rtol=1e-6
  )


def test_what_fills_a_ranking_up_has_no_score():
  scores = np.arange(9, dtype=np.float32).reshape(3, 3)
  found = reward.completion_scores(scores, RANKINGS)
  assert found.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
  assert reward.completion_scores(scores[:, :2], PAIRS).size == 6


def test_repeated_prompts_do_not_narrow_the_accuracys_interval():
  scores = np.asarray([[1, 0], [1, 0], [0, 1], [1, 1]], np.float32)
  records = [Comparison(p, "x", "y") for p in "abcd"]
  width = lambda batch, scores, records: (lambda x: x["high"] - x["low"])(
      reward.make_calibration(scores, batch, records, 0)["accuracy"]
  )
  once = width(pairs(scores, [1] * 4, [0] * 4), scores, records)
  many = np.tile(scores, (9, 1))
  batch = pairs(many, [1] * 36, [0] * 36)
  np.testing.assert_allclose(width(batch, many, records * 9), once, rtol=0.1)
  found = reward.make_calibration(many, batch, records * 9, 0)
  assert found["accuracy"]["mean"] == 0.625 and found["num_pairs"] == 36
  # The rows of a ranking share its prompt; a tie of ranks is no pair.
  three = [Ranking(p, ("x", "y", "z"), (0, 1, 2)) for p in "abc"]
  found = reward.make_calibration(
      np.asarray([[2, 1, 9], [0, 1, 0.5], [0, 4, 8]]), RANKINGS, three, 0
  )
  assert found["num_pairs"] == 4 and found["ceiling"] is None


def test_the_ceiling_is_of_the_pairs_that_the_accuracy_is_of():
  config = from_config(reward.Config, reward_config.get_config("smoke"))
  config = dataclasses.replace(
      config, max_prompt_length=40, max_completion_length=40
  )
  tokenizer = Tokenizer.train_byte_level_bpe(["abc abc abd"] * 4, 262)
  name = annotators.ANNOTATORS[0].name
  pair = lambda chosen, rejected, **kwargs: Comparison(
      "What is 3+14?\n", chosen, rejected, annotator=name, **kwargs
  )
  clear = pair("3+14=17.", "I see.")
  even = pair("3+14=18.", "3+14=18.")
  records = [
      pair("3+14=17.", "3+14=17." * 9),
      clear,
      dataclasses.replace(even, weight=0.0),
      even,
  ]
  batch, kept, report = reward.encode(config, tokenizer, records)
  assert kept == records[1:]
  scores = np.asarray([[1, 0]] * 3, np.float32)
  found = reward.make_calibration(scores, batch, kept, 0)
  rows = [dataclasses.asdict(x) for x in (clear, even)]
  assert found["num_pairs"] == 2
  assert found["ceiling"] == annotators.agreement_ceiling(rows)
  assert found["agreement"] == annotators.annotator_agreement(rows)
