"""Prompts through slots against the plain path, which has them all at once."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import device_mesh, sharding
from rlhf_jax.device_mesh import MeshConfig
from rlhf_jax.generation.decode import SamplingConfig, make_generate
from rlhf_jax.generation.engine import make_generate_many
from rlhf_jax.models import partitioning
from tests.models.small import (
  VARIANTS,
  random_tokens,
  small_config,
  small_language_model,
  with_adapter,
)

N, P, C = 11, 5, 9
PROMPT_LENGTHS = np.asarray([1, 2, 3, 4, 5, 5, 2, 3, 5, 1, 4])
PROMPT_MASK = jnp.asarray(
    np.arange(P)[None] >= P - PROMPT_LENGTHS[:, None], jnp.int32
)


@functools.cache
def _model(variant="llama"):
  model, params = small_language_model(**VARIANTS[variant])
  return model, params, jax.jit(make_generate(model))


@functools.cache
def _many(variant="llama", num_slots=4, **options):
  return jax.jit(make_generate_many(_model(variant)[0], num_slots, **options))


def _config(**fields):
  fields = {"eos_id": 3, "stop_ids": (2, 7, 11), "pad_id": 6, **fields}
  return SamplingConfig(max_new_tokens=C, **fields)


def _args(**fields):
  return random_tokens(0, N, P), PROMPT_MASK, jax.random.key(0), _config(
      **fields
  )


def _lengths(rollout):
  return np.sum(rollout.completion_mask, axis=1)


def _assert_same(actual, expected, order=slice(None)):
  for name in ("prompts", "prompt_mask", "completions", "completion_mask",
               "ended"):
    actual_rows = getattr(actual, name)
    np.testing.assert_array_equal(actual_rows, getattr(expected, name)[order])
    assert actual_rows.dtype == getattr(expected, name).dtype
  np.testing.assert_allclose(
      actual.logprobs, expected.logprobs[order], atol=1e-5
  )


@pytest.mark.parametrize("variant", ["window", "gemma", "gpt2"])
def test_slots_complete_what_all_rows_at_once_do(variant):
  """Ragged prompts, rows that end early or not at all, windows left behind."""
  _, params, generate = _model(variant)
  expected = generate(params, *_args())
  assert len(set(_lengths(expected).tolist())) > 3
  assert not expected.ended.all()
  _assert_same(_many(variant)(params, *_args()), expected)


@pytest.mark.parametrize(
    "num_slots, options",
    [
        (1, {}),
        (3, {}),
        (3, {"refill_size": 3}),
        (10, {"refill_size": 4}),
        (4, {"is_unrolled": False}),
        (N, {}),
        (N + 1, {}),
    ],
)
def test_the_number_of_slots_changes_nothing(num_slots, options):
  _, params, generate = _model()
  many = _many(num_slots=num_slots, **options)
  _assert_same(many(params, *_args()), generate(params, *_args()))


def test_greedy_and_a_stop_that_counts_late():
  _, params, generate = _model("window")
  args = _args(greedy=True, stop_after=4, other_eos_ids=(5,))
  expected = generate(params, *args)
  assert len(set(_lengths(expected).tolist())) > 2
  _assert_same(_many("window")(params, *args), expected)


@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_few_tokens(max_new_tokens):
  _, params, generate = _model()
  prompts, mask, rng, cfg = _args()
  cfg = dataclasses.replace(cfg, max_new_tokens=max_new_tokens)
  many = _many(num_slots=3, is_unrolled=False)
  args = params, prompts, mask, rng, cfg
  _assert_same(many(*args), generate(*args))


def test_row_follows_its_number_not_its_slot_or_time():
  _, params, generate = _model()
  prompts, mask, rng, cfg = _args()
  whole = generate(params, prompts, mask, rng, cfg)
  many = _many()
  for order in (np.arange(N)[::-1], np.random.default_rng(0).permutation(N)):
    part = many(
        params, prompts[order], mask[order], rng, cfg, jnp.asarray(order)
    )
    _assert_same(part, whole, order)
  other = many(params, prompts, mask, rng, cfg, jnp.arange(N) + N)
  assert (other.completions != whole.completions).any()


@pytest.mark.parametrize(
    "options", [{}, {"num_slots": 7}, {"num_slots": 7, "refill_size": 2}]
)
def test_completions_of_one_prompt_share_its_run(options):
  model, params, generate = _model("window")
  prompts, mask, rng, cfg = _args()
  again = lambda x: jnp.repeat(x, 3, axis=0)
  expected = generate(params, again(prompts), again(mask), rng, cfg)
  make = make_generate_many if options else make_generate
  shared = jax.jit(
      make(model, is_unrolled=False, num_completions=3, **options)
  )
  _assert_same(shared(params, prompts, mask, rng, cfg), expected)


def test_an_adapter_counts():
  model, params, generate = _model()
  adapted = with_adapter(params)
  expected = generate(adapted, *_args())
  _assert_same(_many()(adapted, *_args()), expected)
  without = generate(params, *_args())
  assert (without.completions != expected.completions).any()


def test_heads_split_over_devices_change_nothing():
  model, params = small_language_model(vocab_size=20, **VARIANTS["window"])
  mesh = device_mesh.make_mesh(MeshConfig(tensor=2), jax.devices()[:2])
  split = sharding.place(params, partitioning.POLICY_RULES, mesh)
  prompts, mask, rng, cfg = _args()
  many = jax.jit(make_generate_many(model, 4, is_unrolled=False))
  rows = device_mesh.put_rows((prompts, mask), mesh)
  expected = jax.jit(make_generate(model, is_unrolled=False))(
      params, prompts, mask, rng, cfg
  )
  _assert_same(many(split, *rows, rng, cfg), expected)


def test_nothing_is_left_of_who_had_the_slot_before():
  """Not even what is masked: 0 * NaN would be NaN."""
  _, params, generate = _model()
  prompts, mask, rng, cfg = _args()
  prompts = prompts.at[4].set(99)  # not in the vocabulary: NaN
  expected = generate(params, prompts, mask, rng, cfg)
  assert np.isnan(expected.logprobs[4]).any()
  actual = _many(num_slots=1)(params, prompts, mask, rng, cfg)
  others = np.arange(N) != 4
  _assert_same(jax.tree.map(lambda x: x[others], actual), expected, others)


def test_a_step_copies_no_cache():
  """But the zeros in the beginning: a loop that copied would lose its gain."""
  _, params, _ = _model("window")
  for is_unrolled, shape in (
      (True, f"4,2,{P + C - 1},6"), (False, f"2,4,2,{P + C - 1},6")
  ):
    many = _many("window", is_unrolled=is_unrolled)
    # As users compile it, and not as conftest.py has it.
    options = {"xla_cpu_use_fusion_emitters": True}
    text = many.lower(params, *_args()).compile(options).as_text()
    loops, main = text.split("\nENTRY ")
    assert re.search(rf"f32\[{shape}\]\S* dynamic-update-slice\(", loops)
    assert not re.search(rf"f32\[{shape}\]\S* copy\(", loops)


class _Script:
  """Stands in for a model: prompt i's likeliest token t is script[i, t].

  The last token of a prompt is its number, which the cache has to keep.
  """

  def __init__(self, script):
    self.config = small_config(max_length=2000, num_layers=1, vocab_size=19)
    self.script = jnp.asarray(script, jnp.int32)
    self.widths = []

  def apply(self, variables, tokens, mask, cache, last=1):
    width = tokens.shape[1]
    jax.debug.callback(lambda: self.widths.append(width))
    before = jnp.max(cache.positions, axis=1, keepdims=True) + 1
    positions = before + jnp.cumsum(mask, axis=1) - 1
    layers = cache.layers
    if cache.empty:
      number = tokens[:, -1].astype(jnp.float32)
      layers = tuple(
          jnp.broadcast_to(number[None, :, None, None, None], x.shape)
          for x in layers
      )
    number = jnp.max(layers[0][0], axis=(1, 2, 3)).astype(jnp.int32)
    # A slot that has ended has no place: clipped, and nobody reads it.
    step = jnp.clip(positions[:, -1] + 1 - P, 0, self.script.shape[1] - 1)
    logits = 9.0 * jax.nn.one_hot(self.script[number, step], 19)[:, None]
    slots = jnp.where(mask > 0, positions, -1)
    return logits, dataclasses.replace(
        cache,
        layers=layers,
        positions=jax.lax.dynamic_update_slice_in_dim(
            cache.positions, slots, cache.index, axis=1
        ),
        index=cache.index + width,
        empty=False,
    )


def _play(script, make, **fields):
  """(rollout, widths of the calls) of all prompts by `make`(model)."""
  model = _Script(script)
  n, length = script.shape
  prompts = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], (n, P))
  cfg = SamplingConfig(max_new_tokens=length, eos_id=1, greedy=True, **fields)
  generate = jax.jit(make(model, is_unrolled=False))
  mask = jnp.ones_like(prompts)
  rollout = generate({}, prompts, mask, jax.random.key(0), cfg)
  jax.effects_barrier()
  return rollout, model.widths


def _script(lengths, max_length):
  rng = np.random.default_rng(1)
  script = rng.integers(2, 19, (len(lengths), max_length))
  for row, length in zip(script, lengths):
    row[length - 1 :][:1] = 1
  return script


def test_a_mix_of_lengths_takes_few_steps():
  """Mean a quarter of the longest: 1.8 times fewer steps than batches take."""
  max_length, num_slots = 64, 8
  rng = np.random.default_rng(0)
  lengths = np.minimum(
      rng.geometric(4 / max_length, 8 * num_slots), max_length
  )
  assert abs(lengths.mean() - max_length / 4) < 2
  script = _script(lengths, max_length)
  rollout, widths = _play(
      script, functools.partial(make_generate_many, num_slots=num_slots)
  )
  np.testing.assert_array_equal(_lengths(rollout), lengths)
  mask = np.asarray(rollout.completion_mask) == 1
  np.testing.assert_array_equal(
      np.asarray(rollout.completions)[mask], script[mask]
  )
  assert widths.count(P) == len(lengths) // (num_slots // 4)
  at_once = 0
  for start in range(0, len(lengths), num_slots):
    part, own = _play(script[start : start + num_slots], make_generate)
    at_once += own.count(1)
  assert at_once == lengths.reshape(8, num_slots).max(axis=1).sum() - 8
  assert widths.count(1) < at_once / 1.8


def test_rows_that_end_with_their_first_token_are_never_decoded():
  rollout, widths = _play(
      _script([1] * 6, 4), functools.partial(make_generate_many, num_slots=2)
  )
  assert widths == [P] * 6
  assert rollout.ended.all()
  np.testing.assert_array_equal(_lengths(rollout), [1] * 6)


def test_the_last_prompts_do_not_wait_to_be_as_many_as_a_refill():
  lengths = [2, 9, 9, 9, 3]
  make = functools.partial(make_generate_many, num_slots=4, refill_size=4)
  rollout, widths = _play(_script(lengths, 9), make)
  np.testing.assert_array_equal(_lengths(rollout), lengths)
  # The fifth comes after one step, and ends while the others go on.
  assert widths.index(P, 1) == 2
  assert widths.count(1) == 8


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_slots": 0}, "num_slots must be >= 1: 0"),
        (
            {"num_slots": 4, "refill_size": 5},
            "refill_size=5 prompts of 1 completions each must be at least 1 "
            "and fit into num_slots=4",
        ),
        ({"num_slots": 4, "refill_size": 0}, "refill_size=0 .* at least 1"),
        ({"num_slots": 4, "num_completions": 5}, "fit into num_slots=4"),
        ({"num_slots": 4, "num_completions": 0}, "num_completions must be >="),
    ],
)
def test_sizes_that_make_no_sense_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    make_generate_many(_model()[0], **fields)
