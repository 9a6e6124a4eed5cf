import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import functions
from rlhf_jax.models.heads import ScalarModel
from rlhf_jax.rewards.episodes import Episodes
from rlhf_jax.rewards.reward_model import make_reward_model
from rlhf_jax.types import ScoreNormalization
from tests.data.tokenizer_test import metaspace_tokenizer
from tests.models.small import random_params, small_config
from tests.rewards.conftest import (
    COMPLETIONS,
    ENDED,
    PROMPTS,
    make_episodes,
)

CONFIG = small_config(
    vocab_size=280, num_layers=1, width=16, ff_dim=24, max_length=48
)
PARAMS = random_params(ScalarModel(CONFIG))
NORMALIZATION = ScoreNormalization(gain=jnp.float32(2), bias=jnp.float32(-3))


def _expected(tokenizer):
  """Scores of bos + prompt + completion (+ eos), one row at a time."""
  fn = jax.jit(functions.make_score_fn(CONFIG))
  scores = []
  for prompt, completion, ended in zip(
      PROMPTS, COMPLETIONS, ENDED, strict=True
  ):
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    ids += tokenizer.encode(completion, continues=True)
    ids += [tokenizer.eos_id] if ended else []
    row = np.zeros((1, CONFIG.max_length), np.int32)
    row[0, : len(ids)] = ids
    mask = (np.arange(CONFIG.max_length) < len(ids))[None].astype(np.int32)
    scores.append(2 * float(fn(PARAMS, row, mask)[0]) - 3)
  return scores


def test_scores_the_rollouts_own_tokens_and_normalises(tokenizer, episodes):
  reward = make_reward_model(CONFIG, PARAMS, NORMALIZATION, tokenizer)
  score = reward(episodes)
  assert score.dtype == jnp.float32
  np.testing.assert_allclose(score, _expected(tokenizer), atol=1e-5)


def test_score_does_not_depend_on_the_rollouts_padding(tokenizer, episodes):
  reward = make_reward_model(CONFIG, PARAMS, NORMALIZATION, tokenizer)
  wider = make_episodes(tokenizer, prompt_length=20, completion_length=24)
  np.testing.assert_allclose(reward(wider), reward(episodes), atol=1e-5)


def test_pad_equal_to_eos_does_not_move_the_scored_token(tokenizer, episodes):
  rollout = episodes.rollout
  fill = lambda tokens, mask: jnp.where(mask == 1, tokens, tokenizer.eos_id)
  filled = Episodes(
      dataclasses.replace(
          rollout,
          prompts=fill(rollout.prompts, rollout.prompt_mask),
          completions=fill(rollout.completions, rollout.completion_mask),
      ),
      tokenizer,
  )
  # Of one completion that ended and one that did not there is padding.
  ended, mask = np.asarray(ENDED), np.asarray(rollout.completion_mask)
  assert (mask[ended] == 0).any() and (mask[~ended] == 0).any()
  reward = make_reward_model(CONFIG, PARAMS, NORMALIZATION, tokenizer)
  np.testing.assert_array_equal(reward(filled), reward(episodes))
  np.testing.assert_allclose(reward(filled), _expected(tokenizer), atol=1e-5)


def test_what_a_stop_token_ended_is_scored_at_an_end_token(tokenizer, episodes):
  # The first completion, ended by its full stop: no end token was sampled.
  rollout = episodes.rollout
  mask = rollout.completion_mask
  last = int(mask[0].sum()) - 1
  assert rollout.completions[0, last] == tokenizer.eos_id
  stopped = Episodes(
      dataclasses.replace(
          rollout,
          completion_mask=mask.at[0, last].set(0),
          completions=rollout.completions.at[0, last].set(tokenizer.pad_id),
      ),
      tokenizer,
  )
  reward = make_reward_model(CONFIG, PARAMS, NORMALIZATION, tokenizer)
  np.testing.assert_allclose(reward(stopped), reward(episodes), atol=1e-5)


def test_what_another_end_token_ended_is_scored_at_it(
    tokenizer, episodes, monkeypatch
):
  # One more end token: what it ended needs no other behind it.
  rollout = episodes.rollout
  last = int(rollout.completion_mask[0].sum()) - 1
  other = tokenizer.encode("?", continues=True)[-1]
  changed = Episodes(
      dataclasses.replace(
          rollout, completions=rollout.completions.at[0, last].set(other)
      ),
      tokenizer,
  )
  scores = lambda x: np.asarray(
      make_reward_model(CONFIG, PARAMS, NORMALIZATION, tokenizer)(x)
  )
  with_end_behind = scores(changed)
  monkeypatch.setattr(tokenizer, "eos_ids", (tokenizer.eos_id, other))
  at_it = scores(changed)
  np.testing.assert_array_equal(at_it[1:], with_end_behind[1:])
  tokens = jnp.concatenate(
      [changed.rollout.prompts, changed.rollout.completions], axis=1
  )
  mask = jnp.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)
  raw = functions.make_score_fn(CONFIG)(PARAMS, tokens, mask)
  np.testing.assert_allclose(
      at_it, NORMALIZATION.gain * raw + NORMALIZATION.bias, atol=1e-5
  )
  assert abs(at_it[0] - with_end_behind[0]) > 1e-4


def test_reward_model_with_another_tokenizer_encodes_the_text_anew(
    tokenizer, other_tokenizer, episodes
):
  assert tokenizer.encode(PROMPTS[1]) != other_tokenizer.encode(PROMPTS[1])
  reward = make_reward_model(CONFIG, PARAMS, NORMALIZATION, other_tokenizer)
  # Its max_length is below the width that rows are rounded up to.
  np.testing.assert_allclose(
      reward(episodes), _expected(other_tokenizer), atol=1e-5
  )


def test_another_tokenizer_puts_no_space_before_a_completion(
    tmp_path, episodes
):
  # As Llama's: a text that starts gets a space, a text that goes on does not.
  spaced = metaspace_tokenizer(tmp_path)
  assert spaced.encode("a") != spaced.encode("a", continues=True)
  reward = make_reward_model(CONFIG, PARAMS, NORMALIZATION, spaced)
  np.testing.assert_allclose(reward(episodes), _expected(spaced), atol=1e-5)


@pytest.mark.parametrize("same", [True, False])
def test_episode_longer_than_the_reward_model_reads_is_an_error(
    tokenizer, other_tokenizer, episodes, same
):
  config = small_config(vocab_size=280, max_length=20)
  reward = make_reward_model(
      config, PARAMS, NORMALIZATION, tokenizer if same else other_tokenizer
  )
  with pytest.raises(ValueError, match=r"at most 20 \(max_length\)"):
    reward(episodes)
