"""Loops with caches of their own lengths against the one loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import device_mesh, sharding
from rlhf_jax.device_mesh import MeshConfig
from rlhf_jax.generation.decode import SamplingConfig, make_generate
from rlhf_jax.models import partitioning
from tests.models.small import (
  VARIANTS,
  random_tokens,
  small_config,
  small_language_model,
)

B, P, C = 8, 5, 12
PROMPT_LENGTHS = np.asarray([1, 2, 3, 4, 5, 5, 2, 3])
PROMPT_MASK = jnp.asarray(
    np.arange(P)[None] >= P - PROMPT_LENGTHS[:, None], jnp.int32
)


def _args(**fields):
  fields = {"eos_id": 3, "stop_ids": (2, 7, 11), "pad_id": 6, **fields}
  cfg = SamplingConfig(max_new_tokens=C, **fields)
  return random_tokens(0, B, P), PROMPT_MASK, jax.random.key(0), cfg


def _assert_same(actual, expected):
  for field in dataclasses.fields(expected):
    got, wanted = (getattr(x, field.name) for x in (actual, expected))
    assert got.dtype == wanted.dtype
    if field.name == "logprobs":
      np.testing.assert_allclose(got, wanted, atol=1e-5)
    else:
      np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    "variant, is_unrolled, fields",
    [
        ("window", False, {}),
        ("window", True, {"greedy": True}),
        ("two_ropes", False, {"greedy": True}),
        ("gpt2", True, {"stop_ids": ()}),
    ],
)
def test_buckets_complete_what_one_loop_does(variant, is_unrolled, fields):
  """Ragged prompts, windows left behind, 11 steps that 3 does not divide."""
  model, params = small_language_model(**VARIANTS[variant])
  make = functools.partial(make_generate, model, is_unrolled)
  expected = jax.jit(make())(params, *_args(**fields))
  lengths = np.sum(expected.completion_mask, axis=1)
  # The first loop draws up to the fifth token, the last from the tenth on.
  assert lengths.min() < 5
  assert lengths.max() > 9
  actual = jax.jit(make(num_cache_buckets=3))(params, *_args(**fields))
  _assert_same(actual, expected)


def test_completions_of_one_prompt_share_its_run():
  model, params = small_language_model(**VARIANTS["window"])
  make = functools.partial(make_generate, model, num_completions=3)
  expected = jax.jit(make())(params, *_args())
  assert expected.ended.shape == (3 * B,)
  actual = jax.jit(make(num_cache_buckets=2))(params, *_args())
  _assert_same(actual, expected)


@pytest.mark.parametrize("is_unrolled", [False, True])
def test_rows_and_heads_split_over_devices_change_nothing(is_unrolled):
  model, params = small_language_model(vocab_size=20, **VARIANTS["window"])
  sizes = MeshConfig(data=2, tensor=2)
  mesh = device_mesh.make_mesh(sizes, jax.devices()[:4])
  split = sharding.place(params, partitioning.POLICY_RULES, mesh)
  prompts, mask, rng, cfg = _args()
  rows = device_mesh.put_rows((prompts, mask), mesh)
  make = functools.partial(make_generate, model, is_unrolled)
  expected = jax.jit(make())(params, prompts, mask, rng, cfg)
  many = jax.jit(make(num_cache_buckets=3))
  _assert_same(many(split, *rows, rng, cfg), expected)


class _Watched:
  """Stands in for a model: row b's likeliest token t is script[b, t].

  calls: (columns of the cache, the one that is written) of each.
  """

  def __init__(self, script):
    self.config = small_config(max_length=2000, num_layers=1)
    self.script = jnp.asarray(script, jnp.int32)
    self.calls = []

  def apply(self, variables, tokens, mask, cache, last=1):
    size = cache.positions.shape[1]
    assert {x.shape[3] for x in cache.layers} == {size}
    jax.debug.callback(
        lambda index: self.calls.append((size, int(index))), cache.index
    )
    index = cache.index + tokens.shape[1]
    logits = 9.0 * jax.nn.one_hot(self.script[:, index - P], 19)[:, None]
    return logits, dataclasses.replace(cache, index=index, empty=False)


def _watch(script, num_cache_buckets):
  model = _Watched(script)
  rows, length = model.script.shape
  cfg = SamplingConfig(max_new_tokens=length, eos_id=1, greedy=True)
  ones = jnp.ones((rows, P), jnp.int32)
  generate = make_generate(
      model, is_unrolled=False, num_cache_buckets=num_cache_buckets
  )
  rollout = jax.jit(generate)({}, ones, ones, jax.random.key(0), cfg)
  jax.effects_barrier()
  return rollout, sorted(model.calls)


def test_each_loop_has_columns_for_its_own_steps_and_those_before():
  script = np.full((2, 8), 5)
  rollout, calls = _watch(script, 3)
  np.testing.assert_array_equal(rollout.completions, script)
  assert calls == [
      (P + 3, 0), (P + 3, P), (P + 3, P + 1), (P + 3, P + 2),
      (P + 5, P + 3), (P + 5, P + 4),
      (P + 7, P + 5), (P + 7, P + 6),
  ]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_with_fewer_steps_than_buckets_each_step_is_one(length):
  rollout, calls = _watch(np.full((2, length), 5), 9)
  np.testing.assert_array_equal(rollout.completions, np.full((2, length), 5))
  steps = [(P + i + 1, P + i) for i in range(length - 1)]
  assert calls == [(P + 1, 0), *steps]


def test_no_loop_runs_once_every_row_has_ended():
  script = np.full((2, 1000), 5)
  script[0, 1] = script[1, 2] = 1
  rollout, calls = _watch(script, 4)
  assert [index for _, index in calls] == [0, P, P + 1]
  np.testing.assert_array_equal(np.sum(rollout.completion_mask, axis=1), [2, 3])


def test_no_buckets_are_refused():
  model, _ = small_language_model()
  with pytest.raises(ValueError, match="num_cache_buckets must be >= 1: 0"):
    make_generate(model, num_cache_buckets=0)
