"""Memory of a large vocabulary's loss, by size of the chunks.

    python -m tests.losses.chunking_memory

Compiles, and runs nothing: what XLA would allocate beside inputs and outputs
for the gradient of cross-entropy and entropy. The head's own gradient, 256 MiB,
is an output.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.losses import chunking
from rlhf_jax.losses import language_modeling as lm

ROWS, POSITIONS, WIDTH, VOCABULARY = 4, 1024, 512, 128 * 1024


def temporary_bytes(chunk_size: int, rows=ROWS, positions=POSITIONS) -> int:
  """Of the compiled gradient."""

  def loss(kernel, hidden, ids):
    def measure(hidden, ids):
      logits = hidden @ kernel
      return lm.cross_entropy_loss(logits, ids), lm.entropy(logits)

    out = chunking.map_positions(
        measure, (hidden, ids), jnp.ones_like(ids), chunk_size=chunk_size
    )
    return sum(x.sum() for x in out)

  shape = jax.ShapeDtypeStruct
  compiled = (
      jax.jit(jax.grad(loss, (0, 1)))
      .lower(
          shape((WIDTH, VOCABULARY), jnp.float32),
          shape((rows, positions, WIDTH), jnp.float32),
          shape((rows, positions), jnp.int32),
      )
      .compile()
  )
  return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
  print("| head_chunk_size | temporary MiB |\n|---|---|")
  for chunk_size in (POSITIONS, 256, 128, 64, 16):
    mebibytes = temporary_bytes(chunk_size) / 2**20
    print(f"| {chunk_size} | {mebibytes:,.0f} |")
