import dataclasses
import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest
import scipy.stats

from rlhf_jax import collectives
from rlhf_jax.generation import engine
from rlhf_jax.generation.decode import SamplingConfig, make_generate
from rlhf_jax.losses.language_modeling import token_logprobs
from rlhf_jax.models.families import huggingface
from rlhf_jax.models.heads import LanguageModel
from tests.models.families import hf_models
from tests.models.small import (
  VARIANTS,
  random_tokens,
  small_config,
  small_language_model,
  with_adapter,
)

B, P, C = 8, 5, 7
PROMPT_LENGTHS = np.asarray([1, 2, 3, 4, 5, 5, 2, 3])
PROMPT_MASK = jnp.asarray(
    np.arange(P)[None] >= P - PROMPT_LENGTHS[:, None], jnp.int32
)


@functools.cache
def _model(variant="llama", **changes):
  model, params = small_language_model(**VARIANTS[variant], **changes)
  return model, params, jax.jit(make_generate(model))


def _generate(variant="llama", seed=0, **fields):
  _, params, generate = _model(variant)
  cfg = SamplingConfig(**{"max_new_tokens": C, "eos_id": 3, **fields})
  prompts = random_tokens(seed, B, P)
  return generate(params, prompts, PROMPT_MASK, jax.random.key(seed), cfg)


def _whole(rollout):
  tokens = jnp.concatenate([rollout.prompts, rollout.completions], axis=1)
  mask = [rollout.prompt_mask, rollout.completion_mask]
  return tokens, jnp.concatenate(mask, axis=1)


