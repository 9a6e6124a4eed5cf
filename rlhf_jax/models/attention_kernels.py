"""Attention of a text to itself by the kernels that ship with jax.

Each is `attention.attend` with `attention.causal_mask` for one bank, without
scores of [B, H, N, N] in memory:

    cudnn    flash attention on NVIDIA GPUs, in bfloat16 alone
    splash   the Pallas kernel for TPUs, which also passes over whole blocks
             that the mask rules out

Segments, padding on either side and sliding windows work in both. What a
backend cannot do is refused by `choose_backend`, with the reason. Decoding over
a cache has one query a row and takes the plain way in every backend.
"""

from typing import Literal

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from rlhf_jax import device_mesh, sharding
from rlhf_jax.models import attention

Backend = Literal["xla", "cudnn", "splash"]

_PLATFORM = {"cudnn": "gpu", "splash": "tpu"}
# A TPU's vector has so many lanes; no block is smaller.
_LANES = 128


def choose_backend(
    wanted: str, *, dtype: str, head_dim: int, softcap: float, platform: str
) -> Backend:
  """The backend for `wanted`, which may be 'auto'.

  'auto' is cuDNN on a GPU and splash on a TPU where they can, XLA elsewhere.

  Args:
    wanted: auto, xla, cudnn or splash.
    dtype, head_dim, softcap: of the model.
    platform: cpu, gpu or tpu; see `platform_of`.

  Raises:
    ValueError: if `wanted` cannot do this; says why.
  """
  refusals = {
      "xla": "",
      "cudnn": _refusal_of_cudnn(dtype, head_dim, softcap),
      "splash": "",
  }
  for name, needed in _PLATFORM.items():
    if platform != needed:
      refusals[name] = f"it needs a {needed}, and this is a {platform}"
  if wanted == "auto":
    able = [name for name in _PLATFORM if not refusals[name]]
    return able[0] if able else "xla"
  if refusals[wanted]:
    raise ValueError(
        f"attention_backend={wanted!r}: {refusals[wanted]}; take 'auto' or "
        "'xla'"
    )
  return wanted


def platform_of(x: Array) -> str:
  """Where a (traced) array will be computed.

  It need not be where jax runs: programs are compiled for machines that are
  not there, too.
  """
  device = jax.typeof(x).sharding.mesh.abstract_device
  # None without a mesh, and of a mesh that is but a shape.
  return jax.default_backend() if device is None else device.platform


def _refusal_of_cudnn(dtype: str, head_dim: int, softcap: float) -> str:
  if dtype != "bfloat16":
    return f"it computes in bfloat16, and the model's dtype is {dtype}"
  if head_dim % 8 or head_dim > 128:
    return f"head_dim={head_dim} is not a multiple of 8 up to 128"
  if softcap:
    return "it has no attention_softcap"
  device = jax.devices()[0]
  if device.platform != "gpu":  # compiled here for elsewhere
    return ""
  if "cuda" not in device.client.platform_version:
    return "it is for NVIDIA's GPUs"
  if float(device.compute_capability) < 8:
    return f"{device.device_kind} is older than compute capability 8.0"
  return ""


def attend(
    backend: Backend,
    query: Float[Array, "B H N K"],
    key: Float[Array, "B J N K"],
    value: Float[Array, "B J N K"],
    segment_ids: Int[Array, "B N"],
    *,
    window: int,
    scale: float,
    softcap: float,
) -> Float[Array, "B H N K"]:
  """Causal attention within segments, as `attention.attend`.

  Args:
    backend: cudnn or splash.
    query: H = G * J heads; heads j * G ... j * G + G - 1 share key head j.
    segment_ids: 0 is padding, which sees padding.
    window: a token sees so many, itself included; 0 is all before it.
    scale: of the queries.
    softcap: of the scores, 0 for none.
  """
  if backend == "cudnn":
    return fused(
        query, key, value, segment_ids, window=window, scale=scale
    )
  return splash(
      query,
      key,
      value,
      segment_ids,
      window=window,
      scale=scale,
      softcap=softcap,
      interpret=platform_of(query) != "tpu",
  )


