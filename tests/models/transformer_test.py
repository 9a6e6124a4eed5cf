import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.models.transformer import (
    Transformer,
    segment_positions,
)
from tests.models.small import (
    VARIANTS,
    random_params,
    random_tokens,
    small_config,
    small_language_model,
)
from tests.reference import transformer as reference

T = 12


@functools.cache
def _model(variant="llama"):
  model, params = small_language_model(**VARIANTS[variant])
  apply = jax.jit(
      lambda tokens, ids: model.apply({"params": params}, tokens, ids)[0]
  )
  return model, params, apply


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_float64_reference(variant):
  model, params, apply = _model(variant)
  tokens = random_tokens(1, 2, T)
  logits = apply(tokens, jnp.ones_like(tokens))
  for row in range(2):
    expected = reference.forward(params, model.config, tokens[row])
    np.testing.assert_allclose(logits[row], expected, atol=1e-4)


def test_segment_positions_restart_and_padding_is_zero():
  ids = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 2, 2, 0], [3, 1, 1, 3, 3]])
  expected = [[0, 0, 0, 1, 2], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1]]
  np.testing.assert_array_equal(segment_positions(ids), expected)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma"])
@hypothesis.given(
    left=st.integers(0, 5), right=st.integers(0, 5), seed=st.integers(0, 99)
)
def test_logits_do_not_depend_on_side_or_amount_of_padding(
    variant, left, right, seed
):
  """Nor on what stands in the padding, an id of no token included."""
  _, _, apply = _model(variant)
  length = T - left - right
  document = random_tokens(seed, 1, T)[:, :length]
  alone = apply(
      jnp.pad(document, ((0, 0), (0, T - length))),
      jnp.asarray([[1] * length + [0] * (T - length)]),
  )[:, :length]
  garbage = np.random.default_rng(seed).integers(-5, 10**6, (1, T))
  tokens = garbage.astype(np.int32)
  tokens[:, left : left + length] = document
  mask = jnp.asarray([[0] * left + [1] * length + [0] * right])
  logits = apply(jnp.asarray(tokens), mask)
  assert np.isfinite(logits).all()
  np.testing.assert_allclose(
      logits[:, left : left + length], alone, atol=1e-5
  )


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gemma"])
@hypothesis.given(
    lengths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    seed=st.integers(0, 99),
)
def test_packed_documents_equal_separate_ones(variant, lengths, seed):
  hypothesis.assume(sum(lengths) <= T)
  _, _, apply = _model(variant)
  padding = T - sum(lengths)
  tokens = random_tokens(seed, 1, T)
  ids = np.concatenate(
      [np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(padding)]
  ).astype(np.int32)
  packed = apply(tokens, jnp.asarray(ids)[None])
  start = 0
  for n in lengths:
    document = jnp.zeros((1, T), jnp.int32)
    document = document.at[:, :n].set(tokens[:, start : start + n])
    mask = jnp.asarray([[1] * n + [0] * (T - n)])
    alone = apply(document, mask)
    np.testing.assert_allclose(
        packed[:, start : start + n], alone[:, :n], atol=1e-5
    )
    start += n


@pytest.mark.parametrize("variant", ["gpt2_untied", "layernorm_without_bias"])
def test_gradient_flows_from_the_past_of_its_own_document_only(variant):
  """d logits[t] / d input[s] is exactly 0 unless s <= t in one segment.

  All tokens are different, so the gradient to row tokens[s] of the embedding
  table is the gradient to input s.
  """
  model, params, _ = _model(variant)
  tokens = jnp.arange(1, T + 1, dtype=jnp.int32)[None]
  ids = jnp.asarray([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0]])
  weights = jax.random.normal(jax.random.key(0), (1, 1, 19))

  def summed_logits(table):
    trunk = {**params["trunk"], "token_embedding": table}
    changed = {"params": {**params, "trunk": trunk}}
    logits, _ = model.apply(changed, tokens, ids)
    return jnp.sum(logits * weights, axis=-1)[0]

  jacobian = jax.jit(jax.jacrev(summed_logits))(
      params["trunk"]["token_embedding"]
  )
  flows = np.abs(np.asarray(jacobian)[:, 1 : T + 1]).max(axis=-1)
  same = np.asarray(ids[0])[:, None] == np.asarray(ids[0])[None]
  real = np.asarray(ids[0]) > 0
  allowed = np.tril(same) & real[:, None] & real[None]
  assert (flows[real][~allowed[real]] == 0.0).all()
  assert (flows[allowed] > 0).all()


def test_grouped_query_attention_equals_repeated_key_value_heads():
  model, params, apply = _model("llama")
  tokens = random_tokens(3, 2, T)
  layers = params["trunk"]["layers"]
  repeated = {
      name: {"kernel": jnp.repeat(layers["attention"][name]["kernel"], 2, 2)}
      for name in ("key", "value")
  }
  layers = {**layers, "attention": {**layers["attention"], **repeated}}
  full = LanguageModel(small_config(num_kv_heads=4))
  logits, _ = jax.jit(full.apply)(
      {"params": {"trunk": {**params["trunk"], "layers": layers}}}, tokens
  )
  np.testing.assert_allclose(
      logits, apply(tokens, jnp.ones_like(tokens)), atol=1e-5
  )


