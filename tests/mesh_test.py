"""Every update on every axis of the mesh gives what one device gives."""

import dataclasses
import functools
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import devices, ppo_programs
from rlhf_jax import device_mesh, optim, sharding
from rlhf_jax import metrics as metrics_lib
from rlhf_jax.device_mesh import MeshConfig
from rlhf_jax.generation import decode
from rlhf_jax.models import functions, partitioning
from rlhf_jax.models.heads import LanguageModel, ScalarModel
from rlhf_jax.train_state import create_train_state
from rlhf_jax.types import PromptBatch
from rlhf_jax.updates import ppo, reward, sft
from tests.models.small import random_params, random_tokens, small_config
from tests.updates import small
from tests.updates.small import assert_trees_close, assert_trees_equal

CONFIG = small_config(
    vocab_size=small.V,
    width=16,
    head_dim=4,
    ff_dim=24,
    max_length=16,
    tie_head=False,
    # Several chunks, so that rows and vocabulary meet in a loop.
    head_chunk_size=4,
)
TIED = small_config(
    vocab_size=small.V, width=16, head_dim=4, ff_dim=24, position="learned",
    norm="layernorm", norm_bias=True, attention_bias="all",
    feed_forward_bias=True, num_experts=2, experts_per_token=1,
)
MESHES = {
    "replica": dict(replica=2),
    "data": dict(data=8),
    "fsdp": dict(fsdp=8),
    "tensor": dict(tensor=2),
    "sequence": dict(sequence=2),
    "rows": dict(replica=2, data=2, fsdp=2),
    "data_fsdp_tensor": dict(data=2, fsdp=2, tensor=2),
    "fsdp_tensor_sequence": dict(fsdp=2, tensor=2, sequence=2),
}
# Two of them have every axis between them; all take minutes more.
TWO = ("rows", "fsdp_tensor_sequence")
CHOSEN = tuple(MESHES) if os.environ.get("RLHF_JAX_ALL_MESHES") else TWO
NO_RULES = devices.PPOSharding(
    policy=(), value=(), ref_policy=(), reward_model=()
)
CFG = ppo.PPOConfig(
    temperature=small.TEMPERATURE,
    kl_controller="adaptive",
    num_epochs=2,
    num_minibatches=2,
    ptx_coef=0.5,
    entropy_coef=0.01,
)
SAMPLING = decode.SamplingConfig(
    max_new_tokens=small.C,
    temperature=small.TEMPERATURE,
    eos_id=small.EOS,
    stop_ids=(2, 5),
    stop_after=1,
)
SCORE = np.random.default_rng(0).normal(size=small.B).astype(np.float32)


def _mesh(name):
  return device_mesh.make_mesh(MeshConfig(**MESHES.get(name, {})))


# --- supervised ---------------------------------------------------------------


def _supervised(make_update, model, params, batch, cfg, rules, mesh):
  """State and metrics of one step, the state placed by `rules`."""
  state = sharding.place(
      create_train_state(params, small.SGD, jax.random.key(0)), rules, mesh
  )
  update = jax.jit(
      make_update(model, small.SGD), out_shardings=(sharding.of(state), None)
  )
  state, metrics = update(state, device_mesh.shard_rows(batch, mesh), cfg)
  return state, metrics_lib.compute(metrics)


@functools.cache
def _sft(name, config=CONFIG):
  return _supervised(
      sft.make_sft_update,
      functions.make_language_model(config),
      random_params(LanguageModel(config)),
      small.lm_batch(),
      sft.SFTConfig(z_loss_coef=0.01),
      NO_RULES.rules_of("policy"),
      _mesh(name),
  )


@pytest.mark.parametrize("name", MESHES)
def test_sft_is_that_of_one_device(name):
  (one, wanted), (many, found) = _sft("one"), _sft(name)
  assert_trees_close(many.params, one.params, atol=1e-5)
  assert_trees_close(found, wanted, rtol=1e-5)


def test_sft_of_a_tied_mixture_of_experts_is_that_of_one_device():
  (one, wanted), (many, found) = (
      _sft(name, TIED) for name in ("one", "fsdp_tensor_sequence")
  )
  assert_trees_close(many.params, one.params, atol=1e-5)
  assert_trees_close(found, wanted, rtol=1e-5)


BATCHES = {
    "pairs": small.preference_batch(), "rankings": small.ranking_batch()
}


@functools.cache
def _reward(name, kind):
  return _supervised(
      reward.make_reward_update,
      functions.make_score_fn(CONFIG),
      random_params(ScalarModel(CONFIG)),
      BATCHES[kind],
      reward.RewardConfig(center_coef=0.1),
      NO_RULES.rules_of("reward_model"),
      _mesh(name),
  )


