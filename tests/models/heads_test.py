import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.heads import (
    ScalarModel,
    scalar_from_language_model,
    scalar_head_init,
    sequence_scores,
)
from tests.models.small import (
    random_params,
    random_tokens,
    small_config,
    small_language_model,
)


@functools.partial(jax.jit, static_argnums=0, static_argnames="last")
def _hidden(model, params, tokens, last):
  return model.apply({"params": params}, tokens, last=last, method="hidden")


@pytest.mark.parametrize("tie_head", [True, False])
def test_last_gives_the_last_positions_of_the_full_logits(tie_head):
  model, params = small_language_model(tie_head=tie_head)
  tokens = random_tokens(0, 2, 7)
  apply = jax.jit(model.apply, static_argnames="last")
  full, _ = apply({"params": params}, tokens)
  last, _ = apply({"params": params}, tokens, last=3)
  np.testing.assert_allclose(last, full[:, 4:], atol=1e-6)
  with pytest.raises(ValueError, match=r"last=8 is not in 1\.\.7"):
    model.apply({"params": params}, tokens, last=8)


@pytest.mark.parametrize("tie_head", [True, False])
def test_the_head_on_some_hidden_states_gives_their_logits(tie_head):
  model, params = small_language_model(tie_head=tie_head)
  tokens = random_tokens(0, 2, 7)
  hidden, cache = _hidden(model, params, tokens, last=2)
  assert cache is None
  table = params["trunk"]["token_embedding"].T
  kernel = table if tie_head else params["head"]["kernel"]
  logits, _ = jax.jit(model.apply)({"params": params}, tokens)
  np.testing.assert_allclose(hidden @ kernel, logits[:, 5:], atol=1e-5)
  some = model.apply({"params": params}, hidden[:, :1], method="logits")
  np.testing.assert_allclose(some, logits[:, 5:6], atol=1e-5)


@pytest.mark.parametrize("tie_head", [True, False])
def test_scalar_model_takes_over_the_language_models_trunk(tie_head):
  model, params = small_language_model(tie_head=tie_head)
  scalar_model = ScalarModel(model.config)
  tokens = random_tokens(0, 2, 7)
  taken = scalar_from_language_model(
      params, jax.random.key(0), model.config, zero_head=False
  )
  fresh = jax.eval_shape(scalar_model.init, jax.random.key(0), tokens)
  fresh = fresh["params"]
  assert jax.tree.structure(taken) == jax.tree.structure(fresh)
  hidden, _ = _hidden(model, params, tokens, last=None)
  taken["head"]["bias"] = jnp.full((1,), 0.5)
  apply = jax.jit(scalar_model.apply, static_argnames="last")
  scalars = apply({"params": taken}, tokens)
  expected = (hidden @ taken["head"]["kernel"])[..., 0] + 0.5
  np.testing.assert_allclose(scalars, expected, atol=1e-5)
  last = apply({"params": taken}, tokens, last=2)
  np.testing.assert_allclose(last, scalars[:, 5:], atol=1e-6)


def test_scalar_head_has_the_published_scale_or_is_zero():
  head = scalar_head_init(jax.random.key(0), 255, zero=False)
  np.testing.assert_allclose(np.std(head["kernel"]), 1 / 16, rtol=0.1)
  np.testing.assert_array_equal(head["bias"], [0.0])
  zero = scalar_head_init(jax.random.key(0), 255, zero=True)
  assert not np.any(zero["kernel"]) and not np.any(zero["bias"])
  model = ScalarModel(small_config(width=255, ff_dim=2))
  fresh = jax.jit(model.init)(jax.random.key(1), random_tokens(0, 1, 2))
  fresh = fresh["params"]["head"]["kernel"]
  np.testing.assert_allclose(np.std(fresh), 1 / 16, rtol=0.1)


def test_scalars_are_float32_under_bfloat16_compute():
  model = ScalarModel(small_config(dtype="bfloat16"))
  params = random_params(model)
  scalars = jax.jit(model.apply)({"params": params}, random_tokens(0, 2, 7))
  assert scalars.dtype == jnp.float32


MODEL = ScalarModel(small_config())
PARAMS = random_params(MODEL)
SCORE = jax.jit(
    lambda tokens, mask: sequence_scores(
        MODEL.apply({"params": PARAMS}, tokens, mask), mask
    )
)


@hypothesis.given(
    left=st.integers(0, 5), right=st.integers(0, 5), seed=st.integers(0, 99)
)
def test_score_does_not_depend_on_padding_side_or_batch(left, right, seed):
  length = 12 - left - right
  document = random_tokens(seed, 12)[:length]
  tokens = random_tokens(seed + 1, 3, 12)
  tokens = tokens.at[1, left : left + length].set(document)
  mask = jnp.ones((3, 12), jnp.int32)
  mask = mask.at[1].set(
      jnp.asarray([0] * left + [1] * length + [0] * right, jnp.int32)
  )
  alone = jnp.zeros((3, 12), jnp.int32).at[0, :length].set(document)
  alone_mask = jnp.zeros((3, 12), jnp.int32).at[0, :length].set(1)
  np.testing.assert_allclose(
      SCORE(tokens, mask)[1], SCORE(alone, alone_mask)[0], atol=1e-5
  )
