"""How a decoder lies on a mesh: parameters by rule, activations by name.

Params are split twice: over `tensor` where heads, feed-forward or vocabulary
are, and over `fsdp` along the other large dimension. A layer's weights are
gathered over `fsdp` when the scan over layers comes to it, and dropped again.

The embedding and the head are not: their weights are as large as many layers
together. A table is split along its width, looks up every row's tokens, and the
rows then change places with the width. The head is split along its vocabulary
over `fsdp` too, and reads a chunk of positions of all rows.

With one device all of this is nothing.
"""

import jax

from rlhf_jax import sharding
from rlhf_jax.device_mesh import ROWS
from rlhf_jax.sharding import Rules

# As arguments of `sharding.constrain`.
_COPIES = ("replica", "data")
_PLACES = {
    # Tokens [B, N] that are looked up, what is found for them [B, N, D], and
    # the same with width and rows exchanged.
    "looked_up": (_COPIES, None),
    "embedded": (_COPIES, None, "fsdp"),
    "exchanged": (ROWS, None, None),
    # The residual stream [B, N, D], and one whole width for the head.
    "hidden": (ROWS, "sequence", None),
    "before_head": (_COPIES, None, None),
    "tied_head": (("tensor", "fsdp"), None),
    "logits": (_COPIES, None, ("tensor", "fsdp")),
    # [B, N, H, K]: a query sees the keys of the whole row.
    "queries": (ROWS, "sequence", "tensor", None),
    "keys": (ROWS, None, "tensor", None),
    "wide": (ROWS, "sequence", "tensor"),
    "cache": (None, ROWS, "tensor", None, None),
    "layer_cache": (ROWS, "tensor", None, None),
}

_TRUNK: Rules = (
    (r"token_embedding$", ("tensor", "fsdp")),
    (r"position_embedding$", (None, "fsdp")),
    (r"attention/(query|key|value)/kernel$", (None, "fsdp", "tensor", None)),
    (r"attention/(query|key|value)/bias$", (None, "tensor", None)),
    (r"attention/out/kernel$", (None, "tensor", None, "fsdp")),
    (r"experts/(up|gate)/kernel$", (None, None, "fsdp", "tensor")),
    (r"experts/down/kernel$", (None, None, "tensor", "fsdp")),
    (r"feed_forward/(up|gate)/kernel$", (None, "fsdp", "tensor")),
    (r"feed_forward/(up|gate)/bias$", (None, "tensor")),
    (r"feed_forward/down/kernel$", (None, "tensor", "fsdp")),
    # An adapter's factors are as thin as its rank.
    (r"(attention/out|down)/lora_a$", (None, "tensor", None)),
    (r"(attention/out|down)/lora_b$", (None, None, "fsdp")),
    (r"lora_a$", (None, "fsdp", None)),
    (r"lora_b$", (None, None, "tensor")),
    # Norms, their biases, routers: small.
    (r"(norm/(scale|bias)|bias|router/kernel)$", ()),
)

POLICY_RULES: Rules = ((r"head/kernel$", (None, ("tensor", "fsdp"))), *_TRUNK)
# One number a position: their heads are a vector. A head that shares the
# policy's trunk is at the top of its own params.
SCALAR_RULES: Rules = ((r"(^|head/)(kernel|bias)$", ()), *_TRUNK)


def constrain(x: jax.Array, place: str) -> jax.Array:
  """Puts an activation where those of its name lie."""
  return sharding.constrain(x, _PLACES[place])


def splits_sequence(x: jax.Array) -> bool:
  """Whether the positions of a row [B, N, ...] are on several devices."""
  mesh = sharding.mesh_of(x)
  if mesh is None:
    return False
  return mesh.shape.get("sequence", 1) > 1