def fused(
    query: Float[Array, "B H N K"],
    key: Float[Array, "B J N K"],
    value: Float[Array, "B J N K"],
    segment_ids: Int[Array, "B N"],
    *,
    window: int,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B H N K"]:
  """`jax.nn.dot_product_attention`.

  Causality and the window are the kernel's own, so that it passes over what
  they rule out; segments are a mask. 'xla' is for comparison.
  """
  length = query.shape[2]
  # cuDNN's backward pass wants an even length beside a mask.
  query, key, value, segment_ids = _fill_up(
      query, key, value, segment_ids, multiple=2
  )
  out = jax.nn.dot_product_attention(
      *(jnp.swapaxes(x, 1, 2) for x in (query, key, value)),
      mask=(segment_ids[:, :, None] == segment_ids[:, None, :])[:, None],
      scale=scale,
      is_causal=True,
      local_window_size=(window - 1, 0) if window else None,
      implementation=implementation,
  )
  return jnp.swapaxes(out, 1, 2)[:, :, :length]


def splash(
    query: Float[Array, "B H N K"],
    key: Float[Array, "B J N K"],
    value: Float[Array, "B J N K"],
    segment_ids: Int[Array, "B N"],
    *,
    window: int,
    scale: float,
    softcap: float,
    interpret: bool = False,
) -> Float[Array, "B H N K"]:
  """The splash kernel, on each device's own rows.

  interpret: run it as plain operations, on any platform and slowly.
  """
  mesh = sharding.mesh_of(query)
  length = query.shape[2]
  query = attention.scaled(query, scale)
  arrays = _fill_up(query, key, value, segment_ids, multiple=_LANES)

  def own_rows(query, key, value, segment_ids):
    kernel = _splash_kernel(query.shape, window, softcap, interpret)
    segments = splash_attention_kernel.SegmentIds(segment_ids, segment_ids)
    return jax.vmap(kernel)(query, key, value, segments)

  if mesh is not None:
    # XLA does not split a kernel over devices. Rows that do not divide, of an
    # evaluation say, are computed on all of them.
    rows, heads, _, _ = sharding.fitting_spec(
        key.shape, (device_mesh.ROWS, "tensor", None, None), mesh
    )
    own = PartitionSpec(rows, heads)
    own_rows = jax.shard_map(
        own_rows,
        mesh=mesh,
        in_specs=(own, own, own, PartitionSpec(rows)),
        out_specs=own,
        check_vma=False,
    )
  return own_rows(*arrays)[:, :, :length]


def _splash_kernel(
    shape: tuple[int, ...], window: int, softcap: float, interpret: bool
):
  _, num_heads, length, _ = shape
  if window:
    mask = splash_attention_mask.LocalMask(
        (length, length), window_size=(window - 1, 0), offset=0
    )
  else:
    mask = splash_attention_mask.CausalMask((length, length))
  block = next(x for x in (512, 256, _LANES) if length % x == 0)
  names = (
      "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv "
      "block_kv_dkv_compute block_q_dq block_kv_dq"
  )
  return splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([mask] * num_heads),
      block_sizes=splash_attention_kernel.BlockSizes(
          **dict.fromkeys(names.split(), block)
      ),
      attn_logits_soft_cap=softcap or None,
      head_shards=1,
      q_seq_shards=1,
      interpret=interpret,
  )


def _fill_up(query, key, value, segment_ids, *, multiple: int):
  """Padding at the end, up to a multiple; it sees padding alone."""
  missing = -query.shape[2] % multiple
  wide = ((0, 0), (0, 0), (0, missing), (0, 0))
  return (
      *(jnp.pad(x, wide) for x in (query, key, value)),
      jnp.pad(segment_ids, ((0, 0), (0, missing))),
  )
