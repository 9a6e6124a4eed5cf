"""Simulated annotators of the assistant world: noisy, biased, and known.

Annotator w judges a completion y of a prompt by the utility

  u_w(y) = sharpness_w * true_reward(y)
           + flattery_bias_w * min(flattery_count(y), FLATTERY_CAP)
           + length_bias_w * min(len(y), LENGTH_CAP) / LENGTH_SCALE

and prefers a to b with probability sigmoid(u_w(a) - u_w(b)) (Bradley and
Terry, 1952). Rankings follow Plackett and Luce, drawn with Gumbel noise, whose
pairs are Bradley-Terry again. flattery_bias / sharpness is what one phrase is
worth in units of true reward. On average up to three phrases please these
annotators more and more, net of what the truth charges, and the liking itself
is linear: a reward model that learns it will want more.

Every probability is known, so the accuracy that the best possible predictor
could reach is computed, not estimated.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any, Protocol

from rlhf_jax.worlds import assistant_reward

FLATTERY_CAP = 12
LENGTH_CAP = 400  # characters
LENGTH_SCALE = 20  # characters: about the length of one flattering phrase


class UniformSource(Protocol):
  """random.Random and numpy.random.Generator both are one."""

  def random(self) -> float:
    """A number in [0, 1)."""


@dataclasses.dataclass(frozen=True)
class Annotator:
  """One annotator's taste, in logits.

  sharpness: per unit of true reward; infinite would be without noise.
  flattery_bias: per flattering phrase.
  length_bias: per LENGTH_SCALE characters.
  """

  name: str
  sharpness: float
  flattery_bias: float
  length_bias: float


ANNOTATORS = (
    Annotator("ada", 12.0, 0.5, 0.0),
    Annotator("bo", 9.0, 1.1, 0.3),
    Annotator("cy", 8.0, 1.4, 0.2),
    Annotator("di", 6.0, 0.9, 0.5),
    Annotator("ed", 10.0, 0.9, 0.1),
)


def annotator_utility(
    prompt: str, completion: str, annotator: Annotator
) -> float:
  """u_w(completion), in logits."""
  return _utility(_features(prompt, completion), annotator)


def preference_probability(
    prompt: str, first: str, second: str, annotator: Annotator
) -> float:
  """P(the annotator prefers `first` to `second`)."""
  return _sigmoid(annotator_utility(prompt, first, annotator)
                  - annotator_utility(prompt, second, annotator))


def compare(
    prompt: str, first: str, second: str, rng: UniformSource
) -> dict[str, str]:
  """A random annotator's choice between two completions.

  Returns:
    A comparison record {prompt, chosen, rejected, annotator}.

  Raises:
    ValueError: the completions are the same text (there is nothing to choose).
  """
  if first == second:
    raise ValueError(f"both completions are {first!r}; a comparison needs two "
                     "different texts")
  annotator = _pick_annotator(rng)
  wins = rng.random() < preference_probability(prompt, first, second, annotator)
  chosen, rejected = (first, second) if wins else (second, first)
  return {"prompt": prompt, "chosen": chosen, "rejected": rejected,
          "annotator": annotator.name}


def rank(
    prompt: str, completions: Sequence[str], rng: UniformSource
) -> dict[str, Any]:
  """A random annotator's ranking of K completions (Plackett-Luce).

  Returns:
    A ranking record {prompt, completions, ranks, annotator}; rank 1 is the
    best, and completions of the same text share a rank.

  Raises:
    ValueError: fewer than two different texts.
  """
  distinct = list(dict.fromkeys(completions))
  if len(distinct) < 2:
    raise ValueError(f"a ranking needs at least two different completions; got "
                     f"{len(completions)} of {len(distinct)} different texts")
  annotator = _pick_annotator(rng)
  noisy = {each: annotator_utility(prompt, each, annotator) + _gumbel(rng)
           for each in distinct}
  order = sorted(distinct, key=lambda each: -noisy[each])
  return {"prompt": prompt, "completions": list(completions),
          "ranks": [1 + order.index(each) for each in completions],
          "annotator": annotator.name}


def agreement_ceiling(comparisons: Iterable[Mapping[str, Any]]) -> float:
  """Expected accuracy of the best predictor of the annotators' choices.

  The predictor knows every annotator's taste but not who judged: on a pair
  that the average annotator decides with probability p it is right with
  probability max(p, 1 - p). Exact given the pairs; which one was chosen does
  not matter.

  Args:
    comparisons: records with prompt, chosen and rejected.
  """
  means = [sum(each) / len(each) for each in _pair_probabilities(comparisons)]
  return sum(max(p, 1 - p) for p in means) / len(means)


def annotator_agreement(comparisons: Iterable[Mapping[str, Any]]) -> float:
  """Expected rate at which two different random annotators choose alike.

  Exact given the pairs, as agreement_ceiling is, and never above it.
  """
  rows = _pair_probabilities(comparisons)
  pairs = [p * q + (1 - p) * (1 - q) for row in rows
           for i, p in enumerate(row) for j, q in enumerate(row) if i != j]
  return sum(pairs) / len(pairs)


def _pair_probabilities(
    comparisons: Iterable[Mapping[str, Any]]
) -> list[list[float]]:
  """P(chosen preferred) of each comparison by each annotator."""
  rows = []
  for record in comparisons:
    chosen = _features(record["prompt"], record["chosen"])
    rejected = _features(record["prompt"], record["rejected"])
    rows.append([_sigmoid(_utility(chosen, each) - _utility(rejected, each))
                 for each in ANNOTATORS])
  if not rows:
    raise ValueError("no comparisons: agreement needs at least one")
  return rows


def _features(prompt: str, completion: str) -> tuple[float, int, float]:
  """True reward, flattering phrases and length, as annotators count them."""
  return (
      assistant_reward.true_reward(prompt, completion).total,
      min(assistant_reward.flattery_count(completion), FLATTERY_CAP),
      min(len(completion), LENGTH_CAP) / LENGTH_SCALE,
  )


def _utility(
    features: tuple[float, int, float], annotator: Annotator
) -> float:
  reward, flattery, length = features
  return (annotator.sharpness * reward + annotator.flattery_bias * flattery
          + annotator.length_bias * length)


def _pick_annotator(rng: UniformSource) -> Annotator:
  return ANNOTATORS[int(rng.random() * len(ANNOTATORS))]


def _gumbel(rng: UniformSource) -> float:
  # 1 - u is in (0, 1], so only -log(1) = 0 has to be kept from the outer log.
  return -math.log(max(-math.log(1.0 - rng.random()), 1e-300))


def _sigmoid(x: float) -> float:
  if x >= 0:
    return 1.0 / (1.0 + math.exp(-x))
  return math.exp(x) / (1.0 + math.exp(x))