@pytest.mark.parametrize(
    "name,kind",
    [(name, "pairs") for name in CHOSEN]
    + [("fsdp_tensor_sequence", "rankings")],
)
def test_reward_is_that_of_one_device(name, kind):
  (one, wanted), (many, found) = _reward("one", kind), _reward(name, kind)
  assert_trees_close(many.params, one.params, atol=1e-5)
  assert_trees_close(found, wanted, rtol=1e-5, atol=1e-6)


# --- PPO ----------------------------------------------------------------------


def _prompts():
  lengths = np.random.default_rng(0).integers(1, small.P + 1, small.B)
  return PromptBatch(
      prompts=random_tokens(0, small.B, small.P, vocab_size=small.V),
      prompt_mask=jnp.asarray(
          np.arange(small.P)[None] >= small.P - lengths[:, None], jnp.int32
      ),
      index=jnp.arange(small.B),
  )


class _PPO:
  """Two iterations of the programs that a run is made of."""

  def __init__(self, name, cfg=CFG, tx=small.SGD, parallelism="jit"):
    self.mesh, self.cfg = _mesh(name), cfg
    state = ppo.create_ppo_state(
        {
            "policy": random_params(LanguageModel(CONFIG)),
            "value": random_params(ScalarModel(CONFIG), seed=1),
        },
        tx,
        jax.random.key(0),
        cfg,
    )
    self.rules = ppo_programs.state_rules(NO_RULES)
    self.state = sharding.place(state, self.rules, self.mesh, copy=True)
    self.ref_params = sharding.place(
        random_params(LanguageModel(CONFIG), seed=5),
        NO_RULES.rules_of("ref_policy"),
        self.mesh,
    )
    self.programs = ppo_programs.make_programs(
        CONFIG,
        CONFIG,
        CONFIG,
        tx,
        state,
        self.mesh,
        NO_RULES,
        parallelism,
        decode.make_generate(LanguageModel(CONFIG)),
    )
    self.log = []

  def rollout(self):
    batch = device_mesh.shard_rows(_prompts(), self.mesh)
    return self.programs.rollout(self.state, batch, SAMPLING, {})

  def score_args(self, rollout):
    score = device_mesh.shard_rows(SCORE, self.mesh)
    return (
        self.state.train.params,
        self.ref_params,
        rollout,
        score,
        self.state.kl_coef,
        self.cfg,
    )

  def update_args(self, scored):
    ptx = device_mesh.shard_rows(small.lm_batch(), self.mesh)
    return self.state, scored, ptx, self.cfg, {}

  def iterate(self):
    rollout = self.rollout()
    scored, metrics = self.programs.score(*self.score_args(rollout))
    self.state, more = self.programs.update(*self.update_args(scored))
    self.log.append((jax.device_get(rollout), jax.device_get(scored)))
    return metrics_lib.compute(metrics | more)


@functools.cache
def _one_device():
  one = _PPO("one")
  metrics = one.iterate()
  return metrics, one


@pytest.mark.parametrize(
    "name, parallelism",
    [*((name, "jit") for name in CHOSEN), ("data", "pmap")],
)
def test_ppo_is_that_of_one_device_and_its_tokens_are_the_same(
    name, parallelism
):
  wanted, one = _one_device()
  many = _PPO(name, parallelism=parallelism)
  found = many.iterate()
  (rollout, scored), (rollout_1, scored_1) = many.log[0], one.log[0]
  assert_trees_equal(
      (rollout.completions, rollout.completion_mask, rollout.ended),
      (rollout_1.completions, rollout_1.completion_mask, rollout_1.ended),
  )
  assert_trees_close(rollout.logprobs, rollout_1.logprobs, atol=1e-5)
  assert_trees_close(scored, scored_1, atol=1e-5)
  assert_trees_close(
      many.state.train.params, one.state.train.params, atol=1e-5
  )
  np.testing.assert_allclose(
      many.state.kl_coef, one.state.kl_coef, rtol=1e-5
  )
  # Where it was, so that the next iteration finds the same program.
  wanted_places = sharding.shardings_of(many.state, many.rules, many.mesh)
  assert sharding.of(many.state) == wanted_places
  assert_trees_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_microbatches_change_nothing_on_a_mesh():
  wanted, one = _one_device()
  cfg = dataclasses.replace(CFG, num_microbatches=2)
  many = _PPO("data_fsdp_tensor", cfg)
  found = many.iterate()
  assert_trees_close(
      many.state.train.params, one.state.train.params, atol=1e-5
  )
  assert_trees_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, parallelism", [("data_fsdp_tensor", "jit"), ("data", "pmap")]
)
def test_nothing_is_compiled_after_the_first_iteration(
    name, parallelism, caplog
):
  run = _PPO(name, parallelism=parallelism)
  run.iterate()
  with jax.log_compiles(), caplog.at_level("WARNING", logger="jax"):
    jax.jit(lambda x: x + 1)(jnp.ones(7))  # this is told, so all would be
    before = len(caplog.records)
    for _ in range(2):
      run.iterate()
  compiled = [x.getMessage() for x in caplog.records[before:]]
  assert before and not [x for x in compiled if "Compiling" in x]


