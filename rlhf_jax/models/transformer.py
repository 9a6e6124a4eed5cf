"""One decoder whose features a frozen config chooses.

    tokens -> embedding (+ learned positions) -> L x block -> final norm
    block:  x + attention(norm(x));  x + feed_forward(norm(x))
    parallel_residual:  x + attention(norm(x)) + feed_forward(norm(x))

`families/` says which features make which published model.

Parameters (each under `layers` has a leading axis L, because the layers are
one scan):

    token_embedding [V, D]                 position_embedding [max_length, D]
    layers/attention_norm/scale            layers/feed_forward_norm/scale
    layers/attention/{query,key,value}/kernel [D, heads, K]   out [H, K, D]
    layers/attention/{query,key}_norm/scale [K] or [heads * K]  (qk_norm)
    layers/feed_forward/{gate,up}/kernel [D, F]               down [F, D]
    final_norm/scale

Norms and softmax run in float32 whatever the compute dtype. There is no
dropout: a policy's log-probabilities must be a function of its parameters. A
projection adds what an adapter has for it, see `lora.py`.
"""

import dataclasses
import functools
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.models import attention, lora
from rlhf_jax.types import pytree_dataclass, static

segment_positions = attention.segment_positions

INIT_STDDEV = 0.02
_CHOICES = {
    "position": ("rotary", "learned"),
    "norm": ("rmsnorm", "layernorm"),
    "activation": ("swiglu", "gelu", "gelu_exact", "relu"),
    "attention_bias": ("none", "qkv", "all"),
    "qk_norm": ("none", "head"),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
}
_POSITIVE = (
    "vocab_size num_layers width num_heads num_kv_heads head_dim ff_dim "
    "max_length scan_unroll head_chunk_size norm_epsilon rope_theta "
    "rotary_fraction"
).split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """The shape of a decoder; hashable, so that it can be static under jit.

  num_kv_heads: fewer than num_heads is grouped-query attention.
  head_dim: need not be width / num_heads.
  max_length: longest row, and the rows of the learned position table.
  activation: 'swiglu' has a gate; 'gelu' is the tanh approximation, as in
    GPT-2; 'gelu_exact' the one with erf.
  attention_bias: on no projection, on query, key and value, or on out too.
  norm_bias: of layernorm.
  qk_norm: 'head' norms each head's query and key over its width before they are
    rotated (Qwen3).
  parallel_residual: attention and feed-forward read the same x (GPT-NeoX).
  rotary_fraction: share of a head's width that is rotated, from its start.
  rope_scaling: how frequencies are changed for longer texts.
  sliding_window: a token sees so many, itself included; 0 is all before it.
  dtype: of activations and matmuls; param_dtype: of the stored parameters
    (training keeps float32; in bfloat16 small steps round away).
  remat: recompute each layer in the backward pass instead of storing it.
  scan_unroll: layers a scan iteration; more is faster to run on CPU and slower
    to compile.
  head_chunk_size: positions of a row whose logits exist at a time where a loss
    measures them. Like remat and scan_unroll, it never changes a result.
  """

  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  ff_dim: int
  max_length: int
  position: Literal["rotary", "learned"] = "rotary"
  norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
  activation: Literal["swiglu", "gelu", "gelu_exact", "relu"] = "swiglu"
  attention_bias: Literal["none", "qkv", "all"] = "none"
  feed_forward_bias: bool = False
  norm_bias: bool = False
  qk_norm: Literal["none", "head"] = "none"
  parallel_residual: bool = False
  tie_head: bool = True
  norm_epsilon: float = 1e-5
  rope_theta: float = 10000.0
  rotary_fraction: float = 1.0
  rope_scaling: attention.RopeScaling | None = None
  sliding_window: int = 0
  dtype: Literal["float32", "bfloat16"] = "float32"
  param_dtype: Literal["float32", "bfloat16"] = "float32"
  remat: bool = False
  scan_unroll: int = 1
  head_chunk_size: int = 128

  def __post_init__(self):
    for name in _POSITIVE:
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
    for name, choices in _CHOICES.items():
      if getattr(self, name) not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(choices)}, got "
            f"{getattr(self, name)!r}"
        )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
          f"num_heads={self.num_heads} must be a multiple of "
          f"num_kv_heads={self.num_kv_heads}"
      )
    if self.position == "rotary" and self.rotary_dim % 2:
      raise ValueError(
          f"rotary_fraction={self.rotary_fraction} of head_dim={self.head_dim} "
          "must be even with position='rotary'"
      )
    if self.rotary_fraction > 1 or self.sliding_window < 0:
      raise ValueError(
          f"rotary_fraction={self.rotary_fraction} must be at most 1, "
          f"sliding_window={self.sliding_window} 0 or greater"
      )
    if self.num_layers % self.scan_unroll:
      raise ValueError(
          f"scan_unroll={self.scan_unroll} must divide "
          f"num_layers={self.num_layers}"
      )

  @property
  def rotary_dim(self) -> int:
    """How many of a head's dimensions are rotated."""
    return int(self.head_dim * self.rotary_fraction)


