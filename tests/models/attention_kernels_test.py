import functools

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import device_mesh
from rlhf_jax.models import attention, attention_kernels
from tests.models.small import random_tokens, small_language_model

B, H, N, K = 2, 4, 140, 8
# Two documents with padding on the right, and one with padding on the left.
SEGMENT_IDS = np.zeros((B, N), np.int32)
SEGMENT_IDS[0, :60] = 1
SEGMENT_IDS[0, 60:111] = 2
SEGMENT_IDS[1, 23:] = 1
BACKENDS = ("splash", "fused", "cudnn")


def _arrays(num_kv_heads, rows=B, dtype="float32"):
  rng = np.random.default_rng(0)
  return tuple(
      jnp.asarray(rng.normal(size=(rows, heads, N, K)), dtype)
      for heads in (H, num_kv_heads, num_kv_heads)
  )


def _attend(name, query, key, value, segment_ids, window, cap=0.0):
  options = dict(window=window, scale=0.3)
  if name == "plain":
    mask = attention.causal_mask(segment_ids, window)
    return _plain(query, key, value, mask, cap)
  if name == "splash":
    return attention_kernels.splash(
        query, key, value, segment_ids, softcap=cap, interpret=True, **options
    )
  implementation = "xla" if name == "fused" else "cudnn"
  return attention_kernels.fused(
      query, key, value, segment_ids, implementation=implementation, **options
  )


def _plain(query, key, value, mask, cap):
  """Naive and in float32, one head at a time."""
  group = query.shape[1] // key.shape[1]
  heads = []
  for head in range(query.shape[1]):
    keys, values = key[:, head // group], value[:, head // group]
    scores = 0.3 * jnp.einsum("bnk,bmk->bnm", query[:, head], keys)
    scores = cap * jnp.tanh(scores / cap) if cap else scores
    scores = jnp.where(mask, scores.astype(jnp.float32), -1e30)
    probs = jnp.exp(scores - scores.max(-1, keepdims=True))
    probs = probs / probs.sum(-1, keepdims=True)
    heads.append(jnp.einsum("bnm,bmk->bnk", probs, values))
  return jnp.stack(heads, axis=1)


@functools.partial(jax.jit, static_argnames=("name", "window", "cap"))
def _output_and_gradients(name, arrays, window, cap=0.0):
  segment_ids = jnp.asarray(SEGMENT_IDS)
  real = (segment_ids > 0)[:, None, :, None]
  weights = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32))

  def loss(arrays):
    out = _attend(name, *arrays, segment_ids, window, cap)
    out = jnp.where(real, out, jnp.zeros_like(out))
    return (out.astype(jnp.float32).ravel() * weights).sum(), out

  return jax.grad(loss, has_aux=True)(arrays)


@pytest.mark.parametrize("window", [0, 1, 30, N])
@pytest.mark.parametrize("num_kv_heads", [1, 2, H])
@pytest.mark.parametrize("name", ["splash", "fused"])
def test_kernels_give_what_plain_attention_gives(name, num_kv_heads, window):
  arrays = _arrays(num_kv_heads)
  wanted = _output_and_gradients("plain", arrays, window)
  actual = _output_and_gradients(name, arrays, window)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  jax.tree.map(close, actual, wanted)


def test_splash_caps_scores():
  arrays = _arrays(2)
  wanted = _output_and_gradients("plain", arrays, 0, cap=0.5)
  actual = _output_and_gradients("splash", arrays, 0, cap=0.5)
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  jax.tree.map(close, actual, wanted)
  uncapped, _ = _output_and_gradients("splash", arrays, 0)
  assert np.abs(actual[0][0] - uncapped[0]).max() > 0.1


def test_plain_attention_is_the_librarys():
  arrays, segment_ids = _arrays(2), jnp.asarray(SEGMENT_IDS)
  mask = attention.causal_mask(segment_ids, 30)
  query, key, value = arrays
  # The library's own scale is K ** -0.5.
  scaled = query * (0.3 * K**0.5)
  actual = attention.attend(scaled, [key], [value], [mask], K**-0.5)
  wanted = _attend("plain", *arrays, segment_ids, 30)
  np.testing.assert_allclose(actual, wanted, atol=1e-5)


