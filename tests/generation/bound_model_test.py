"""In which dtype a decoding loop finds its weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.generation.decode import SamplingConfig, make_generate
from rlhf_jax.generation.engine import make_generate_many
from rlhf_jax.models import transformer
from tests.models.small import (
  VARIANTS,
  random_tokens,
  small_language_model,
  with_adapter,
)

B, P, C = 7, 5, 9
ENGINE = functools.partial(make_generate_many, num_slots=3)


def _model(variant, has_adapter=False, **changes):
  changes = {"dtype": "bfloat16", **changes}
  model, params = small_language_model(**VARIANTS[variant], **changes)
  return model, with_adapter(params) if has_adapter else params


def _args():
  mask = jnp.ones((B, P), jnp.int32).at[0, :3].set(0)
  cfg = SamplingConfig(max_new_tokens=C, eos_id=3, stop_ids=(2, 7, 11))
  return random_tokens(0, B, P), mask, jax.random.key(0), cfg


def _weight_shapes(params):
  """Of what matmuls and lookups take: whole, and of one layer."""
  names = ("kernel", "token_embedding", "position_embedding", "lora_a",
           "lora_b")
  shapes = set()
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    keys = [y.key for y in path]
    if keys[-1] in names and "router" not in keys:
      shapes |= {x.shape, x.shape[1:] if "layers" in keys else x.shape}
  return shapes


def _converted(jaxpr, to, in_loop=False):
  """(whether a while loop does it, shape) of each conversion to a dtype."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "convert_element_type":
      if eqn.params["new_dtype"] == to and eqn.invars[0].aval.dtype != to:
        yield in_loop, eqn.invars[0].aval.shape
    within = in_loop or eqn.primitive.name == "while"
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _converted(inner, to, within)


def _converted_weights(generate, params, to):
  """How many weights a program converts (before a loop, in each step)."""
  jaxpr = jax.make_jaxpr(generate)(params, *_args()).jaxpr
  shapes = _weight_shapes(params)
  found = [in_loop for in_loop, x in _converted(jaxpr, to) if x in shapes]
  return found.count(False), found.count(True)


@pytest.mark.parametrize("make", [make_generate, ENGINE])
@pytest.mark.parametrize(
    "variant, has_adapter",
    [("gpt2_untied", False), ("gpt2", False), ("experts", True)],
)
def test_a_step_converts_no_weights(make, variant, has_adapter):
  model, params = _model(variant, has_adapter)
  generate = make(model, is_unrolled=False)
  before, within = _converted_weights(generate, params, jnp.bfloat16)
  assert before > 0
  assert within == 0


def test_unrolled_layers_convert_none_in_a_step_either():
  model, params = _model("experts", has_adapter=True)
  generate = make_generate(model, is_unrolled=True)
  before, within = _converted_weights(generate, params, jnp.bfloat16)
  assert before > 0
  assert within == 0


def test_weights_in_bfloat16_are_not_copied_to_float32():
  model, params = _model("llama", dtype="float32", param_dtype="bfloat16")
  generate = make_generate(model, is_unrolled=False)
  whole = params["trunk"]["layers"]["feed_forward"]["up"]["kernel"].shape
  jaxpr = jax.make_jaxpr(generate)(params, *_args()).jaxpr
  found = [x for _, x in _converted(jaxpr, jnp.float32)]
  assert whole not in found
  assert whole[1:] in found


@pytest.mark.parametrize(
    "make, variant, has_adapter",
    [
        (make_generate, "gpt2_untied", False),
        (make_generate, "experts", True),
        (ENGINE, "gemma", False),
    ],
)
def test_samples_are_bitwise_those_of_weights_converted_where_they_are_used(
    make, variant, has_adapter, monkeypatch
):
  model, params = _model(variant, has_adapter)
  rollouts = []
  for convert in (transformer.in_matmul_dtype, lambda variables, _: variables):
    monkeypatch.setattr(transformer, "in_matmul_dtype", convert)
    # Two functions: one would be compiled once.
    generate = jax.jit(make(model, is_unrolled=False))
    rollouts.append(generate(params, *_args()))
  jax.tree.map(np.testing.assert_array_equal, *rollouts)
  assert len(set(np.sum(rollouts[0].completion_mask, axis=1).tolist())) > 1


def test_what_is_computed_in_float32_is_not_rounded():
  _, params = _model("experts")
  kept = transformer.in_matmul_dtype({"params": params}, "bfloat16")["params"]
  layers = kept["trunk"]["layers"]
  exact = [
      layers["attention_norm"]["scale"],
      layers["feed_forward_norm"]["scale"],
      layers["feed_forward"]["router"]["kernel"],
      kept["trunk"]["final_norm"]["scale"],
  ]
  assert {x.dtype for x in exact} == {jnp.dtype("float32")}
  others = sum(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(kept))
  assert others == len(jax.tree.leaves(kept)) - len(exact)
