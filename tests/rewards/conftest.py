import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.rewards.episodes import Episodes
from rlhf_jax.types import Rollout

PROMPTS = ["How are you?", "Sum 2 and 3.", "Hi"]
COMPLETIONS = [" Well, thanks.", "", " héllo <eos>"]
ENDED = (True, True, False)


@pytest.fixture(scope="session")
def tokenizer():
  return Tokenizer.train_byte_level_bpe(["how are you, well thanks"] * 4, 270)


@pytest.fixture(scope="session")
def other_tokenizer():
  return Tokenizer.train_byte_level_bpe(["the sum of 2 and 3 is 5"] * 4, 280)


def make_episodes(tokenizer, prompt_length=16, completion_length=18):
  """PROMPTS and COMPLETIONS as a rollout would hold them."""
  num = len(PROMPTS)
  prompts = np.full((num, prompt_length), tokenizer.pad_id, np.int32)
  prompt_mask = np.zeros_like(prompts)
  completions = np.full((num, completion_length), tokenizer.pad_id, np.int32)
  completion_mask = np.zeros_like(completions)
  for i in range(num):
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPTS[i])]
    prompts[i, prompt_length - len(ids) :] = ids
    prompt_mask[i, prompt_length - len(ids) :] = 1
    ids = tokenizer.encode(COMPLETIONS[i], continues=True)
    ids += [tokenizer.eos_id] if ENDED[i] else []
    completions[i, : len(ids)] = ids
    completion_mask[i, : len(ids)] = 1
  rollout = Rollout(
      prompts=jnp.asarray(prompts),
      prompt_mask=jnp.asarray(prompt_mask),
      completions=jnp.asarray(completions),
      completion_mask=jnp.asarray(completion_mask),
      logprobs=jnp.zeros(completions.shape, jnp.float32),
      ended=jnp.asarray(ENDED),
  )
  return Episodes(rollout, tokenizer)


@pytest.fixture
def episodes(tokenizer):
  return make_episodes(tokenizer)
