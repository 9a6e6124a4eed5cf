import dataclasses
import math

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import lora
from rlhf_jax.models.heads import LanguageModel, ScalarModel
from tests.models import small
from tests.updates.small import assert_trees_equal

CONFIG = lora.LoraConfig(
    rank=3, alpha=5.0, targets=("attention/.*", "feed_forward/down")
)


def _random_adapter(base, config=CONFIG, seed=0):
  """Both parts random: with a fresh B, A would be idle."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
      lora.init(jax.random.key(0), config, base),
  )


def _adapted(base, adapter, config=CONFIG, **more):
  scale = jnp.float32(config.scale)
  return {"base": base, "adapter": adapter, "adapter_scale": scale, **more}


def _naive_merge(base, adapter, config):
  """W + scale * A B by a loop over layers, float64."""
  layers = jax.tree.map(np.array, base["trunk"]["layers"])
  for part, projections in adapter["trunk"]["layers"].items():
    for name, leaves in projections.items():
      kernel = layers[part][name]["kernel"]
      for i in range(kernel.shape[0]):
        a, b = (np.asarray(x[i], np.float64) for x in leaves.values())
        product = np.zeros((a.shape[0], b.shape[1]))
        for r in range(config.rank):
          product += np.outer(a[:, r], b[r])
        scale = config.alpha / config.rank
        kernel[i] += scale * product.reshape(kernel[i].shape)
  return {**base, "trunk": {**base["trunk"], "layers": layers}}


def _logits(model, variables, **more):
  tokens = small.random_tokens(1, 3, 9)
  return jax.jit(lambda v: model.apply(v, tokens, **more)[0])(variables)


@pytest.mark.parametrize("variant", ["llama", "neox", "experts"])
def test_adapter_equals_a_naive_w_plus_scale_a_b(variant):
  model, base = small.small_language_model(**small.VARIANTS[variant])
  config = CONFIG
  if variant == "experts":  # and the router: they have none
    config = dataclasses.replace(CONFIG, targets=("all-linear",))
    assert len(lora.target_names(config, base)) == 4
  adapter = _random_adapter(base, config)
  expected = _logits(model, {"params": _naive_merge(base, adapter, CONFIG)})
  found = _logits(model, lora.variables(_adapted(base, adapter)))
  plain = _logits(model, {"params": base})
  assert np.abs(expected - plain).max() > 0.1
  np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_fresh_adapter_gives_bitwise_the_base(remat):
  model, base = small.small_language_model(remat=remat, scan_unroll=2)
  everything = dataclasses.replace(CONFIG, targets=(lora.ALL_LINEAR,))
  adapter = lora.init(jax.random.key(1), everything, base)
  assert len(lora.by_projection(adapter)) == 7
  found = _logits(model, lora.variables(_adapted(base, adapter)))
  np.testing.assert_array_equal(found, _logits(model, {"params": base}))


def test_a_base_with_its_adapter_off_is_the_base():
  _, base = small.small_language_model()
  assert lora.variables({"base": base})["params"] is base
  assert "adapter" not in lora.variables({"base": base})
  assert lora.variables(base) == {"params": base}


def test_scalar_model_takes_the_trunk_of_a_language_model_and_its_own_head():
  model = ScalarModel(small.small_config())
  params = small.random_params(model, seed=3)
  _, base = small.small_language_model()
  adapter = _random_adapter(base)
  merged = _naive_merge(base, adapter, CONFIG)
  tokens = small.random_tokens(2, 2, 5)
  whole = _adapted(base, adapter, head=params["head"])
  np.testing.assert_allclose(
      model.apply(lora.variables(whole), tokens),
      model.apply(
          {"params": {"trunk": merged["trunk"], "head": params["head"]}},
          tokens,
      ),
      atol=2e-5,
  )


def test_only_the_adapter_has_a_gradient_and_all_of_it():
  model, base = small.small_language_model()
  adapter = _random_adapter(base)
  loss = lambda adapter: jnp.square(
      _logits(model, lora.variables(_adapted(base, adapter)))
  ).mean()
  grads = jax.grad(loss)(adapter)
  assert jax.tree.structure(grads) == jax.tree.structure(adapter)
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
  # One number of it, by finite differences.
  path = lambda tree: tree["trunk"]["layers"]["attention"]["out"][lora.A]
  step = 1e-2
  shift = lambda sign: jax.tree.map(
      lambda x: x.at[1, 2, 0].add(sign * step) if x is path(adapter) else x,
      adapter,
  )
  numeric = (loss(shift(1)) - loss(shift(-1))) / (2 * step)
  np.testing.assert_allclose(path(grads)[1, 2, 0], numeric, rtol=0.02)


def test_init_is_uniform_within_one_over_the_root_of_the_inputs():
  _, base = small.small_language_model()
  adapter = lora.init(jax.random.key(0), CONFIG, base)
  a, b = lora.by_projection(adapter)["attention/out"]
  assert a.shape == (2, 24, 3) and b.shape == (2, 3, 12)
  bound = 1 / math.sqrt(24)
  assert bound * 0.9 < np.abs(a).max() <= bound
  np.testing.assert_allclose(np.std(a), bound / math.sqrt(3), rtol=0.15)
  assert not b.any()
  assert a.dtype == jnp.float32
  again = lora.init(jax.random.key(0), CONFIG, base)
  assert_trees_equal(again, adapter)
  # Projections and layers start differently.
  other, _ = lora.by_projection(adapter)["attention/query"]
  assert not np.isin(np.asarray(other), np.asarray(a)).any()
  assert not np.isin(np.asarray(a[0]), np.asarray(a[1])).any()


@pytest.mark.parametrize(
    ("stabilized", "scale"), [(False, 32 / 16), (True, 32 / 4)]
)
def test_scale_is_alpha_over_rank_or_over_its_root(stabilized, scale):
  config = lora.LoraConfig(
      rank=16, alpha=32.0, targets=("x",), rank_stabilized=stabilized
  )
  assert config.scale == scale


@hypothesis.given(
    rank=st.integers(1, 4),
    alpha=st.floats(0.5, 64.0),
    seed=st.integers(0, 1000),
    targets=st.sampled_from(
        [("attention/query",), ("attention/out", "feed_forward/.*")]
    ),
)
def test_merged_is_the_naive_sum_and_what_is_not_adapted_is_not_touched(
    rank, alpha, seed, targets
):
  config = lora.LoraConfig(rank=rank, alpha=alpha, targets=targets)
  _, base = small.small_language_model(seed=seed)
  adapter = _random_adapter(base, config, seed)
  merged = lora.merge(base, adapter, config.scale)
  naive = _naive_merge(base, adapter, config)
  assert jax.tree.structure(merged) == jax.tree.structure(base)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
      merged,
      naive,
  )
  adapted = {f"{name}/kernel" for name in lora.target_names(config, base)}
  for path, x in jax.tree_util.tree_leaves_with_path(merged):
    name = jax.tree_util.keystr(path[2:], simple=True, separator="/")
    old = base
    for key in path:
      old = old[key.key]
    assert (x is old) == (name not in adapted)
  # Taking it away again leaves the base, up to rounding.
  back = lora.merge(merged, adapter, -config.scale)
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), back, base
  )


def test_rescaled_adapter_is_as_much_as_the_scale_would_be():
  _, base = small.small_language_model()
  adapter = _random_adapter(base)
  one = lora.merge(base, lora.rescale(adapter, 2.0), 1.5)
  other = lora.merge(base, adapter, 3.0)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y), one, other)


# --- dropout ------------------------------------------------------------------


def _row_rngs(rows):
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  return fold(jax.random.key(5), jnp.asarray(rows))


def _dropped(model, base, adapter, rows, tokens, share=0.5):
  whole = _adapted(
      base,
      adapter,
      row_rngs=_row_rngs(rows),
      adapter_dropout=jnp.float32(share),
  )
  return model.apply(lora.variables(whole), tokens)[0]


@pytest.mark.parametrize("remat", [False, True])
def test_dropout_of_a_row_depends_on_its_key_alone(remat):
  model, base = small.small_language_model(remat=remat)
  adapter = _random_adapter(base)
  tokens = small.random_tokens(1, 4, 6)
  whole = _dropped(model, base, adapter, [0, 1, 2, 3], tokens)
  order = np.array([2, 0])
  part = _dropped(model, base, adapter, order, tokens[order])
  np.testing.assert_allclose(part, whole[order], atol=1e-6)
  other = _dropped(model, base, adapter, [1, 0], tokens[order])
  assert np.abs(other - part).max() > 1e-2


def test_dropout_keeps_the_expectation_and_drops_the_share():
  x = jnp.ones((400, 3, 8))
  a = jnp.eye(8)
  rngs = _row_rngs(np.arange(400))
  seen = lora.product(
      x, {lora.A: a, lora.B: a, "row_rngs": rngs, "dropout": jnp.float32(0.25)}
  )
  assert set(np.unique(np.round(seen, 4))) == {0.0, np.float32(1.3333)}
  np.testing.assert_allclose((seen == 0).mean(), 0.25, atol=0.015)
  np.testing.assert_allclose(seen.mean(), 1.0, atol=0.02)


def test_layers_and_projections_drop_different_inputs():
  _, base = small.small_language_model()
  adapter = _random_adapter(base)
  dropout = dict(row_rngs=_row_rngs([0, 1]), adapter_dropout=jnp.float32(0.5))
  whole = _adapted(base, adapter, **dropout)
  layers = lora.variables(whole)["adapter"]["trunk"]["layers"]
  keys = np.concatenate([
      np.asarray(jax.random.key_data(leaf)).reshape(-1, 2)
      for path, leaf in jax.tree_util.tree_leaves_with_path(layers)
      if path[-1].key == "row_rngs"
  ])
  # 5 projections, 2 layers, 2 rows.
  assert len(np.unique(keys, axis=0)) == len(keys) == 20


# --- what is refused ----------------------------------------------------------


def test_target_that_matches_nothing_names_the_projections():
  _, base = small.small_language_model()
  config = dataclasses.replace(CONFIG, targets=("attention/query", "q_proj"))
  with pytest.raises(lora.LoraError, match="'q_proj'.*attention/query.*down"):
    lora.init(jax.random.key(0), config, base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=-1), "rank=-1"),
        (dict(alpha=0.0), "alpha=0.0"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(targets=()), "names no projection"),
        (dict(targets=("att(",)), "no regular expression"),
    ],
)
def test_config_refuses_what_makes_no_sense(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)


def test_adapter_of_another_model_is_refused():
  _, base = small.small_language_model()
  _, wide = small.small_language_model(width=24)
  adapter = _random_adapter(wide)
  with pytest.raises(lora.LoraError, match=r"attention/key.*\(2, 24, 3\)"):
    lora.merge(base, adapter, 1.0)
  _, gelu = small.small_language_model(activation="gelu")
  gate = dataclasses.replace(CONFIG, targets=("feed_forward/gate",))
  with pytest.raises(lora.LoraError, match="feed_forward/gate"):
    lora.merge(gelu, _random_adapter(base, gate), 1.0)


def test_merging_holds_a_layer_at_a_time():
  num_layers, size, rank = 32, 64, 2
  shape = jax.ShapeDtypeStruct
  compiled = lora._merged.lower(
      # Of bfloat16 arrays XLA's CPU backend makes float32 ones first.
      shape((num_layers, size, size), jnp.float32),
      shape((num_layers, size, rank), jnp.float32),
      shape((num_layers, rank, size), jnp.float32),
      shape((), jnp.float32),
  ).compile()
  layer_bytes = size * size * 4
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 4 * layer_bytes < num_layers * layer_bytes // 4


def test_a_mixture_of_experts_is_adapted_but_for_its_experts():
  model, base = small.small_language_model(**small.VARIANTS["experts"])
  everything = dataclasses.replace(CONFIG, targets=(lora.ALL_LINEAR,))
  adapter = _random_adapter(base, everything)
  names = {name.partition("/")[0] for name in lora.by_projection(adapter)}
  assert names == {"attention"}
  found = _logits(model, lora.variables(_adapted(base, adapter)))
  merged = lora.merge(base, adapter, CONFIG.scale)
  np.testing.assert_allclose(
      found, _logits(model, {"params": merged}), atol=1e-5
  )
  experts = dataclasses.replace(CONFIG, targets=("feed_forward/experts/up",))
  with pytest.raises(lora.LoraError, match="none of the projections attention"):
    _random_adapter(base, experts)


def test_adapter_computes_in_the_dtype_of_its_model():
  model, base = small.small_language_model(dtype="bfloat16")
  assert isinstance(model, LanguageModel)
  adapter = _random_adapter(base)
  found = _logits(model, lora.variables(_adapted(base, adapter)))
  wide, _ = small.small_language_model()
  expected = _logits(wide, lora.variables(_adapted(base, adapter)))
  assert 1e-4 < np.abs(found - expected).max() < 0.15
