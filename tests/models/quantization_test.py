"""Layers in int8 against a quantiser written as loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.generation.decode import SamplingConfig, make_generate
from rlhf_jax.generation.engine import make_generate_many
from rlhf_jax.losses.language_modeling import token_logprobs
from rlhf_jax.models import quantization
from tests.models.small import (
  VARIANTS,
  random_tokens,
  small_language_model,
  with_adapter,
)

B, P, C = 6, 5, 8
# How many axes of a layer's kernel an output channel sums over, in front.
SUMMED = {"attention/out": 2}


def _rounded(kernel, num_summed):
  """The floats that a layer's int8 kernel stands for, channel by channel."""
  kernel = np.asarray(kernel, np.float32)
  flat = kernel.reshape(int(np.prod(kernel.shape[:num_summed])), -1).copy()
  for channel in flat.T:
    scale = np.abs(channel).max() / np.float32(127)
    for i, weight in enumerate(channel):
      channel[i] = scale * np.float32(round(float(weight / scale)))
  return flat.reshape(kernel.shape)


def _names(path):
  return [x.key for x in path]


def _rounded_params(params):
  """The params with every kernel of a layer rounded, but for routers."""

  def one(path, x):
    names = _names(path)
    if names[-1] != "kernel" or "layers" not in names or "router" in names:
      return x
    num_summed = SUMMED.get("/".join(names[2:4]), 1)
    if "experts" in names:
      layers = [[_rounded(e, num_summed) for e in layer] for layer in x]
    else:
      layers = [_rounded(layer, num_summed) for layer in x]
    return jnp.asarray(np.asarray(layers))

  return jax.tree_util.tree_map_with_path(one, params)


def _args(**fields):
  mask = jnp.ones((B, P), jnp.int32).at[0, :3].set(0)
  cfg = SamplingConfig(max_new_tokens=C, eos_id=3, **fields)
  return random_tokens(0, B, P), mask, jax.random.key(0), cfg


@pytest.mark.parametrize(
    "shape, axes", [((7, 5), (0,)), ((3, 4, 6), (0, 1)), ((2, 5, 3), (1,))]
)
def test_a_weight_is_off_by_half_a_step_of_its_channel_at_most(shape, axes):
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal(shape).astype(np.float32)
  kernel *= rng.uniform(0.01, 10, shape[-1]).astype(np.float32)
  integers, scale = quantization.quantize(jnp.asarray(kernel), axes)
  assert integers.dtype == jnp.int8 and scale.dtype == jnp.float32
  step = np.expand_dims(np.asarray(scale), axes)
  error = np.abs(np.asarray(integers) * step - kernel)
  assert (error <= step * (0.5 + 1e-5)).all()
  assert error.max() > 0.4 * step.min()
  largest = np.abs(np.asarray(integers, np.int32)).max(axis=axes)
  np.testing.assert_array_equal(largest, np.full(scale.shape, 127))


def test_the_example_and_channels_of_zeros_and_of_nan():
  integers, scale = quantization.quantize(
      jnp.asarray([[0.5, 0.0, jnp.nan], [-2.54, 0.0, 1.0]]), axes=(0,)
  )
  np.testing.assert_array_equal(integers[:, 0], [25, -127])
  np.testing.assert_array_equal(integers[:, 1], [0, 0])
  np.testing.assert_allclose(scale, [0.02, 0.0, jnp.nan], rtol=1e-6)


@pytest.mark.parametrize(
    "variant, has_adapter, is_unrolled",
    [
        ("gpt2_untied", False, True),
        ("experts", False, False),
        ("gemma", True, True),
    ],
)
def test_samples_are_those_of_floats_that_a_loop_has_rounded(
    variant, has_adapter, is_unrolled
):
  model, params = small_language_model(**VARIANTS[variant])
  rounded = _rounded_params(params)
  if has_adapter:
    params, rounded = with_adapter(params), with_adapter(rounded)
  make = lambda **kwargs: jax.jit(make_generate(model, is_unrolled, **kwargs))
  actual = make(weights="int8")(params, *_args())
  expected = make()(rounded, *_args())
  np.testing.assert_array_equal(actual.completions, expected.completions)
  np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-4)
  unrounded = make()(params, *_args())
  off = np.abs(actual.logprobs - unrounded.logprobs)[:, 0]
  assert off.max() > 1e-3


def test_reported_logprobs_are_of_a_forward_pass_with_rounded_weights():
  model, params = small_language_model()
  cfg = _args(temperature=0.7)
  rollout = jax.jit(make_generate(model, weights="int8"))(params, *cfg)
  tokens = jnp.concatenate([rollout.prompts, rollout.completions], axis=1)
  mask = jnp.concatenate(
      [rollout.prompt_mask, rollout.completion_mask], axis=1
  )
  logits, _ = jax.jit(model.apply, static_argnames="last")(
      {"params": _rounded_params(params)}, tokens, mask, last=C + 1
  )
  expected = token_logprobs(logits, tokens[:, P - 1 :], temperature=0.7)
  real = np.asarray(rollout.completion_mask) == 1
  np.testing.assert_allclose(
      rollout.logprobs[real], expected[real], atol=1e-4
  )


def test_slots_sample_from_the_same_rounded_model():
  model, params = small_language_model(**VARIANTS["window"])
  expected = jax.jit(make_generate(model, weights="int8"))(params, *_args())
  many = jax.jit(make_generate_many(model, 2, weights="int8"))
  actual = many(params, *_args())
  np.testing.assert_array_equal(actual.completions, expected.completions)
  np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-4)


def _floats_of_kernels(jaxpr, shapes, in_loop=False):
  """(whether in a while loop, shape) of int8 kernels that become floats."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "convert_element_type":
      was = eqn.invars[0].aval
      if was.dtype == jnp.int8 and was.shape in shapes:
        yield in_loop, was.shape
    within = in_loop or eqn.primitive.name == "while"
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _floats_of_kernels(inner, shapes, within)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_one_layers_kernels_are_floats_at_a_time(dtype):
  model, params = small_language_model(dtype=dtype)
  kernels = [
      x.shape
      for path, x in jax.tree_util.tree_leaves_with_path(
          params["trunk"]["layers"]
      )
      if _names(path)[-1] == "kernel"
  ]
  generate = make_generate(model, is_unrolled=False, weights="int8")
  jaxpr = jax.make_jaxpr(generate)(params, *_args()).jaxpr
  layer = {x[1:] for x in kernels}
  found = list(_floats_of_kernels(jaxpr, layer | set(kernels)))
  assert len([x for in_loop, x in found if in_loop]) == len(kernels)
  assert {x for _, x in found} == layer


def test_what_is_not_a_layers_kernel_stays():
  model, params = small_language_model(tie_head=False, **VARIANTS["experts"])
  kept = quantization.quantized({"params": params})["params"]
  changed = {
      "/".join(_names(path)[2:])
      for path, x in jax.tree_util.tree_leaves_with_path(kept)
      if x.dtype == jnp.int8
  }
  assert changed == {
      *(f"attention/{x}/kernel" for x in ("query", "key", "value", "out")),
      *(f"feed_forward/experts/{x}/kernel" for x in ("gate", "up", "down")),
  }


def test_other_weights_are_refused():
  model, params = small_language_model()
  with pytest.raises(ValueError, match="'int4' is none of compute, int8"):
    make_generate(model, weights="int4")(params, *_args())