# --- memory -------------------------------------------------------------------

# What each leaf of one model has on a device of {fsdp: 2, tensor: 2,
# sequence: 2}, by hand from the table in models/partitioning.py.
OWN_SHAPES = {
    "trunk/token_embedding": (8, 8),
    "trunk/layers/attention/query/kernel": (2, 8, 2, 4),
    "trunk/layers/attention/key/kernel": (2, 8, 1, 4),
    "trunk/layers/attention/value/kernel": (2, 8, 1, 4),
    "trunk/layers/attention/out/kernel": (2, 2, 4, 8),
    "trunk/layers/feed_forward/up/kernel": (2, 8, 12),
    "trunk/layers/feed_forward/gate/kernel": (2, 8, 12),
    "trunk/layers/feed_forward/down/kernel": (2, 12, 8),
    "trunk/layers/attention_norm/scale": (2, 16),
    "trunk/layers/feed_forward_norm/scale": (2, 16),
    "trunk/final_norm/scale": (16,),
    "head/kernel": (16, 4),
}


def test_a_device_holds_of_each_parameter_what_the_table_says():
  tx = optim.make_optimizer(optim.OptimizerConfig(learning_rate=1e-3), 10)
  run = _PPO("fsdp_tensor_sequence", tx=tx)
  shapes = OWN_SHAPES | {"head/kernel_of_value": (16, 1), "head/bias": (1,)}
  found = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(run.state):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    match = re.search(r"(policy|value)/(.*)", name)
    if not match:
      assert leaf.ndim == 0, name
      continue
    own = match[2]
    if match[1] == "value" and own == "head/kernel":
      own += "_of_value"
    for shard in leaf.addressable_shards:
      assert shard.data.shape == shapes[own], name
    found += 1
  # Params and both of Adam's moments, of both models.
  assert found == 3 * (len(OWN_SHAPES) * 2 + 1)


# Every parameter has more elements than any activation.
LARGE = small_config(
    vocab_size=512, num_layers=8, width=64, num_heads=8, num_kv_heads=8,
    head_dim=16, ff_dim=128, tie_head=False, max_length=16,
)


def _largest(lowered) -> int:
  """Elements of the largest array that a device ever has in a program."""
  # As users compile it, and not as conftest.py has it.
  options = {"xla_cpu_use_fusion_emitters": True}
  text = lowered.compile(options).as_text()
  shapes = re.findall(r"\b(?:bf|[fsu])\d+\[([\d,]+)\]", text)
  return max(math.prod(map(int, x.split(","))) for x in shapes)


def _on(tree, places):
  """Shapes that lie where `places` says: of one sharding, or of a tree."""
  if isinstance(places, jax.NamedSharding):
    places = jax.tree.map(lambda _: places, tree)
  return jax.tree.map(
      lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to),
      tree,
      places,
  )


def _large(model, **changes):
  """A config, the shapes of its params, and elements of the smallest kernel."""
  config = dataclasses.replace(LARGE, **changes)
  shapes = jax.eval_shape(
      model(config).init, jax.random.key(0), jnp.zeros((1, 2), int)
  )["params"]
  sizes = [x.size for x in jax.tree.leaves(shapes)]
  return config, shapes, min(size for size in sizes if size > 4096)


def _largest_of(make_update, model, params, batch, cfg, rules, sizes) -> int:
  """`_largest` of a supervised update's program on a mesh of these sizes."""
  mesh = device_mesh.make_mesh(MeshConfig(**sizes))
  tx = optim.make_optimizer(optim.OptimizerConfig(learning_rate=1e-3), 10)
  state = jax.eval_shape(
      lambda params: create_train_state(params, tx, jax.random.key(0)), params
  )
  places = sharding.shardings_of(state, rules, mesh)
  update = jax.jit(
      make_update(model, tx), donate_argnums=0, out_shardings=(places, None)
  )
  batch = _on(batch, device_mesh.rows(mesh))
  return _largest(update.lower(_on(state, places), batch, cfg))