@pytest.mark.parametrize(
    "changes",
    [{"remat": True}, {"scan_unroll": 2}, {"remat": True, "scan_unroll": 2}],
)
def test_remat_and_unroll_never_change_a_result(changes):
  model, params, _ = _model("llama")
  other = LanguageModel(small_config(**changes))
  tokens = random_tokens(4, 2, T)

  def loss(params, model):
    logits, _ = model.apply({"params": params}, tokens)
    return jnp.mean(jnp.square(logits))

  run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  expected, actual = run(params, model), run(params, other)
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
      actual,
      expected,
  )


def test_fully_masked_row_is_finite_with_finite_gradient():
  model, params, _ = _model("llama")
  tokens = random_tokens(5, 2, T)
  mask = jnp.stack([jnp.zeros(T, jnp.int32), jnp.ones(T, jnp.int32)])

  def loss(params):
    logits, _ = model.apply({"params": params}, tokens, mask)
    return jnp.sum(logits)

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("bad", [19, -1])
def test_token_outside_of_the_vocabulary_is_nan_not_another_token(bad):
  _, _, apply = _model("llama")
  tokens = jnp.zeros((2, T), jnp.int32).at[0, 3].set(bad)
  logits = apply(tokens, jnp.ones_like(tokens))
  assert np.isnan(logits[0, 3:]).all()
  assert np.isfinite(logits[1]).all()


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
  _, params, apply = _model("llama")
  model = LanguageModel(small_config(dtype="bfloat16"))
  tokens = random_tokens(6, 2, T)
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  dtypes = {leaf.dtype for leaf in jax.tree.leaves(variables)}
  assert dtypes == {jnp.dtype("float32")}
  hidden, _ = jax.jit(functools.partial(model.apply, method="hidden"))(
      {"params": params}, tokens
  )
  logits, _ = jax.jit(model.apply)({"params": params}, tokens)
  assert hidden.dtype == jnp.bfloat16
  assert logits.dtype == jnp.float32
  # As float32 numbers, not as bfloat16 ones in a float32 array.
  rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
  assert (rounded != logits).any()
  exact = apply(tokens, jnp.ones_like(tokens))
  np.testing.assert_allclose(logits, exact, atol=0.05 * np.abs(exact).max())


def test_initialisation_scales_residual_projections():
  config = small_config(width=64, ff_dim=256, num_layers=8)
  tokens = jnp.ones((1, 2), jnp.int32)
  params = jax.jit(Transformer(config).init)(
      jax.random.key(0), tokens, tokens
  )["params"]
  layers = params["layers"]
  plain = (params["token_embedding"], layers["feed_forward"]["up"]["kernel"])
  for kernel in plain:
    np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.05)
  down = layers["feed_forward"]["down"]["kernel"]
  np.testing.assert_allclose(np.std(down), 0.02 / 4, rtol=0.05)
  assert not np.array_equal(down[0], down[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be positive, got 0"),
        ({"num_kv_heads": 3}, "num_heads=4 .* num_kv_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"scan_unroll": 3}, "scan_unroll=3 .* num_layers=2"),
        ({"norm": "batchnorm"}, "norm must be one of rmsnorm, layernorm"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be positive"),
        ({"rope_theta": float("nan")}, "rope_theta must be positive"),
        ({"norm_placement": "both"}, "norm_placement must be one of pre, post"),
        ({"attention_softcap": -1.0}, "attention_softcap must be 0 or greater"),
        ({"sliding_window": -1}, "sliding_window must be 0 or greater"),
        (
            {"sliding_window": 3, "full_attention_layers": (1, 2)},
            r"full_attention_layers=\(1, 2\) must ascend within .*=1",
        ),
        (
            {"sliding_window": 3, "full_attention_layers": (0, 1)},
            "names every layer: set sliding_window=0",
        ),
        ({"full_attention_layers": (1,)}, "need a sliding_window"),
        ({"local_rope_theta": 9.0}, "local_rope_theta=9.0 need a sliding_wind"),
        ({"num_experts": 4}, "experts_per_token=0 must be in 1..num_experts=4"),
        ({"experts_per_token": 1}, "experts_per_token=1 must be in"),
    ],
)
def test_config_names_the_wrong_field_and_its_numbers(changes, message):
  with pytest.raises(ValueError, match=message):
    small_config(**changes)


def test_row_longer_than_max_length_is_refused():
  model = LanguageModel(small_config(max_length=8))
  params = random_params(model)
  with pytest.raises(ValueError, match="length 9.*max_length=8"):
    model.apply({"params": params}, random_tokens(0, 1, 9))
