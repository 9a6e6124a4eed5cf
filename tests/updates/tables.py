"""A policy and a value that are tables: what PPO is without a transformer.

The first prompt token of a row is its number, so that a row finds its own
logits whatever minibatch it is in. params: {'policy': logits [B, C+1, V],
'value': [B, C+1]}; position i stands before completion token i.
"""

import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.functions import LanguageModelFns, PolicyValueFns
from rlhf_jax.types import Rollout

B, C, V = 4, 3, 4
LENGTHS = (3, 1, 2, 3)
ENDED = (True, True, False, False)


def _hidden_and_values(params, tokens, segment_ids, last):
  del segment_ids
  row = tokens[:, 0]
  assert params["policy"].shape[1] == last
  return params["policy"][row], params["value"][row]


def _ref_hidden(table, tokens, segment_ids, last):
  del segment_ids, last
  return table[tokens[:, 0]]


def _head(params):
  """What the tables hold are logits already."""
  del params
  return lambda hidden: hidden


# Shorter than a completion: what the tables prove, they prove of chunks.
MODEL = PolicyValueFns(_hidden_and_values, _head, chunk_size=2)
REF_MODEL = LanguageModelFns(_ref_hidden, _head, chunk_size=2)


def random_tables(seed=0):
  """(params, ref table)."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"policy": draw(B, C + 1, V), "value": draw(B, C + 1)}
  return params, draw(B, C + 1, V)


def make_rollout(seed=0, lengths=LENGTHS, ended=ENDED, vocab_size=V):
  rng = np.random.default_rng(seed)
  num = len(lengths)
  width = max(lengths)
  mask = np.arange(width)[None] < np.asarray(lengths)[:, None]
  return Rollout(
      prompts=jnp.arange(num, dtype=jnp.int32)[:, None],
      prompt_mask=jnp.ones((num, 1), jnp.int32),
      completions=jnp.asarray(
          rng.integers(0, vocab_size, (num, width)), jnp.int32
      ),
      completion_mask=jnp.asarray(mask, jnp.int32),
      logprobs=jnp.zeros((num, width), jnp.float32),
      ended=jnp.asarray(ended),
  )