def _large_sft(**changes):
  """What `_largest_of` takes of SFT, and elements of the smallest kernel."""
  config, params, whole = _large(LanguageModel, **changes)
  model = functions.make_language_model(config)
  batch = small.lm_batch(rows=8)
  return (sft.make_sft_update, model, params, batch, sft.SFTConfig()), whole


def _large_reward(**changes):
  """The same of the reward update."""
  config, params, whole = _large(ScalarModel, **changes)
  model, cfg = functions.make_score_fn(config), reward.RewardConfig()
  batch = small.preference_batch(rows=8)
  return (reward.make_reward_update, model, params, batch, cfg), whole


FSDP, FSDP_TENSOR = dict(fsdp=8), dict(fsdp=4, tensor=2)


@pytest.mark.parametrize(
    "sizes, changes",
    [
        (FSDP, dict(tie_head=False)),
        (FSDP_TENSOR, dict(tie_head=True)),
        (FSDP_TENSOR, dict(dtype="bfloat16")),
    ],
)
def test_sft_holds_no_full_copy_of_a_sharded_tensor(sizes, changes):
  update, whole = _large_sft(**changes)
  assert _largest_of(*update, NO_RULES.rules_of("policy"), sizes) < whole


@pytest.mark.parametrize(
    "sizes, dtype", [(FSDP, "float32"), (FSDP_TENSOR, "bfloat16")]
)
def test_reward_holds_no_full_copy_of_a_sharded_tensor(sizes, dtype):
  update, whole = _large_reward(dtype=dtype)
  assert _largest_of(*update, NO_RULES.rules_of("reward_model"), sizes) < whole


@pytest.mark.parametrize(
    "make, name, dtype",
    [
        (_large_sft, "policy", "float32"),
        (_large_reward, "reward_model", "bfloat16"),
    ],
)
def test_a_full_copy_would_be_found(make, name, dtype):
  update, whole = make(dtype=dtype)
  rules = ((r"feed_forward/up/kernel", ()), *NO_RULES.rules_of(name))
  assert _largest_of(*update, rules, FSDP) >= whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_holds_no_full_copy_of_a_sharded_tensor(dtype):
  mesh = device_mesh.make_mesh(MeshConfig(**FSDP_TENSOR))
  config, policy, whole = _large(LanguageModel, dtype=dtype)
  value = jax.eval_shape(
      ScalarModel(config).init, jax.random.key(0), jnp.zeros((1, 2), int)
  )["params"]
  state = jax.eval_shape(
      lambda params: ppo.create_ppo_state(
          params, small.SGD, jax.random.key(0), CFG
      ),
      {"policy": policy, "value": value},
  )
  programs = ppo_programs.make_programs(
      config,
      config,
      config,
      small.SGD,
      state,
      mesh,
      NO_RULES,
      "jit",
      decode.make_generate(LanguageModel(config)),
  )
  rules = ppo_programs.state_rules(NO_RULES)
  state = _on(state, sharding.shardings_of(state, rules, mesh))
  rows = device_mesh.rows(mesh)
  rollout_args = (state, _on(_prompts(), rows), SAMPLING, {})
  rollout = _on(jax.eval_shape(programs.rollout, *rollout_args), rows)
  score_args = (
      state.train.params,
      state.train.params["policy"],
      rollout,
      _on(SCORE, rows),
      state.kl_coef,
      CFG,
  )
  scored = _on(jax.eval_shape(programs.score, *score_args)[0], rows)
  update_args = (state, scored, None, CFG, {})
  for program, args in (
      (programs.rollout, rollout_args),
      (programs.score, score_args),
      (programs.update, update_args),
  ):
    assert _largest(program.lower(*args)) < whole


@pytest.mark.parametrize(
    "dtype, weights", [("bfloat16", "compute"), ("float32", "int8")]
)
def test_a_rollout_in_other_weights_holds_no_full_copy(dtype, weights):
  """Of a loop over scanned layers, as accelerators have it."""
  mesh = device_mesh.make_mesh(MeshConfig(**FSDP_TENSOR))
  config, params, whole = _large(LanguageModel, dtype=dtype)
  places = sharding.shardings_of(params, partitioning.POLICY_RULES, mesh)
  prompts = _on(_prompts(), device_mesh.rows(mesh))
  generate = decode.make_generate(
      LanguageModel(config), is_unrolled=False, weights=weights
  )
  args = prompts.prompts, prompts.prompt_mask, jax.random.key(0), SAMPLING
  lowered = jax.jit(generate).lower(_on(params, places), *args)
  assert _largest(lowered) < whole