def test_splash_runs_on_each_devices_own_rows():
  rows = 8
  arrays = _arrays(2, rows=rows)
  segment_ids = jnp.asarray(np.tile(SEGMENT_IDS, (rows // B, 1)))
  attend = jax.jit(functools.partial(_attend, "splash", window=0))
  wanted = attend(*arrays, segment_ids)
  mesh = device_mesh.make_mesh(device_mesh.MeshConfig(data=rows))
  split = device_mesh.shard_rows((*arrays, segment_ids), mesh)
  compiled = attend.lower(*split).compile()
  actual = compiled(*split)
  np.testing.assert_allclose(actual, wanted, atol=1e-6)
  # No device gathers another's rows.
  assert "all-gather" not in compiled.as_text()
  assert actual.sharding.spec[0] == device_mesh.ROWS


@pytest.mark.parametrize("parallelism", ["jit", "pmap"])
def test_splash_compiles_for_tpus_that_are_not_there(parallelism, monkeypatch):
  pytest.importorskip("libtpu", reason="libtpu compiles for TPUs")
  monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
  devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
  mesh = jax.sharding.Mesh(np.asarray(devices), ("data",))
  rows = jax.NamedSharding(mesh, jax.P("data"))
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=rows)

  def loss(query, key, value, segment_ids):
    # Whatever jax itself runs on.
    assert attention_kernels.platform_of(query) == "tpu"
    return attention_kernels.attend(
        "splash",
        query,
        key,
        value,
        segment_ids,
        window=30,
        scale=0.3,
        softcap=0.5,
    ).sum()

  gradients, batch = jax.grad(loss, (0, 1, 2)), (8,)
  if parallelism == "pmap":
    gradients, batch = jax.pmap(gradients, devices=devices), (4, 2)
  arrays = [shape((*batch, h, N, 64), jnp.float32) for h in (H, 2, 2)]
  lowered = jax.jit(gradients).lower(*arrays, shape((*batch, N), jnp.int32))
  # What is compiled for absent devices cannot be read back from the cache.
  name = "jax_persistent_cache_min_compile_time_secs"
  before = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update(name, 1e9)
  try:
    compiled = lowered.compile()
  finally:
    jax.config.update(name, before)
  # Forward, and backward for queries and for keys and values.
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 3},
        {"sliding_window": 3, "full_attention_layers": (1,)},
        {"attention_softcap": 2.0, "query_scale_dim": 5},
    ],
)
def test_a_decoder_with_splash_is_the_one_without(changes, monkeypatch):
  # Interpreted, as this is no TPU.
  monkeypatch.setattr(
      attention_kernels, "choose_backend", lambda wanted, **_: wanted
  )
  tokens = random_tokens(0, 2, 9)
  mask = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 0, 0]])

  def run(backend):
    model, params = small_language_model(
        attention_backend=backend, remat=True, **changes
    )

    def loss(params):
      logits, _ = model.apply({"params": params}, tokens, mask)
      real = jnp.where(mask[..., None] > 0, logits, jnp.float32(0))
      return jnp.square(real).sum(), real

    jitted = jax.jit(jax.grad(loss, has_aux=True))
    assert ("pallas_call" in str(jitted.trace(params).jaxpr)) == (
        backend != "xla"
    )
    return jitted(params)

  close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)
  jax.tree.map(close, run("splash"), run("xla"))


def test_a_decoder_refuses_a_backend_of_another_platform():
  with pytest.raises(ValueError, match="needs a gpu, and this is a cpu"):
    small_language_model(attention_backend="cudnn")


@pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU"
)
@pytest.mark.parametrize("window", [0, 30])
def test_cudnn_gives_what_plain_attention_gives_in_bfloat16(window):
  arrays = _arrays(2, dtype="bfloat16")
  wanted = _output_and_gradients(
      "plain", tuple(x.astype(jnp.float32) for x in arrays), window
  )
  actual = _output_and_gradients("cudnn", arrays, window)
  # 8 bits a number, in the output and in the probabilities.
  close = lambda x, y: np.testing.assert_allclose(
      x.astype(jnp.float32), y, atol=0.05
  )
  jax.tree.map(close, actual, wanted)


@pytest.fixture
def cudnn_calls(monkeypatch):
  """A jitted function's calls of cuDNN as it is lowered for NVIDIA GPUs.

  jax asks the cuDNN that is there for its version; there is none on a CPU. All
  else of the lowering is what a GPU would get.
  """
  monkeypatch.setattr(
      fused_attention_stablehlo, "check_cudnn_version", lambda: 91000
  )

  def calls(jitted, *args):
    lowered = jitted.trace(*args).lower(lowering_platforms=("cuda",))
    return [x for x in lowered.as_text().splitlines() if "@__cudnn" in x]

  return calls


