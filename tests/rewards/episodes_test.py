import numpy as np
import pytest

from rlhf_jax.rewards.episodes import make_rule_reward
from tests.rewards.conftest import COMPLETIONS, PROMPTS


def test_text_is_without_padding_and_special_tokens(episodes):
  assert episodes.prompts == PROMPTS
  # "<eos>" that was written out is text and stays.
  assert episodes.completions == COMPLETIONS


def test_rule_reads_prompt_and_completion(episodes):
  seen = []

  def rule(prompt, completion):
    seen.append((prompt, completion))
    return len(completion)

  score = make_rule_reward(rule)(episodes)
  assert score.dtype == np.float32
  np.testing.assert_array_equal(score, [len(x) for x in COMPLETIONS])
  assert seen == list(zip(PROMPTS, COMPLETIONS, strict=True))


@pytest.mark.parametrize(
    "bad", [float("nan"), float("-inf"), None, "0.5", 1e300, np.ones(2)],
    ids=["nan", "inf", "none", "text", "beyond float32", "array"],
)
def test_score_that_is_no_number_is_an_error_naming_the_completion(
    episodes, bad
):
  rule = lambda prompt, completion: bad if "thanks" in completion else 0.5
  with pytest.raises(ValueError) as error:
    make_rule_reward(rule)(episodes)
  message = str(error.value)
  assert repr(COMPLETIONS[0]) in message and repr(PROMPTS[0]) in message
  assert "finite number" in message


def test_numpy_and_bool_scores_are_numbers(episodes):
  rule = lambda prompt, completion: (
      np.float64(0.5) if completion else bool(prompt)
  )
  np.testing.assert_array_equal(
      make_rule_reward(rule)(episodes), [0.5, 1.0, 0.5]
  )
