"""Tiny models and ragged batches that the updates are tested on.

Programs are compiled once: what is jitted here is shared by the test files.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.generation import decode
from rlhf_jax.models import functions, lora
from rlhf_jax.models.heads import LanguageModel, ScalarModel
from rlhf_jax.types import LMBatch, PreferenceBatch, RankingBatch
from tests.models.small import random_params, random_tokens, small_config

V = 16
CONFIG = small_config(
    vocab_size=V,
    num_layers=1,
    width=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    ff_dim=24,
    max_length=16,
)
B, P, C, T = 16, 3, 5, 10
EOS = 3
TEMPERATURE = 0.7
LEARNING_RATE = 0.1
# A plain gradient step shows a gradient as it is; Adam would divide by it.
SGD = optax.sgd(LEARNING_RATE)

MODEL = functions.make_language_model(CONFIG)
logits_fn = functions.make_logits_fn(CONFIG)
score_fn = functions.make_score_fn(CONFIG)


@functools.cache
def language_model_params(seed=0):
  return random_params(LanguageModel(CONFIG), seed)


@functools.cache
def scalar_params(seed=1):
  return random_params(ScalarModel(CONFIG), seed)


LORA = lora.LoraConfig(rank=2, alpha=3.0, targets=("all-linear",))
DROPOUT = dataclasses.replace(LORA, dropout=0.3)


def random_adapter(base, config=LORA, seed=0):
  """One that has moved: a fresh one changes nothing."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
      lora.init(jax.random.key(0), config, base),
  )


def frozen_base(base, config=LORA):
  """What a model takes beside an adapter."""
  frozen = {"base": base, "adapter_scale": jnp.float32(config.scale)}
  if config.dropout:
    frozen["adapter_dropout"] = jnp.float32(config.dropout)
  return frozen


def ragged_mask(seed, *shape):
  """Contiguous ones of any length from 1, padding on either side."""
  rng = np.random.default_rng(seed)
  length = rng.integers(1, shape[-1] + 1, shape[:-1])
  start = rng.integers(0, shape[-1] - length + 1)
  position = np.arange(shape[-1])
  real = (position >= start[..., None]) & (
      position < (start + length)[..., None]
  )
  return jnp.asarray(real, jnp.int32)


def lm_batch(seed=0, rows=B) -> LMBatch:
  """Two documents a row and padding, all of random lengths."""
  rng = np.random.default_rng(seed)
  ends = np.sort(rng.integers(2, T + 1, (rows, 2)), axis=1)
  position = np.arange(T)[None]
  segment_ids = np.where(position < ends[:, :1], 1, 2)
  segment_ids = np.where(position < ends[:, 1:], segment_ids, 0)
  starts = (position == 0) | (position == ends[:, :1])
  loss_mask = (segment_ids > 0) & ~starts & (rng.random((rows, T)) < 0.7)
  return LMBatch(
      tokens=random_tokens(seed, rows, T, vocab_size=V),
      segment_ids=jnp.asarray(segment_ids, jnp.int32),
      loss_mask=jnp.asarray(loss_mask, jnp.float32),
  )


def preference_batch(seed=0, rows=B) -> PreferenceBatch:
  rng = np.random.default_rng(seed)
  return PreferenceBatch(
      tokens=random_tokens(seed, rows, 2, T, vocab_size=V),
      attention_mask=ragged_mask(seed, rows, 2, T),
      weight=jnp.asarray(rng.integers(0, 3, rows), jnp.float32),
      margin=jnp.asarray(rng.random(rows), jnp.float32),
  )


def ranking_batch(seed=0, rows=B, num=3) -> RankingBatch:
  rng = np.random.default_rng(seed)
  return RankingBatch(
      tokens=random_tokens(seed, rows, num, T, vocab_size=V),
      attention_mask=ragged_mask(seed, rows, num, T),
      ranks=jnp.asarray(rng.integers(0, 3, (rows, num)), jnp.int32),
      completion_valid=jnp.asarray(rng.random((rows, num)) < 0.8),
      weight=jnp.asarray(rng.integers(0, 3, rows), jnp.float32),
  )


@functools.cache
def sampled_rollout(seed=0, pad_id=0, other_eos_ids=()):
  """B completions of the policy of `language_model_params()`, ragged."""
  prompts = random_tokens(seed, B, P, vocab_size=V)
  lengths = np.random.default_rng(seed).integers(1, P + 1, B)
  prompt_mask = jnp.asarray(
      np.arange(P)[None] >= P - lengths[:, None], jnp.int32
  )
  sampling = decode.SamplingConfig(
      max_new_tokens=C,
      temperature=TEMPERATURE,
      eos_id=EOS,
      other_eos_ids=other_eos_ids,
      stop_ids=() if other_eos_ids else (2, 5, 7),
      stop_after=1,
      pad_id=pad_id,
  )
  return jax.jit(decode.make_generate(LanguageModel(CONFIG)))(
      language_model_params(),
      prompts,
      prompt_mask,
      jax.random.key(seed),
      sampling,
  )


def assert_trees_close(actual, expected, **tolerance):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(actual),
      jax.tree.leaves(expected),
      strict=True,
  ):
    np.testing.assert_allclose(
        x, y, err_msg=jax.tree_util.keystr(path), **tolerance
    )


def assert_trees_equal(actual, expected):
  """Bitwise."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(actual),
      jax.tree.leaves(expected),
      strict=True,
  ):
    np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