@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("num_kv_heads", [1, 2, H])
def test_cudnn_is_what_gpus_are_given(num_kv_heads, window, cudnn_calls):
  arrays = _arrays(num_kv_heads, dtype="bfloat16")
  gradients = functools.partial(_output_and_gradients, window=window)
  calls = cudnn_calls(jax.jit(gradients, static_argnums=0), "cudnn", arrays)
  # With the scores of forward and backward pass in neither.
  names = ["fmhaScaleBiasSoftmax(", "fmhaScaleBiasSoftmaxBackward("]
  assert len(calls) == 2
  for call, name in zip(calls, names):
    assert f"@__cudnn${name}" in call
    # Key heads are not repeated; causality and window are the kernel's own,
    # segments and padding the mask.
    shared = f"tensor<{B}x{N}x{num_kv_heads}x{K}xbf16>"
    operands = f": (tensor<{B}x{N}x{H}x{K}xbf16>, {shared}, {shared}"
    assert operands in call and f"tensor<{B}x1x{N}x{N}xbf16>" in call
    assert "mask_type\\22: \\22CAUSAL\\22" in call
    assert f"sliding_window_length\\22: {window}," in call
    assert "fmha_scale\\22: 0.3," in call


def test_a_decoder_with_cudnn_calls_it_at_any_length(cudnn_calls, monkeypatch):
  monkeypatch.setattr(
      attention_kernels, "choose_backend", lambda wanted, **_: wanted
  )
  # An odd length, which cuDNN's backward pass refuses beside a mask.
  tokens = random_tokens(0, 2, 9)
  mask = jnp.array([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 0, 0]])
  model, params = small_language_model(
      attention_backend="cudnn",
      dtype="bfloat16",
      head_dim=8,
      sliding_window=3,
  )

  @jax.jit
  def loss(params):
    logits, _ = model.apply({"params": params}, tokens, mask)
    return jnp.square(jnp.where(mask[..., None] > 0, logits, 0.0)).sum()

  calls = cudnn_calls(jax.jit(jax.grad(loss)), params)
  forward = [x for x in calls if "fmhaScaleBiasSoftmax(" in x]
  backward = [x for x in calls if "fmhaScaleBiasSoftmaxBackward(" in x]
  assert len(forward) == len(backward) == 1  # in the loop over layers
  assert all("sliding_window_length\\22: 3," in x for x in calls)
  assert all("tensor<2x10x" in x for x in calls)


def _choose(wanted, **changes):
  options = dict(
      dtype="bfloat16", head_dim=64, softcap=0.0, platform="gpu"
  )
  return attention_kernels.choose_backend(wanted, **(options | changes))


def test_auto_takes_the_kernel_of_the_platform_where_it_can():
  assert _choose("auto") == "cudnn"
  assert _choose("auto", dtype="float32") == "xla"
  assert _choose("auto", softcap=50.0) == "xla"
  assert _choose("auto", platform="cpu") == "xla"
  assert _choose("auto", platform="tpu") == "splash"
  assert _choose("auto", platform="tpu", dtype="float32") == "splash"
  assert _choose("xla", platform="tpu") == "xla"


def test_a_mesh_that_is_but_a_shape_has_the_platform_of_jax():
  mesh = jax.sharding.AbstractMesh((2,), ("data",))
  split = jax.NamedSharding(mesh, jax.P("data"))
  seen = []
  jax.eval_shape(
      lambda x: seen.append(attention_kernels.platform_of(x)),
      jax.ShapeDtypeStruct((2,), jnp.float32, sharding=split),
  )
  assert seen == ["cpu"]


@pytest.mark.parametrize(
    "wanted,changes,reason",
    [
        ("cudnn", {"platform": "cpu"}, "needs a gpu, and this is a cpu"),
        ("splash", {}, "needs a tpu, and this is a gpu"),
        ("cudnn", {"dtype": "float32"}, "the model's dtype is float32"),
        ("cudnn", {"head_dim": 20}, "head_dim=20 is not a multiple of 8"),
        ("cudnn", {"softcap": 50.0}, "no attention_softcap"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_with_the_reason(
    wanted, changes, reason
):
  with pytest.raises(ValueError, match=f"{wanted}.*{reason}.*'xla'"):
    _choose(wanted, **changes)
