"""Adapters of low rank beside frozen weights (LoRA), as functions of params.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv
2106.09685, equation 3): a projection computes

    x W + scale * (dropout(x) A) B,      scale = alpha / rank

where W is frozen, A starts random and B at zero, so that a fresh adapter is no
adapter. No copy of W with the product added ever exists while training. With
`rank_stabilized`, scale = alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732).

An adapter is a tree like its model's, with two arrays in each projection that
it adapts; of several heads the widths are flattened:

    trunk/layers/attention/query/{lora_a [L, in, rank], lora_b [L, rank, out]}

Wherever a function of `models/functions.py` takes params, it also takes

    {"base": language-model params, "adapter": an adapter, "adapter_scale": [],
     "head": a scalar head, of a reward or value model}

Without "adapter" that is the base itself. Training splits it in two: what an
update changes ("adapter" and "head") is the state's, the rest is `frozen` and
serves everything that starts from the same base.
"""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from rlhf_jax.models import partitioning

ALL_LINEAR = "all-linear"
A, B = "lora_a", "lora_b"
_LAYERS = ("trunk", "layers")


class LoraError(ValueError):
  """An adapter that does not fit its model; names the projections."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """What is adapted, and how.

  rank: of the added product; 0 is no adapter at all.
  alpha: the product's weight is alpha / rank, or alpha / sqrt(rank) if
    rank_stabilized.
  targets: regular expressions, each for the whole name of a projection, such as
    'attention/query' or 'feed_forward/.*'; or 'all-linear'. In all layers. A
    mixture's router and experts have no adapters.
  dropout: share of a projection's inputs that its adapter does not see, while
    training.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]
  dropout: float = 0.0
  rank_stabilized: bool = False

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f"rank={self.rank} must be 0 (no adapter) or greater")
    if self.rank and not 0 < self.alpha < math.inf:
      raise ValueError(f"alpha={self.alpha} must be greater than 0 and finite")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
    if self.rank and not self.targets:
      raise ValueError("targets names no projection; take ('all-linear',)")
    for target in self.targets:
      try:
        re.compile(target)
      except re.error as error:
        raise ValueError(
            f"targets: {target!r} is no regular expression: {error}"
        ) from error

  @property
  def scale(self) -> float:
    """The product's weight."""
    root = math.sqrt(self.rank) if self.rank_stabilized else self.rank
    return self.alpha / root


def target_names(config: LoraConfig, base: Mapping[str, Any]) -> list[str]:
  """The projections that `config` adapts: 'attention/query', ...

  Raises:
    LoraError: a target matches none; names those that there are.
  """
  names, found = projections(base), set()
  for target in config.targets:
    everything = target == ALL_LINEAR
    matched = {x for x in names if everything or re.fullmatch(target, x)}
    if not matched:
      raise LoraError(
          f"targets: {target!r} is none of the projections {', '.join(names)}"
      )
    found |= matched
  return [name for name in names if name in found]


def projections(base: Mapping[str, Any]) -> list[str]:
  """What may have an adapter: 'attention/query', ..."""
  kernels = [x for x in _layers(base) if x.endswith("/kernel")]
  names = [x.removesuffix("/kernel") for x in kernels]
  return [x for x in names if not re.search("/(router|experts)", x)]


def init(
    rng: Key[Array, ""] | UInt32[Array, "2"],
    config: LoraConfig,
    base: Mapping[str, Any],
) -> dict[str, Any]:
  """A fresh adapter, float32: A uniform within 1 / sqrt(in), B zero.

  Args:
    base: params with a "trunk"; shapes are enough.

  Reference: A is He et al.'s uniform initialisation (arXiv 1502.01852) with
  slope sqrt(5), as the package `peft` has it.
  """
  if config.rank < 1:
    raise LoraError("rank=0 is no adapter")
  layers, leaves = _layers(base), {}
  for i, name in enumerate(target_names(config, base)):
    num_layers, size_in, size_out = _sizes(name, layers[f"{name}/kernel"].shape)
    bound = 1 / math.sqrt(size_in)
    leaves[f"{name}/{A}"] = jax.random.uniform(
        jax.random.fold_in(rng, i),
        (num_layers, size_in, config.rank),
        jnp.float32,
        -bound,
        bound,
    )
    leaves[f"{name}/{B}"] = jnp.zeros(
        (num_layers, config.rank, size_out), jnp.float32
    )
  return from_layers(leaves)


def merge(
    base: Mapping[str, Any], adapter: Mapping[str, Any], scale: float
) -> dict[str, Any]:
  """Params whose kernels are W + scale * A B; the rest is the base's own.

  The product is of float32 and the sum rounded to the kernel's dtype.

  Raises:
    LoraError: the adapter has a projection that the base has not, or of another
      shape.
  """
  layers = _layers(base)
  check_fits(adapter, base)
  leaves, scale = by_projection(adapter), jnp.float32(scale)
  kernels = {
      f"{name}/kernel": _merged(layers[f"{name}/kernel"], a, b, scale)
      for name, (a, b) in leaves.items()
  }
  merged = flax.traverse_util.unflatten_dict(layers | kernels, sep="/")
  return {**base, "trunk": {**base["trunk"], "layers": merged}}


@jax.jit
def _merged(kernel, a, b, scale):
  def one_layer(layer):
    kernel, a, b = layer
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    delta = scale * product.reshape(kernel.shape)
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)

  # One at a time: this comes when a run that just fits has ended.
  return jax.lax.map(one_layer, (kernel, a, b))


