import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.transformer import init_cache, unrolled, unrolled_cache
from tests.models.small import VARIANTS, random_tokens, small_language_model

MASK = np.asarray(
    [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9, [0, 0, 1, 1, 1, 1, 1, 0, 0]]
)


@pytest.mark.parametrize(
    "variant",
    [
        "llama",
        "gpt2",
        "rotary_with_bias",
        "neox",
        "qk_norm",
        "window",
        "gemma",
        "two_ropes",
        "post_norm",
        "experts",
    ],
)
@pytest.mark.parametrize("chunks", [[1] * 9, [5, 1, 1, 1, 1], [3, 4, 2], [9]])
def test_cached_decoding_equals_full_forward(variant, chunks):
  model, params = small_language_model(**VARIANTS[variant])
  tokens, mask = random_tokens(0, 3, 9), jnp.asarray(MASK)
  step = jax.jit(model.apply)
  expected, _ = step({"params": params}, tokens, mask)
  cache = init_cache(model.config, 3, 11)
  pieces, start = [], 0
  for n in chunks:
    piece = slice(start, start + n)
    logits, cache = step(
        {"params": params}, tokens[:, piece], mask[:, piece], cache
    )
    pieces.append(logits)
    start += n
  assert int(cache.index) == 9
  positions = np.where(MASK == 1, np.cumsum(MASK, axis=1) - 1, -1)
  np.testing.assert_array_equal(cache.positions[:, :9], positions)
  assert (cache.positions[:, 9:] == -1).all()
  actual = np.concatenate(pieces, axis=1)
  np.testing.assert_allclose(
      actual[MASK == 1], np.asarray(expected)[MASK == 1], atol=1e-5
  )


@pytest.mark.parametrize("variant", ["llama", "gemma"])
@pytest.mark.parametrize("chunks", [[5, 1, 1, 1, 1], [3, 4, 2]])
def test_a_cache_of_unrolled_layers_is_equal_to_that_of_a_scan(
    variant, chunks
):
  model, params = small_language_model(**VARIANTS[variant])
  twin = model.clone(is_unrolled=True)
  variables = {"params": params}
  apart = unrolled(variables, "float32")
  assert set(apart["params"]["trunk"]) >= {"layers_0", "layers_1"}
  tokens, mask = random_tokens(0, 3, 9), jnp.asarray(MASK)
  cache = init_cache(model.config, 3, 11)
  own = unrolled_cache(init_cache(model.config, 3, 1), 11)
  start = 0
  for n in chunks:
    piece = tokens[:, start : start + n], mask[:, start : start + n]
    expected, cache = jax.jit(model.apply)(variables, *piece, cache)
    actual, own = jax.jit(twin.apply)(apart, *piece, own)
    real = MASK[:, start : start + n] == 1
    np.testing.assert_allclose(
        np.asarray(actual)[real], np.asarray(expected)[real], atol=1e-5
    )
    start += n
  real = np.asarray(cache.positions) >= 0
  for i, pair in enumerate(own.layers):
    for x, stacked in zip(pair, cache.layers, strict=True):
      x, y = (np.moveaxis(z, 2, 1)[real] for z in (x, stacked[i]))
      np.testing.assert_allclose(x, y, atol=1e-5)
  np.testing.assert_array_equal(own.positions, cache.positions)


def test_padding_after_the_end_of_a_row_leaves_later_tokens_alone():
  """A row may pause: what is masked out in between has no influence."""
  model, params = small_language_model()
  tokens = random_tokens(1, 1, 6)
  step = jax.jit(model.apply)
  variables = {"params": params}
  cache = init_cache(model.config, 1, 9)
  real, gap = jnp.ones((1, 3), jnp.int32), jnp.zeros((1, 3), jnp.int32)
  _, cache = step(variables, tokens[:, :3], real, cache)
  _, cache = step(variables, jnp.full((1, 3), 7), gap, cache)
  logits, _ = step(variables, tokens[:, 3:], real, cache)
  expected, _ = step(variables, tokens)
  np.testing.assert_allclose(logits, expected[:, 3:], atol=1e-5)


def test_cache_sizes_that_cannot_work_are_refused():
  model, params = small_language_model()
  with pytest.raises(ValueError, match="length 25 .*max_length=24"):
    init_cache(model.config, 1, 25)
  with pytest.raises(ValueError, match="5 tokens .* cache of length 4"):
    model.apply(
        {"params": params},
        random_tokens(0, 1, 5),
        None,
        init_cache(model.config, 1, 4),
    )