@pytree_dataclass
class Cache:
  """Keys and values of the tokens seen so far; J key-value heads.

  mask: True on slots that hold a real token.
  index: the first free slot, one for all rows. A write past S is not checked
    (the index is traced); whoever makes the cache makes it long enough.
  empty: static; nothing was written yet, so that a prefill does not attend to
    S empty slots. It changes the structure: fill a cache before it becomes the
    carry of a loop.
  """

  k: Float[Array, "L B J S K"]
  v: Float[Array, "L B J S K"]
  mask: Bool[Array, "B S"]
  index: Int[Array, ""]
  empty: bool = static(False)


def init_cache(
    config: TransformerConfig, batch_size: int, length: int
) -> Cache:
  """An empty cache for `length` tokens a row, padding included."""
  if not 0 < length <= config.max_length:
    raise ValueError(
        f"cache length {length} is not in 1..max_length={config.max_length}"
    )
  shape = (
      config.num_layers,
      batch_size,
      config.num_kv_heads,
      length,
      config.head_dim,
  )
  return Cache(
      k=jnp.zeros(shape, config.dtype),
      v=jnp.zeros(shape, config.dtype),
      mask=jnp.zeros((batch_size, length), jnp.bool_),
      index=jnp.zeros((), jnp.int32),
      empty=True,
  )


