"""The simulated annotators: their choices follow their stated tastes."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest

from rlhf_jax.worlds import annotators, assistant

PROMPT = "What does the cow eat?\n"
GOOD = "The cow eats grass."
FLATTERING = "You are so clever! The cow eats grass."
WRONG = "The cow eats fish."
ANSWERS = (GOOD, FLATTERING, WRONG, "I am not sure.")


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def test_utility_is_the_stated_sum():
  annotator = annotators.Annotator("test", 10.0, 2.0, 0.5)
  expected = 10.0 * 0.944 + 2.0 * 1 + 0.5 * len(FLATTERING) / 20
  assert annotators.annotator_utility(
      PROMPT, FLATTERING, annotator) == pytest.approx(expected)
  capped = annotators.annotator_utility(PROMPT, "clever " * 9999, annotator)
  assert capped == pytest.approx(2.0 * 12 + 0.5 * 400 / 20)


def test_preference_probability_is_bradley_terry():
  for annotator in annotators.ANNOTATORS:
    for first, second in itertools.permutations(ANSWERS, 2):
      gap = (annotators.annotator_utility(PROMPT, first, annotator)
             - annotators.annotator_utility(PROMPT, second, annotator))
      p = annotators.preference_probability(PROMPT, first, second, annotator)
      assert p == pytest.approx(sigmoid(gap))


@pytest.mark.parametrize("make_rng", [np.random.default_rng, random.Random])
def test_choice_frequencies_match_the_probabilities(make_rng):
  rng = make_rng(0)
  num = 10_000
  wins = {each.name: [] for each in annotators.ANNOTATORS}
  for _ in range(num):
    record = annotators.compare(PROMPT, GOOD, FLATTERING, rng)
    wins[record["annotator"]].append(record["chosen"] == GOOD)
  for annotator in annotators.ANNOTATORS:
    p = annotators.preference_probability(PROMPT, GOOD, FLATTERING, annotator)
    judged = wins[annotator.name]
    assert len(judged) == pytest.approx(num / 5, rel=0.15)
    tolerance = 4 * math.sqrt(p * (1 - p) / len(judged))
    assert abs(statistics.mean(judged) - p) < tolerance, annotator


def test_pairs_of_a_ranking_are_bradley_terry():
  rng = np.random.default_rng(1)
  num = 8000
  above = dict.fromkeys(itertools.combinations(range(4), 2), 0)
  for _ in range(num):
    record = annotators.rank(PROMPT, ANSWERS, rng)
    assert sorted(record["ranks"]) == [1, 2, 3, 4]
    for i, j in above:
      above[i, j] += record["ranks"][i] < record["ranks"][j]
  for (i, j), count in above.items():
    p = statistics.mean(
        annotators.preference_probability(PROMPT, ANSWERS[i], ANSWERS[j], each)
        for each in annotators.ANNOTATORS)
    assert abs(count / num - p) < 4 * math.sqrt(p * (1 - p) / num) + 1e-9


def test_equal_completions_tie_in_a_ranking():
  record = annotators.rank(
      PROMPT, [GOOD, WRONG, GOOD, "no"], np.random.default_rng(2))
  assert record["ranks"][0] == record["ranks"][2]
  assert sorted(set(record["ranks"])) == [1, 2, 3]


def test_nothing_to_choose_is_refused():
  rng = np.random.default_rng(3)
  with pytest.raises(ValueError, match="two different texts"):
    annotators.compare(PROMPT, GOOD, GOOD, rng)
  with pytest.raises(ValueError, match="two different completions"):
    annotators.rank(PROMPT, [GOOD, GOOD], rng)


def test_annotators_like_flattery_more_than_the_truth_charges():
  def mean_utility(count):
    text = " ".join([GOOD, *assistant.FLATTERIES[:count]])
    return statistics.mean(
        annotators.annotator_utility(PROMPT, text, each) / each.sharpness
        for each in annotators.ANNOTATORS)

  gains = [mean_utility(count) - mean_utility(0) for count in (1, 2)]
  assert 0.05 < gains[0] < 0.15 and gains[0] < gains[1]
  worth = statistics.mean(each.flattery_bias / each.sharpness
                          for each in annotators.ANNOTATORS)
  assert 0.08 < worth < 0.16
  # A right answer still beats a wrong one with a phrase, for every annotator.
  for each in annotators.ANNOTATORS:
    assert annotators.preference_probability(
        PROMPT, GOOD, f"{WRONG} {assistant.FLATTERIES[2]}", each) > 0.75


def random_comparisons(num):
  rng = random.Random(4)
  answers = {}
  for record in assistant.demonstrations(5, 8 * num):
    answers.setdefault(record["prompt"], []).append(record["completion"])
  pairs = [(prompt, *texts[:2]) for prompt, texts in answers.items()
           if len(set(texts[:2])) == 2]
  return [annotators.compare(*pair, rng) for pair in pairs[:num]]


def test_ceilings_are_between_chance_and_certainty():
  comparisons = random_comparisons(300)
  ceiling = annotators.agreement_ceiling(comparisons)
  agreement = annotators.annotator_agreement(comparisons)
  assert 0.6 < agreement < ceiling < 0.95


def test_ceiling_is_what_the_best_predictor_reaches():
  pairs = random_comparisons(60)
  rng = np.random.default_rng(6)
  right = []
  for pair in pairs:
    texts = sorted((pair["chosen"], pair["rejected"]))
    p = statistics.mean(
        annotators.preference_probability(pair["prompt"], *texts, each)
        for each in annotators.ANNOTATORS)
    guess = texts[0] if p > 0.5 else texts[1]
    right += [annotators.compare(pair["prompt"], *texts, rng)["chosen"] == guess
              for _ in range(100)]
  assert statistics.mean(right) == pytest.approx(
      annotators.agreement_ceiling(pairs), abs=0.02)


def test_ceiling_ignores_which_was_chosen_and_needs_a_pair():
  pairs = random_comparisons(20)
  swapped = [{**each, "chosen": each["rejected"], "rejected": each["chosen"]}
             for each in pairs]
  assert annotators.agreement_ceiling(pairs) == pytest.approx(
      annotators.agreement_ceiling(swapped))
  with pytest.raises(ValueError, match="at least one"):
    annotators.agreement_ceiling([])