def check_fits(adapter: Mapping[str, Any], base: Mapping[str, Any]) -> None:
  """Raises LoraError unless `base` has all of the adapter's projections."""
  layers = _layers(base)
  for name, (a, b) in by_projection(adapter).items():
    if f"{name}/kernel" not in layers:
      raise LoraError(f"the adapter has {name}, which the model has not")
    shape = layers[f"{name}/kernel"].shape
    num_layers, size_in, size_out = _sizes(name, shape)
    rank = a.shape[-1]
    wanted = (num_layers, size_in, rank), (num_layers, rank, size_out)
    if (a.shape, b.shape) != wanted:
      raise LoraError(
          f"the adapter's {name} has the shapes {a.shape} and {b.shape}, and "
          f"beside a kernel {shape} they are {wanted[0]} and {wanted[1]}"
      )


def by_projection(adapter: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """'attention/query' -> (A [L, in, rank], B [L, rank, out])."""
  leaves = _layers(adapter)
  names = sorted({path.rpartition("/")[0] for path in leaves})
  pair = lambda name: (leaves[f"{name}/{A}"], leaves[f"{name}/{B}"])
  return {name: pair(name) for name in names}


def from_layers(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """The tree of {'attention/query/lora_a': array, ...}."""
  layers = flax.traverse_util.unflatten_dict(dict(leaves), sep="/")
  return {"trunk": {"layers": layers}}


def rescale(adapter: Mapping[str, Any], factor: float) -> dict[str, Any]:
  """An adapter whose product is `factor` times this one's."""
  leaves = {}
  for name, (a, b) in by_projection(adapter).items():
    leaves |= {f"{name}/{A}": a, f"{name}/{B}": b * jnp.float32(factor)}
  return from_layers(leaves)


# --- applying -----------------------------------------------------------------


def weights_of(params: Mapping[str, Any]) -> Mapping[str, Any]:
  """The model's params but for its adapter: plain ones as they are."""
  if "base" not in params:
    return params
  if "head" in params:
    return {"trunk": params["base"]["trunk"], "head": params["head"]}
  return params["base"]


def variables(params: Mapping[str, Any]) -> dict[str, Any]:
  """What flax applies a model to, of plain params or of a base with an adapter.

  Args:
    params: see the module's docstring. With "adapter_dropout" (a share) and
      "row_rngs" (a key for each row of the batch), inputs are dropped.
  """
  weights = weights_of(params)
  if "adapter" not in params:
    return {"params": weights}
  scale = params["adapter_scale"]
  leaves = {}
  for i, (name, (a, b)) in enumerate(by_projection(params["adapter"]).items()):
    leaves |= {f"{name}/{A}": a, f"{name}/{B}": b * scale}
    if "row_rngs" in params:
      leaves |= _dropout(params, name, number=i, num_layers=a.shape[0])
  return {"params": weights, "adapter": from_layers(leaves)}


def _dropout(params, name: str, number: int, num_layers: int):
  """A key for each row in each layer of one projection, and the share."""
  fold = jax.vmap(jax.random.fold_in, (0, None))  # over rows
  numbers = number * num_layers + jnp.arange(num_layers)
  rngs_LB = jax.vmap(fold, (None, 0))(params["row_rngs"], numbers)
  share_L = jnp.broadcast_to(params["adapter_dropout"], (num_layers,))
  return {f"{name}/row_rngs": rngs_LB, f"{name}/dropout": share_L}


def product(
    x: Float[Array, "B N I"], adapter: Mapping[str, Any]
) -> Float[Array, "B N O"]:
  """(dropout(x) A) B of one projection in one layer, in x's dtype.

  Args:
    adapter: 'lora_a' [I, rank] and 'lora_b' [rank, O], scaled already; with
      dropout, 'row_rngs' [B] and 'dropout', a share.
  """
  if "row_rngs" in adapter:
    x = _drop(x, adapter["row_rngs"], adapter["dropout"])
  a, b = (adapter[name].astype(x.dtype) for name in (A, B))
  whole = partitioning.splits_sequence(x)
  flat = x if whole else x.reshape(-1, x.shape[-1])
  out = (flat @ a) @ b
  return out.reshape(*x.shape[:-1], out.shape[-1])


def _drop(x, row_rngs, share):
  # Row by row, each with its own key: what a row loses depends neither on the
  # rows beside it, nor on where it is computed.
  draw = lambda rng: jax.random.bernoulli(rng, 1 - share, x.shape[1:])
  kept = x / (1 - share).astype(x.dtype)
  return jnp.where(jax.vmap(draw)(row_rngs), kept, jnp.zeros((), x.dtype))


# --- trees --------------------------------------------------------------------


def _layers(tree: Mapping[str, Any]) -> dict[str, Any]:
  """'attention/query/kernel' -> array, of params or of an adapter."""
  layers = tree[_LAYERS[0]][_LAYERS[1]]
  return flax.traverse_util.flatten_dict(layers, sep="/")


def _sizes(name: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
  """(layers, in, out) of a kernel [L, ...]."""
  # The one kernel that takes heads in: [L, H, K, D].
  num_in = 2 if name == "attention/out" else 1
  size_in = math.prod(shape[1 : 1 + num_in])
  return shape[0], size_in, math.prod(shape[1 + num_in :])