class Norm(nn.Module):
  """Over the last axis, in float32."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    cfg = self.config
    x = x.astype(jnp.float32)
    if cfg.norm == "layernorm":
      x = x - jnp.mean(x, axis=-1, keepdims=True)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + cfg.norm_epsilon)
    width = x.shape[-1:]
    lead = (None,) * (x.ndim - 1)
    scale = self.param("scale", nn.initializers.ones, width, cfg.param_dtype)
    x = x * scale.astype(jnp.float32)[lead]
    if cfg.norm == "layernorm" and cfg.norm_bias:
      bias = self.param("bias", nn.initializers.zeros, width, cfg.param_dtype)
      x = x + bias.astype(jnp.float32)[lead]
    return x.astype(cfg.dtype)


class Projection(nn.Module):
  """x times a kernel of any rank, the `num_in` leading kernel axes contracted.

  It runs as one product of matrices: XLA's CPU backend otherwise lays out
  transposed copies of the activations for each kernel's gradient.
  """

  config: TransformerConfig
  shape: tuple[int, ...]
  use_bias: bool
  num_in: int = 1
  stddev: float = INIT_STDDEV

  @nn.compact
  def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    cfg = self.config
    init = nn.initializers.normal(self.stddev)
    kernel = self.param("kernel", init, self.shape, cfg.param_dtype)
    out_shape = self.shape[self.num_in :]
    lead = x.shape[: x.ndim - self.num_in]
    size_in = math.prod(self.shape[: self.num_in])
    kernel = kernel.astype(cfg.dtype).reshape(size_in, -1)
    out = (x.reshape(-1, size_in) @ kernel).reshape(*lead, *out_shape)
    if "adapter" in self.variables:
      added = lora.product(
          x.reshape(*lead, size_in), self.variables["adapter"]
      )
      out = out + added.reshape(out.shape)
    if not self.use_bias:
      return out
    zeros = nn.initializers.zeros
    bias = self.param("bias", zeros, out_shape, cfg.param_dtype)
    return out + bias.astype(cfg.dtype)[None, None]


class Attention(nn.Module):
  config: TransformerConfig
  residual_stddev: float

  @nn.compact
  def __call__(self, x, shared, past):
    """Returns (output, this call's keys and values [B, J, N, K]).

    past: None without a cache, () with an empty one, else its (k, v).
    """
    cfg = self.config
    kv_shape = (cfg.width, cfg.num_kv_heads, cfg.head_dim)
    query_shape = (cfg.width, cfg.num_heads, cfg.head_dim)
    has_bias = cfg.attention_bias != "none"
    query = Projection(cfg, query_shape, has_bias, name="query")(x)
    key = Projection(cfg, kv_shape, has_bias, name="key")(x)
    value = Projection(cfg, kv_shape, has_bias, name="value")(x)
    if cfg.qk_norm == "head":
      query = Norm(cfg, name="query_norm")(query)
      key = Norm(cfg, name="key_norm")(key)
    if cfg.position == "rotary":
      query = attention.apply_rotary(query, *shared["rotary"])
      key = attention.apply_rotary(key, *shared["rotary"])
    query, key, value = (jnp.swapaxes(a, 1, 2) for a in (query, key, value))
    keys, values, masks = [key], [value], [shared["mask"]]
    if past:
      keys.append(past[0])
      values.append(past[1])
      masks.append(shared["past_mask"])
    out = attention.attend(query, keys, values, masks)
    out = Projection(
        cfg,
        (cfg.num_heads, cfg.head_dim, cfg.width),
        cfg.attention_bias == "all",
        num_in=2,
        stddev=self.residual_stddev,
        name="out",
    )(jnp.swapaxes(out, 1, 2))
    return out, (key, value)


class FeedForward(nn.Module):
  config: TransformerConfig
  residual_stddev: float

  @nn.compact
  def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    cfg = self.config
    has_bias = cfg.feed_forward_bias
    wide = functools.partial(
        Projection, cfg, (cfg.width, cfg.ff_dim), has_bias
    )
    up = wide(name="up")(x)
    if cfg.activation == "swiglu":
      up = jax.nn.silu(wide(name="gate")(x)) * up
    else:
      up = _ACTIVATIONS[cfg.activation](up)
    down_shape = (cfg.ff_dim, cfg.width)
    return Projection(
        cfg, down_shape, has_bias, stddev=self.residual_stddev, name="down"
    )(up)


_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


class Block(nn.Module):
  """One layer, in the (carry, broadcast, scanned) form that nn.scan takes."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, shared, past):
    cfg = self.config
    # GPT-2's rule: 2L residual additions keep the stream's variance.
    stddev = INIT_STDDEV / (2 * cfg.num_layers) ** 0.5
    out, new = Attention(cfg, stddev, name="attention")(
        Norm(cfg, name="attention_norm")(x), shared, past
    )
    attended = x + out
    middle = x if cfg.parallel_residual else attended
    x = attended + FeedForward(cfg, stddev, name="feed_forward")(
        Norm(cfg, name="feed_forward_norm")(middle)
    )
    return x, (None if past is None else new)


class Transformer(nn.Module):
  """The trunk: tokens to hidden states after the final norm."""

  config: TransformerConfig

  def setup(self):
    cfg = self.config
    init = nn.initializers.normal(INIT_STDDEV)
    self.token_embedding = self.param(
        "token_embedding", init, (cfg.vocab_size, cfg.width), cfg.param_dtype
    )
    if cfg.position == "learned":
      shape = (cfg.max_length, cfg.width)
      self.position_embedding = self.param(
          "position_embedding", init, shape, cfg.param_dtype
      )
    # A loop keeps XLA from merging the recomputation with the original; layers
    # unrolled side by side need to be told.
    unrolled = cfg.scan_unroll > 1
    block = nn.remat(Block, prevent_cse=unrolled) if cfg.remat else Block
    self.layers = nn.scan(
        block,
        variable_axes={"params": 0, "adapter": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0),
        out_axes=0,
        length=cfg.num_layers,
        unroll=cfg.scan_unroll,
    )(cfg)
    self.final_norm = Norm(cfg)

  def __call__(
      self,
      tokens: Int[Array, "B N"],
      segment_ids: Int[Array, "B N"],
      cache: Cache | None = None,
  ) -> tuple[Float[Array, "B N D"], Cache | None]:
    """Hidden states, and the cache with these tokens added if one was given.

    Args:
      tokens: anything may stand where segment_ids is 0; it is not read. A real
        token outside of the vocabulary gives NaN.
      segment_ids: 0 is padding. Without a cache, tokens see what is before
        them in their own segment, and a segment is one run of equal ids. With
        a cache, 1 on real tokens: all of a row is one segment.
      cache: tokens are written from slot cache.index on; a token's position is
        the number of real tokens before it.
    """
    if tokens.shape[1] > self.config.max_length:
      raise ValueError(
          f"tokens have length {tokens.shape[1]}, more than "
          f"max_length={self.config.max_length}"
      )
    if cache is not None:
      segment_ids = (segment_ids > 0).astype(jnp.int32)
    positions = _positions(segment_ids, cache)
    window = self.config.sliding_window
    shared = {"mask": attention.causal_mask(segment_ids, window)}
    if self.config.position == "rotary":
      shared["rotary"] = attention.rotary_tables(
          positions,
          self.config.rotary_dim,
          self.config.rope_theta,
          self.config.rope_scaling,
      )
    x = self.embed(tokens, segment_ids, positions)
    if cache is None:
      x, _ = self.layers(x, shared, None)
      return self.final_norm(x), None
    shared["past_mask"] = attention.past_mask(cache.mask, positions, window)
    past = () if cache.empty else (cache.k, cache.v)
    x, new = self.layers(x, shared, past)
    return self.final_norm(x), _write(cache, new, segment_ids)

  def embed(
      self,
      tokens: Int[Array, "B N"],
      segment_ids: Int[Array, "B N"],
      positions: Int[Array, "B N"],
  ) -> Float[Array, "B N D"]:
    dtype = self.config.dtype
    ids = jnp.where(segment_ids > 0, tokens, 0)
    x = _rows(self.token_embedding, ids).astype(dtype)
    if self.config.position == "learned":
      x = x + _rows(self.position_embedding, positions).astype(dtype)
    return x

  def tied_logits(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
    """Logits in float32 with the token embedding as the head."""
    return jnp.einsum(
        "bnd,vd->bnv",
        hidden,
        self.token_embedding.astype(self.config.dtype),
        preferred_element_type=jnp.float32,
    )


def _rows(table: Float[Array, "V D"], ids: Int[Array, "B N"]):
  # NaN for an id outside of the table: loud, where clipping would be silent.
  return table.at[ids].get(
      mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
  )


def _positions(
    segment_ids: Int[Array, "B N"], cache: Cache | None
) -> Int[Array, "B N"]:
  if cache is None:
    return segment_positions(segment_ids)
  before = jnp.sum(cache.mask, axis=1, dtype=jnp.int32)
  seen = before[:, None] + jnp.cumsum(segment_ids, axis=1, dtype=jnp.int32)
  return jnp.maximum(seen - 1, 0)


def _write(
    cache: Cache,
    new: tuple[Float[Array, "L B J N K"], Float[Array, "L B J N K"]],
    real: Int[Array, "B N"],
) -> Cache:
  n, size = real.shape[1], cache.mask.shape[1]
  if n > size:
    raise ValueError(f"{n} tokens do not fit into a cache of length {size}")
  k, v = (
      jax.lax.dynamic_update_slice_in_dim(old, x, cache.index, axis=3)
      for old, x in zip((cache.k, cache.v), new, strict=True)
  )
  mask = jax.lax.dynamic_update_slice_in_dim(
      cache.mask, real > 0, cache.index, axis=1
  )
  return Cache(k=k, v=v, mask=mask, index=cache.index + n)
