"""One decoder whose features a frozen config chooses.

    tokens -> embedding (+ learned positions) -> L x block -> final norm
    block:  x + attention(norm(x));  x + feed_forward(norm(x))
    parallel_residual:  x + attention(norm(x)) + feed_forward(norm(x))
    norm_placement 'post': x + norm(attention(x)); 'pre_and_post': both

`transformer_config.py` has the features, `families/` says which of them make
which published model.

Parameters (each under `layers` has a leading axis L, because the layers are
one scan; `unrolled` takes them apart for a decoding loop):

    token_embedding [V, D]                 position_embedding [max_length, D]
    layers/attention_norm/scale            layers/attention_post_norm/scale
    layers/attention/{query,key,value}/kernel [D, heads, K]   out [H, K, D]
    layers/attention/{query,key}_norm/scale [K] or [heads * K]  (qk_norm)
    layers/feed_forward_norm/scale         layers/feed_forward_post_norm/scale
    layers/feed_forward/{gate,up}/kernel [D, F]               down [F, D]
    layers/feed_forward/router/kernel [D, E], and experts/{gate,up,down} with a
      leading axis E, of a mixture of experts
    final_norm/scale

Norms and softmax run in float32 whatever the compute dtype. There is no
dropout: a policy's log-probabilities must be a function of its parameters. A
projection adds what an adapter has for it, see `lora.py`.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from rlhf_jax.models import attention, partitioning
from rlhf_jax.models.attention_layer import Attention, OwnCache
from rlhf_jax.models.feed_forward import FeedForward, MixtureOfExperts
from rlhf_jax.models.layers import INIT_STDDEV, Norm
from rlhf_jax.models.transformer_config import TransformerConfig
from rlhf_jax.types import pytree_dataclass, static

# Weights that are converted to the matmuls' dtype wherever they are used.
_CONVERTED = ("kernel", "token_embedding", "position_embedding")

segment_positions = attention.segment_positions


@pytree_dataclass
class Cache:
  """Keys and values of the tokens seen so far; J key-value heads.

  layers: keys and values [L, B, J, S, K]; or, of an unrolled model, such a pair
    without L for each layer, which a decoding loop reads and writes in place.
  positions: of the token that a slot holds in its text, -1 where it holds none.
  index: the slot that is written next, one for all rows. A write past S is not
    checked (the index is traced); whoever makes the cache makes it long enough.
  empty: static; nothing was written yet, so that a prefill does not attend to
    S empty slots. It changes the structure: fill a cache before it becomes the
    carry of a loop.
  """

  layers: tuple[Any, ...]
  positions: Int[Array, "B S"]
  index: Int[Array, ""]
  empty: bool = static(False)

  @property
  def is_unrolled(self) -> bool:
    return isinstance(self.layers[0], tuple)


def check_cache_length(config: TransformerConfig, length: int) -> None:
  """Checks that a model knows as many positions.

  Raises:
    ValueError: with the numbers.
  """
  if not 0 < length <= config.max_length:
    raise ValueError(
        f"cache length {length} is not in 1..max_length={config.max_length}"
    )


def init_cache(
    config: TransformerConfig, batch_size: int, length: int
) -> Cache:
  """An empty cache for `length` tokens a row, padding included."""
  check_cache_length(config, length)
  shape = (
      config.num_layers,
      batch_size,
      config.num_kv_heads,
      length,
      config.head_dim,
  )
  return Cache(
      layers=(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)),
      positions=jnp.full((batch_size, length), -1, jnp.int32),
      index=jnp.zeros((), jnp.int32),
      empty=True,
  )


def repeat_rows(cache: Cache, times: int) -> Cache:
  """Each row so many times, one after the other, as jnp.repeat does."""
  again = lambda x, axis: jnp.repeat(x, times, axis=axis)
  return dataclasses.replace(
      cache,
      # [..., B, J, S, K]
      layers=jax.tree.map(lambda x: again(x, x.ndim - 4), cache.layers),
      positions=again(cache.positions, 0),
  )


def unrolled_cache(cache: Cache, length: int) -> Cache:
  """The cache taken apart by layers, with slots up to `length`."""
  missing = length - cache.positions.shape[1]
  longer = lambda x, axis, fill: jnp.pad(
      x,
      [(0, missing if i == axis else 0) for i in range(x.ndim)],
      constant_values=fill,
  )
  own = lambda x: partitioning.constrain(longer(x, 2, 0), "layer_cache")
  return dataclasses.replace(
      cache,
      layers=tuple((own(k), own(v)) for k, v in zip(*cache.layers)),
      positions=longer(cache.positions, 1, -1),
  )


def unrolled(variables: Mapping[str, Any], dtype: str) -> dict[str, Any]:
  """A model's variables as its `is_unrolled` twin takes them, layer by layer.

  Made once, before a decoding loop. A loop that does little work a token would
  otherwise copy and convert as much as it reads: XLA on CPU copies a slice of
  stacked weights before it multiplies by it.

  Args:
    dtype: of the matmuls, in which their weights are kept.
  """

  def in_dtype(path, x):
    names = [entry.key for entry in path]
    is_exact = "router" in names or names[-1] not in _CONVERTED
    return x if is_exact else x.astype(dtype)

  def one(collection):
    collection = jax.tree_util.tree_map_with_path(in_dtype, collection)
    trunk = dict(collection["trunk"])
    layers = trunk.pop("layers")
    (num_layers,) = {len(x) for x in jax.tree.leaves(layers)}
    # Split at once: its gradient is one concatenation.
    parts = jax.tree.map(
        lambda x: [part[0] for part in jax.lax.split(x, (1,) * num_layers)],
        layers,
    )
    trunk |= {
        f"layers_{i}": jax.tree.map(lambda _, part, i=i: part[i], layers, parts)
        for i in range(num_layers)
    }
    return {**collection, "trunk": trunk}

  return {name: one(collection) for name, collection in variables.items()}


class Block(nn.Module):
  """One layer, in the (carry, broadcast, scanned, ...) form of nn.scan."""

  config: TransformerConfig

  @nn.compact
  def __call__(self, x, sights, past, is_full):
    """sights: one for all layers, or (of a full layer, of one with a window)
    where `is_full` says which this is."""
    cfg = self.config
    sight = sights[0]
    if is_full is not None:
      sight = jax.tree.map(lambda a, b: jnp.where(is_full, a, b), *sights)
    # GPT-2's rule: 2L residual additions keep the stream's variance.
    stddev = INIT_STDDEV / (2 * cfg.num_layers) ** 0.5
    out, new = Attention(cfg, stddev, name="attention")(
        self._norm("pre", "attention_norm", x), sight, past, is_full
    )
    attended = x + self._norm("post", "attention_post_norm", out)
    middle = x if cfg.parallel_residual else attended
    feed_forward = MixtureOfExperts if cfg.num_experts else FeedForward
    out = feed_forward(cfg, stddev, name="feed_forward")(
        self._norm("pre", "feed_forward_norm", middle)
    )
    x = attended + self._norm("post", "feed_forward_post_norm", out)
    x = partitioning.constrain(x, "hidden")
    return x, (None if past is None else new)

  def _norm(self, place: str, name: str, x: Float[Array, "B N D"]):
    has_norm = self.config.norm_placement in (place, "pre_and_post")
    return Norm(self.config, name=name)(x) if has_norm else x


class Transformer(nn.Module):
  """The trunk: tokens to hidden states after the final norm.

  is_unrolled: layers have params of their own (`unrolled`) and are no scan.
  """

  config: TransformerConfig
  is_unrolled: bool = False

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
    self.final_norm = Norm(cfg)
    if self.is_unrolled:
      self.layers = [Block(cfg) for _ in range(cfg.num_layers)]
      return
    # A loop keeps XLA from merging the recomputation with the original; layers
    # unrolled side by side need to be told.
    unrolled = cfg.scan_unroll > 1
    block = nn.remat(Block, prevent_cse=unrolled) if cfg.remat else Block
    self.layers = nn.scan(
        block,
        variable_axes={"params": 0, "adapter": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0, 0),
        out_axes=0,
        length=cfg.num_layers,
        unroll=cfg.scan_unroll,
    )(cfg)

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
    sights, is_full = self._sights(segment_ids, positions, cache)
    x = self.embed(tokens, segment_ids, positions)
    if self.is_unrolled:
      x, new = self._one_by_one(x, sights, cache, is_full)
    else:
      past = None
      if cache is not None:
        past = () if cache.empty else cache.layers
      x, new = self.layers(x, sights, past, is_full)
    if cache is not None:
      cache = _write(cache, new, _slots(segment_ids, positions))
    return self.final_norm(x), cache

  def _one_by_one(self, x, sights, cache, is_full):
    layers = []
    for i, layer in enumerate(self.layers):
      past = cache and OwnCache(*cache.layers[i], cache.index)
      x, pair = layer(x, sights, past, None if is_full is None else is_full[i])
      layers.append(pair)
    return x, tuple(layers)

  def _sights(self, segment_ids, positions, cache):
    """What layers see: computed once for each kind, and which kind is where."""
    cfg = self.config
    seen = functools.partial(_sight, cfg, segment_ids, positions, cache)
    rope = local_rope = (cfg.rope_theta, cfg.rope_scaling)
    if cfg.local_rope_theta:
      local_rope = (cfg.local_rope_theta, None)
    near = seen(cfg.sliding_window, *local_rope)
    if not cfg.full_attention_layers:
      return (near,), None
    is_full = np.isin(np.arange(cfg.num_layers), cfg.full_attention_layers)
    return (seen(0, *rope), near), jnp.asarray(is_full)

  def embed(
      self,
      tokens: Int[Array, "B N"],
      segment_ids: Int[Array, "B N"],
      positions: Int[Array, "B N"],
  ) -> Float[Array, "B N D"]:
    dtype = self.config.dtype
    ids = jnp.where(segment_ids > 0, tokens, 0)
    x = _rows(self.token_embedding, ids).astype(dtype)
    if self.config.scale_embedding:
      x = x * jnp.asarray(self.config.width**0.5, dtype)
    if self.config.position == "learned":
      x = x + _rows(self.position_embedding, positions).astype(dtype)
    return partitioning.constrain(x, "hidden")

  def tied_logits(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
    """Logits in float32 with the token embedding as the head."""
    logits = jnp.einsum(
        "bnd,vd->bnv",
        partitioning.constrain(hidden, "before_head"),
        self.token_embedding.astype(self.config.dtype),
        preferred_element_type=jnp.float32,
    )
    logits = partitioning.constrain(logits, "logits")
    return attention.softcap(logits, self.config.logit_softcap)


def _sight(
    config: TransformerConfig,
    segment_ids: Int[Array, "B N"],
    positions: Int[Array, "B N"],
    cache: Cache | None,
    window: int,
    theta: float,
    scaling: attention.RopeScaling | None,
) -> dict[str, Any]:
  """Masks and rotations, which all layers of one kind share.

  {"segment_ids", "mask", "cache_mask" with a cache that is not empty, "rotary":
  (sin, cos) if rotary}
  """
  sight = {
      "segment_ids": segment_ids,
      "mask": attention.causal_mask(segment_ids, window),
  }
  if config.position == "rotary":
    sight["rotary"] = attention.rotary_tables(
        positions, config.rotary_dim, theta, scaling
    )
  if cache is not None and not cache.empty:
    slots = cache.positions
    if cache.is_unrolled:
      # An unrolled model writes before it reads.
      slots = jax.lax.dynamic_update_slice_in_dim(
          slots, _slots(segment_ids, positions), cache.index, axis=1
      )
    sight["cache_mask"] = attention.cache_mask(slots, positions, window)
  return sight


def _rows(table: Float[Array, "V D"], ids: Int[Array, "B N"]):
  # NaN for an id outside of the table: loud, where clipping would be silent.
  ids = partitioning.constrain(ids, "looked_up")
  rows = table.at[ids].get(
      mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
  )
  rows = partitioning.constrain(rows, "embedded")
  return partitioning.constrain(rows, "exchanged")


def _positions(
    segment_ids: Int[Array, "B N"], cache: Cache | None
) -> Int[Array, "B N"]:
  if cache is None:
    return segment_positions(segment_ids)
  before = jnp.max(cache.positions, axis=1) + 1
  seen = before[:, None] + jnp.cumsum(segment_ids, axis=1, dtype=jnp.int32)
  return jnp.maximum(seen - 1, 0)


def _slots(segment_ids: Int[Array, "B N"], positions: Int[Array, "B N"]):
  return jnp.where(segment_ids > 0, positions, -1)


def _write(
    cache: Cache, new: tuple[Any, ...], slots: Int[Array, "B N"]
) -> Cache:
  n, size = slots.shape[1], cache.positions.shape[1]
  if n > size:
    raise ValueError(f"{n} tokens do not fit into a cache of length {size}")
  put = jax.lax.dynamic_update_slice_in_dim
  layers = new
  if not cache.is_unrolled:
    layers = tuple(
        partitioning.constrain(put(old, x, cache.index, axis=3), "cache")
        for old, x in zip(cache.layers, new, strict=True)
    )
  return Cache(
      layers=layers,
      positions=put(cache.positions, slots, cache.index, axis=1),
      index=cache.index + n,
  )
