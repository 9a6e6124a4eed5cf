"""Weights of layers in int8, for a model that samples and is not trained.

A kernel W of a projection becomes integers, one scale an output channel:

    s = max |W| / 127,  Q = round(W / s)       over what a channel sums

and the projection computes (x Q) s. Integers up to 127 are exact in every dtype
of a matmul, so the only error is that of Q: at most s / 2 a weight. A layer's
integers become floats where a matmul reads them, and its outputs are multiplied
by the scales in float32. Whether those floats are ever in memory is the
compiler's matter; on CPU they are.

Embeddings, heads, norms, biases, routers and adapters stay as they are.

Reference: Dettmers et al., LLM.int8() (arXiv 2208.07339), section 2.1, absmax
quantisation. Differs: of weights alone, by channel; activations stay floats.
"""

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

# The collection beside a model's "params" that has the scales.
SCALES = "int8_scales"
_LARGEST = 127


def quantize(
    kernel: Float[Array, "..."], axes: tuple[int, ...]
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
  """(integers of the kernel's shape, float32 scales without these axes).

  Args:
    axes: those that an output channel sums over.

  Example:
    quantize([[0.5], [-2.54]], axes=(0,)) == [[25], [-127]], [0.02]
  """
  kernel = kernel.astype(jnp.float32)
  scale = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True) / _LARGEST
  # NaN is kept: the model that has it must not look like a sound one.
  integers = jnp.round(kernel / jnp.where(scale == 0, 1.0, scale))
  return integers.astype(jnp.int8), jnp.squeeze(scale, axes)


def quantized(variables: Mapping[str, Any]) -> dict[str, Any]:
  """A model's variables with the kernels of its layers in int8."""
  params = variables["params"]
  layers = flax.traverse_util.flatten_dict(params["trunk"]["layers"], sep="/")
  scales = {}
  for name, kernel in layers.items():
    if name.endswith("/kernel") and "router" not in name:
      layers[name], scale = quantize(kernel, _summed_axes(name))
      scales[name.removesuffix("kernel") + "scale"] = scale
  unflatten = lambda x: flax.traverse_util.unflatten_dict(x, sep="/")
  trunk = {**params["trunk"], "layers": unflatten(layers)}
  return {
      **variables,
      "params": {**params, "trunk": trunk},
      SCALES: {"trunk": {"layers": unflatten(scales)}},
  }


def product(
    x: Float[Array, "*N I"],
    kernel: Float[Array, "I O"],
    scale: Float[Array, "..."],
) -> Float[Array, "*N O"]:
  """(x Q) s in x's dtype, rounded once.

  Args:
    kernel: the integers in x's dtype.
  """
  out = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
  lead = (None,) * (out.ndim - 1)
  return (out * scale.reshape(-1)[lead]).astype(x.dtype)


def _summed_axes(name: str) -> tuple[int, ...]:
  """Of all layers' kernel: [L, D, H, K], [L, H, K, D] or [L, (E,) I, O]."""
  if name == "attention/out/kernel":
    return (1, 2)
  return (2,) if "/experts/" in name else (1,)