@pytest.mark.parametrize("variant", ["llama", "gpt2_untied"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_rollout_logprobs_equal_those_of_one_full_forward(
    variant, temperature
):
  model, params, _ = _model(variant)
  rollout = _generate(
      variant, temperature=temperature, stop_ids=(2, 5, 7, 11)
  )
  tokens, mask = _whole(rollout)
  logits, _ = jax.jit(model.apply, static_argnames="last")(
      {"params": params}, tokens, mask, last=C + 1
  )
  expected = token_logprobs(
      logits, tokens[:, P - 1 :], temperature=temperature
  )
  real = np.asarray(rollout.completion_mask) == 1
  assert 0 < real.sum() < real.size
  np.testing.assert_allclose(
      rollout.logprobs[real], expected[real], atol=1e-5
  )
  assert not np.asarray(rollout.logprobs)[~real].any()


@pytest.mark.parametrize("variant", ["llama", "gpt2_untied"])
def test_greedy_equals_argmax_of_full_forwards_without_a_cache(variant):
  model, params, _ = _model(variant)
  rollout = _generate(variant, greedy=True, eos_id=-1)
  tokens, mask = rollout.prompts, PROMPT_MASK
  tokens = jnp.pad(tokens, ((0, 0), (0, C)))
  mask = jnp.pad(mask, ((0, 0), (0, C)))
  apply = jax.jit(model.apply)
  for t in range(P, P + C):
    logits, _ = apply({"params": params}, tokens, mask)
    tokens = tokens.at[:, t].set(jnp.argmax(logits[:, t - 1], axis=-1))
    mask = mask.at[:, t].set(1)
  np.testing.assert_array_equal(rollout.completions, tokens[:, P:])
  assert not rollout.ended.any()


@pytest.mark.parametrize(
    "variant",
    ["gpt2", "window", "gemma", "two_ropes", "post_norm", "experts"],
)
def test_unrolled_layers_generate_what_a_scan_over_them_does(variant):
  """Ragged prompts, rows that end early, windows that are left behind."""
  model, params, generate = _model(variant)
  scanned = jax.jit(make_generate(model, is_unrolled=False))
  cfg = SamplingConfig(max_new_tokens=12, eos_id=3, stop_ids=(2, 7, 11))
  args = random_tokens(0, B, P), PROMPT_MASK, jax.random.key(0), cfg
  fast, plain = generate(params, *args), scanned(params, *args)
  _same_rows(fast, plain, np.arange(B))
  lengths = np.sum(fast.completion_mask, axis=1)
  assert lengths.min() < 6
  assert lengths.max() > 6


def test_unrolled_layers_take_an_adapter_and_weights_in_the_matmuls_dtype():
  model, params = small_language_model(dtype="bfloat16", **VARIANTS["experts"])
  adapted = with_adapter(params)
  cfg = SamplingConfig(max_new_tokens=C, eos_id=-1, greedy=True)
  args = random_tokens(0, B, P), PROMPT_MASK, jax.random.key(0), cfg
  fast, plain, without = (
      jax.jit(make_generate(model, is_unrolled=x))(weights, *args)
      for x, weights in ((True, adapted), (False, adapted), (True, params))
  )
  np.testing.assert_array_equal(fast.completions, plain.completions)
  np.testing.assert_allclose(fast.logprobs, plain.logprobs, atol=0.02)
  assert (fast.completions != without.completions).any()


def test_first_tokens_follow_the_models_distribution():
  model, params, generate = _model()
  num, temperature = 4096, 0.8
  prompt = random_tokens(1, 1, P)
  rollout = generate(
      params,
      jnp.tile(prompt, (num, 1)),
      jnp.ones((num, P), jnp.int32),
      jax.random.key(0),
      SamplingConfig(max_new_tokens=1, eos_id=3, temperature=temperature),
  )
  logits, _ = jax.jit(model.apply)({"params": params}, prompt)
  weights = np.exp(np.float64(logits[0, -1]) / temperature)
  expected = num * weights / weights.sum()
  assert expected.min() > 5
  counts = np.bincount(np.asarray(rollout.completions[:, 0]), minlength=19)
  assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3


def test_top_k_and_top_p_bound_the_draw_but_not_the_logprobs():
  model, params, _ = _model()
  for fields in ({"top_k": 2}, {"use_top_p": True, "top_p": 0.5}):
    rollout = _generate(eos_id=-1, **fields)
    tokens, mask = _whole(rollout)
    logits, _ = jax.jit(model.apply)({"params": params}, tokens, mask)
    logits = logits[:, P - 1 : -1]
    expected = token_logprobs(
        jnp.pad(logits, ((0, 0), (0, 1), (0, 0))), tokens[:, P - 1 :]
    )
    np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-5)
    larger = logits > jnp.take_along_axis(
        logits, rollout.completions[..., None], axis=-1
    )
    if "top_k" in fields:
      assert (np.sum(larger, axis=-1) < 2).all()
    else:
      probs = jax.nn.softmax(logits, axis=-1)
      mass_before = np.sum(np.where(larger, probs, 0.0), axis=-1)
      assert (mass_before < 0.5 + 1e-5).all()


def _same_rows(actual, expected, order):
  for name in ("completions", "completion_mask", "ended"):
    np.testing.assert_array_equal(
        getattr(actual, name), getattr(expected, name)[order]
    )
  np.testing.assert_allclose(
      actual.logprobs, expected.logprobs[order], atol=1e-5
  )


def test_sample_of_a_row_follows_its_row_number_not_its_place():
  """Permuted, or in a smaller batch, or beside others: the same completion."""
  _, params, generate = _model()
  cfg = SamplingConfig(max_new_tokens=C, eos_id=3)
  whole = _generate()
  for order in ([4, 7, 1, 0, 6, 2, 3, 5], [6, 2]):
    rows = jnp.asarray(order)
    part = generate(
        params,
        whole.prompts[rows],
        PROMPT_MASK[rows],
        jax.random.key(0),
        cfg,
        rows,
    )
    _same_rows(part, whole, np.asarray(order))
  others = random_tokens(9, B, P).at[2].set(whole.prompts[2])
  beside = generate(params, others, PROMPT_MASK, jax.random.key(0), cfg)
  np.testing.assert_array_equal(beside.completions[2], whole.completions[2])
  assert (beside.completions != whole.completions).any()


def test_equal_prompts_in_different_rows_differ_and_seeds_reproduce():
  _, params, generate = _model()
  prompts = jnp.tile(random_tokens(0, 1, P), (B, 1))
  mask = jnp.ones((B, P), jnp.int32)
  cfg = SamplingConfig(max_new_tokens=C, eos_id=-1, temperature=2.0)
  first, again, other = (
      generate(params, prompts, mask, jax.random.key(seed), cfg).completions
      for seed in (0, 0, 1)
  )
  assert len({tuple(row) for row in np.asarray(first).tolist()}) == B
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()


def test_sharding_the_batch_does_not_change_a_sample():
  _, params, generate = _model()
  mesh = Mesh(np.asarray(jax.devices()), ("data",))
  shard = NamedSharding(mesh, PartitionSpec("data"))
  replicate = NamedSharding(mesh, PartitionSpec())
  whole = _generate()
  sharded = generate(
      jax.device_put(params, replicate),
      jax.device_put(whole.prompts, shard),
      jax.device_put(PROMPT_MASK, shard),
      jax.device_put(jax.random.key(0), replicate),
      SamplingConfig(max_new_tokens=C, eos_id=3),
  )
  _same_rows(sharded, whole, np.arange(B))


@hypothesis.given(left=st.integers(0, 4), garbage=st.integers(-9, 10**6))
@hypothesis.settings(max_examples=8)
def test_amount_of_left_padding_does_not_change_a_completion(left, garbage):
  _, params, generate = _model()
  cfg = SamplingConfig(max_new_tokens=C, eos_id=3)
  prompt = random_tokens(2, 1, P)[:, left:]
  padded = jnp.pad(prompt, ((0, 0), (left, 0)), constant_values=garbage)
  mask = jnp.pad(jnp.ones_like(prompt), ((0, 0), (left, 0)))
  expected, actual = (
      generate(params, p, m, jax.random.key(0), cfg)
      for p, m in ((prompt, jnp.ones_like(prompt)), (padded, mask))
  )
  _same_rows(actual, expected, np.arange(1))


class _Script:
  """Stands in for a model: row b's likeliest token t is script[b, t]."""

  def __init__(self, script):
    self.config = small_config(max_length=2000, num_layers=1)
    self.script = jnp.asarray(script, jnp.int32)
    self.calls = []

  def apply(self, variables, tokens, mask, cache, last=1):
    jax.debug.callback(lambda index: self.calls.append(int(index)), cache.index)
    index = cache.index + tokens.shape[1]
    logits = 9.0 * jax.nn.one_hot(self.script[:, index - P], 19)[:, None]
    return logits, dataclasses.replace(cache, index=index, empty=False)


def _play(script, **fields):
  model = _Script(script)
  rows, length = model.script.shape
  cfg = SamplingConfig(
      **{"max_new_tokens": length, "eos_id": 1, "greedy": True, **fields}
  )
  ones = jnp.ones((rows, P), jnp.int32)
  # It has no layers that could be taken apart.
  generate = make_generate(model, is_unrolled=False)
  rollout = generate({}, ones, ones, jax.random.key(0), cfg)
  jax.effects_barrier()
  return rollout, model.calls


def test_eos_is_part_of_the_completion_and_padding_follows():
  rollout, _ = _play([[5, 1, 6, 7], [5, 6, 7, 1], [5, 6, 7, 8]], pad_id=9)
  np.testing.assert_array_equal(
      rollout.completions, [[5, 1, 9, 9], [5, 6, 7, 1], [5, 6, 7, 8]]
  )
  np.testing.assert_array_equal(
      rollout.completion_mask, [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
  )
  np.testing.assert_array_equal(rollout.ended, [True, True, False])
  assert not rollout.logprobs[0, 2:].any()
  assert (rollout.logprobs[0, :2] < 0).all()


def test_pad_equal_to_eos_still_leaves_eos_real():
  rollout, _ = _play([[5, 1, 6, 7], [1, 1, 1, 1], [5, 6, 7, 8]], pad_id=1)
  np.testing.assert_array_equal(
      rollout.completions, [[5, 1, 1, 1], [1, 1, 1, 1], [5, 6, 7, 8]]
  )
  np.testing.assert_array_equal(
      rollout.completion_mask, [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
  )
  np.testing.assert_array_equal(rollout.ended, [True, True, False])


@pytest.mark.parametrize("pad_id", [0, 1, 4])
def test_any_of_several_end_ids_ends_a_completion(pad_id):
  script = [[5, 4, 6, 7], [5, 6, 1, 7], [4, 1, 4, 1], [5, 6, 7, 8]]
  rollout, _ = _play(script, other_eos_ids=(4, 2), pad_id=pad_id)
  np.testing.assert_array_equal(
      rollout.completion_mask,
      [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
  )
  x = pad_id
  np.testing.assert_array_equal(
      rollout.completions, [[5, 4, x, x], [5, 6, 1, x], [4, x, x, x], script[3]]
  )
  np.testing.assert_array_equal(rollout.ended, [True, True, True, False])


def test_greedy_with_a_list_of_end_ids_is_that_of_generate():
  torch = pytest.importorskip("torch", reason="compares with torch")
  transformers = pytest.importorskip("transformers")
  folder = hf_models.GOLDEN / "llama"
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, attn_implementation="eager"
  )
  loaded = huggingface.load_folder(folder)
  tokens, mask = hf_models.rows("left", 12)
  generate = jax.jit(make_generate(LanguageModel(loaded.config)))

  def ours(**fields):
    return generate(
        loaded.params,
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(mask, jnp.int32),
        jax.random.key(0),
        SamplingConfig(max_new_tokens=24, greedy=True, **fields),
    )

  # The one ends the first row, the other the second, and none the third.
  free = np.asarray(ours(eos_id=-1).completions)
  ends = [34, 16]
  theirs = model.generate(
      input_ids=torch.as_tensor(tokens),
      attention_mask=torch.as_tensor(mask),
      max_new_tokens=24,
      do_sample=False,
      eos_token_id=ends,
      pad_token_id=ends[0],  # padding that is an end
  )[:, 12:].numpy()
  rollout = ours(eos_id=ends[0], other_eos_ids=(ends[1],), pad_id=ends[0])
  lengths = np.asarray(rollout.completion_mask).sum(axis=1)
  assert len(set(lengths)) == 3
  np.testing.assert_array_equal(rollout.ended, [True, True, False])
  width = theirs.shape[1]
  np.testing.assert_array_equal(rollout.completions[:, :width], theirs)
  first_end = np.argmax(np.isin(free, ends), axis=1) + 1
  first_end[~np.isin(free, ends).any(axis=1)] = 24
  np.testing.assert_array_equal(lengths, first_end)


def test_stop_ids_end_a_completion_only_after_the_given_token():
  script = [
      [4, 5, 6, 7, 8],  # too early: goes on
      [5, 6, 4, 7, 8],  # token 2 is the first that may
      [4, 4, 8, 2, 8],  # the other stop id, later
      [1, 5, 6, 7, 8],  # eos ends anywhere
  ]
  rollout, _ = _play(script, stop_ids=(4, 2), stop_after=2)
  np.testing.assert_array_equal(
      np.sum(rollout.completion_mask, axis=1), [5, 3, 4, 1]
  )
  np.testing.assert_array_equal(rollout.ended, [False, True, True, True])
  rollout, _ = _play(script, stop_ids=(4, 2))
  np.testing.assert_array_equal(
      np.sum(rollout.completion_mask, axis=1), [1, 3, 1, 1]
  )


def test_loop_ends_when_every_row_has_ended():
  script = np.full((2, 1000), 5)
  script[0, 1] = script[1, 2] = 1
  rollout, calls = _play(script)
  assert sorted(calls) == [0, P, P + 1]
  np.testing.assert_array_equal(np.sum(rollout.completion_mask, axis=1), [2, 3])


def test_runs_side_by_side_are_their_lone_runs_and_select_no_cache():
  """Also when one has long ended: a loop's condition is that of all."""
  model, params, _ = _model()
  both = jax.tree.map(lambda x: jnp.stack([x, 0.3 * x]), params)
  rngs = jax.random.split(jax.random.key(3), 2)
  prompts = jnp.stack([random_tokens(seed, B, P) for seed in (0, 1)])
  cfg = SamplingConfig(
      max_new_tokens=C, eos_id=3, stop_ids=tuple(range(0, 19, 2))
  )

  def one(params, prompts, rng):
    return make_generate(model)(params, prompts, PROMPT_MASK, rng, cfg)

  every = jax.jit(jax.vmap(one, axis_name=collectives.MEMBERS))
  found, lengths = every(both, prompts, rngs), []
  for i in range(2):
    own = jax.tree.map(lambda x: x[i], (both, prompts, rngs))
    wanted = jax.jit(one)(*own)
    lengths.append(int(wanted.completion_mask.sum(axis=1).max()))
    for name in ("completions", "completion_mask", "ended"):
      np.testing.assert_array_equal(
          getattr(found, name)[i], getattr(wanted, name)
      )
    np.testing.assert_allclose(found.logprobs[i], wanted.logprobs, atol=1e-5)
  assert lengths[0] != lengths[1]
  cache = rf"f32\[2,{B},\d+,{P + C - 1},\d+\]\S* "
  loops, _ = every.lower(both, prompts, rngs).compile().as_text().split(
      "\nENTRY "
  )
  assert re.search(cache + r"dynamic-update-slice\(", loops)
  assert not re.search(cache + r"(select|copy)\(", loops)


def test_last_token_is_not_fed_back():
  _, calls = _play(np.full((2, 4), 5))
  assert sorted(calls) == [0, P, P + 1, P + 2]


def test_temperature_and_top_p_are_data():
  model, params, _ = _model()
  traces = []

  @jax.jit
  def generate(*args):
    traces.append(None)
    return make_generate(model)(*args)

  for temperature, top_p in ((0.5, 0.9), (1.5, 0.3)):
    cfg = SamplingConfig(
        max_new_tokens=2,
        eos_id=3,
        temperature=temperature,
        use_top_p=True,
        top_p=top_p,
    )
    generate(
        params, random_tokens(0, B, P), PROMPT_MASK, jax.random.key(0), cfg
    )
  assert len(traces) == 1


def test_bfloat16_rollout_has_float32_logprobs():
  _, params, generate = _model("llama", dtype="bfloat16")
  cfg = SamplingConfig(max_new_tokens=C, eos_id=3)
  rollout = generate(
      params, random_tokens(0, B, P), PROMPT_MASK, jax.random.key(0), cfg
  )
  assert rollout.logprobs.dtype == jnp.float32
  assert (rollout.logprobs <= 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1: 0"),
        ({"temperature": 0.0}, "temperature must be > 0: 0.0; use greedy"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]: 1.5"),
        ({"top_k": -1}, "top_k must be >= 0: -1"),
        ({"stop_after": -1}, "stop_after must be >= 0: -1"),
    ],
)
def test_sampling_config_names_the_wrong_field(fields, message):
  with pytest.raises(ValueError, match=message):
    SamplingConfig(**{"max_new_tokens": 4, "eos_id": 1, **fields})


@pytest.mark.parametrize("is_unrolled", [True, False])
def test_more_tokens_than_a_model_has_positions_are_refused(is_unrolled):
  model, params = small_language_model(max_length=8)
  generate = make_generate(model, is_unrolled=is_unrolled)
  cfg = SamplingConfig(max_new_tokens=9, eos_id=-1)
  args = (params, random_tokens(0, B, P), PROMPT_MASK, jax.random.key(0))
  with pytest.raises(ValueError, match="length 13 .*max_length=8"):
    jax.eval_shape(generate, *args, cfg)


@pytest.mark.parametrize("num_slots", [None, 4])
def test_another_number_of_row_numbers_is_refused(num_slots):
  model, params = small_language_model()
  twice = dict(num_completions=2)
  generate = (
      make_generate(model, **twice)
      if num_slots is None
      else engine.make_generate_many(model, num_slots, **twice)
  )
  cfg = SamplingConfig(max_new_tokens=C, eos_id=-1)
  args = (params, random_tokens(0, B, P), PROMPT_MASK, jax.random.key(0))
  with pytest.raises(ValueError, match=f"rows has shape .{B},.*{2 * B} rows"):
    jax.eval_shape(generate, *args, cfg, jnp.arange(B))
