"""Matmuls of a model, counted from its config.

XLA counts what is in a loop once, and layers, microbatches, epochs and decode
steps are loops. So the multiplications are counted here, one by one, as the
model writes them: every score of attention, also those that a mask rules out
and a kernel may pass over. What is not a matmul is not counted; it is a few
percent of the work and none of it runs on the matrix units.

    forward    2 m k n for [m, k] x [k, n]
    backward   twice that, once for either operand; once where the operand is
               a weight that is not trained
    remat      another forward of the layers
"""

from collections.abc import Iterable
import dataclasses

from rlhf_jax.models.transformer_config import TransformerConfig

_GATED = ("swiglu", "geglu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matmul:
  """Some multiplications of one kind.

  flops: of all of them.
  weights: elements of weights that they read; 0 between activations.
  activations: elements that they read and write beside.
  recomputed: again under remat: in a layer, and the backward pass asks for it.
  chunked: again in any case: `losses/chunking.py` runs it twice.
  name: as in the parameters.
  shape: (m, k, n) of each of them; None between activations.
  """

  name: str
  flops: float
  weights: float
  activations: float
  recomputed: bool
  chunked: bool = False
  shape: tuple[int, int, int] | None = None

  def times(self, factor: float) -> "Matmul":
    """So often."""
    return dataclasses.replace(
        self,
        flops=self.flops * factor,
        weights=self.weights * factor,
        activations=self.activations * factor,
    )


@dataclasses.dataclass(frozen=True)
class Work:
  """What matmuls cost together, over all chips; see `Matmul`."""

  flops: float = 0.0
  weights: float = 0.0
  activations: float = 0.0

  def __add__(self, other: "Work") -> "Work":
    return Work(
        self.flops + other.flops,
        self.weights + other.weights,
        self.activations + other.activations,
    )

  def times(self, factor: float) -> "Work":
    """So often."""
    return Work(
        self.flops * factor, self.weights * factor, self.activations * factor
    )


def total(matmuls: Iterable[Matmul]) -> Work:
  """Their sum."""
  work = Work()
  for x in matmuls:
    work += Work(x.flops, x.weights, x.activations)
  return work


def trunk(
    cfg: TransformerConfig,
    rows: int,
    num_queries: int,
    num_keys: int,
    lora_rank: int = 0,
) -> list[Matmul]:
  """Of all layers, for `rows` rows of `num_queries` tokens.

  Args:
    num_keys: that each token is compared with: as many as there are queries,
      and in a decode step the cache's too.
    lora_rank: of adapters beside every linear layer, 0 for none.
  """
  heads = cfg.num_heads * cfg.head_dim
  kv_heads = cfg.num_kv_heads * cfg.head_dim
  linear = {
      "attention/query": (cfg.width, heads, 1),
      "attention/key": (cfg.width, kv_heads, 1),
      "attention/value": (cfg.width, kv_heads, 1),
      "attention/out": (heads, cfg.width, 1),
  }
  experts = cfg.num_experts or 1
  if cfg.num_experts:
    linear["feed_forward/router"] = (cfg.width, cfg.num_experts, 1)
  for name in ("gate", "up") if cfg.activation in _GATED else ("up",):
    linear[f"feed_forward/{name}"] = (cfg.width, cfg.ff_dim, experts)
  linear["feed_forward/down"] = (cfg.ff_dim, cfg.width, experts)
  tokens = rows * num_queries
  found = []
  for name, (k, n, copies) in linear.items():
    found.append(_linear(name, tokens, k, n).times(copies))
    if lora_rank and not name.endswith("router"):
      found += [
          _linear(f"{name}/lora_a", tokens, k, lora_rank).times(copies),
          _linear(f"{name}/lora_b", tokens, lora_rank, n).times(copies),
      ]
  # Queries in, keys in, scores out; scores in, values in, mixtures out. A key
  # head is read once for all query heads that share it.
  scores = rows * cfg.num_heads * num_queries * num_keys
  flops = 2.0 * scores * cfg.head_dim
  activations = tokens * heads + rows * num_keys * kv_heads
  for name in ("attention/scores", "attention/mix"):
    found.append(
        Matmul(
            name=name, flops=flops, weights=0.0, activations=activations,
            recomputed=True,
        )
    )
  last = _only_added(cfg)
  return [
      dataclasses.replace(x, recomputed=x.name not in last).times(
          cfg.num_layers
      )
      for x in found
  ]


def _only_added(cfg: TransformerConfig) -> tuple[str, ...]:
  """Whose result is only added to the stream, which no gradient asks for."""
  names = ()
  if cfg.norm_placement == "pre":
    names += ("feed_forward/down",) if not cfg.num_experts else ()
    names += ("attention/out",) if cfg.parallel_residual else ()
  return names


def head(cfg: TransformerConfig, rows: int, num_positions: int = 1) -> Matmul:
  """Hidden states to logits, of so many positions of each row."""
  matmul = _linear("head", rows * num_positions, cfg.width, cfg.vocab_size)
  return dataclasses.replace(
      matmul, recomputed=False, chunked=num_positions > cfg.head_chunk_size
  )


def scalar_head(cfg: TransformerConfig, positions: int) -> Matmul:
  """Hidden states to one number each."""
  matmul = _linear("scalar_head", positions, cfg.width, 1)
  return dataclasses.replace(matmul, recomputed=False)


def _linear(name: str, m: int, k: int, n: int) -> Matmul:
  return Matmul(
      name=name,
      flops=2.0 * m * k * n,
      weights=float(k * n),
      activations=float(m * (k + n)),
      recomputed=True,
      shape=(m, k, n),
  )


def training(
    matmuls: list[Matmul], cfg: TransformerConfig, *, frozen_base: bool = False
) -> Work:
  """Forward and backward of them, with what is computed again.

  Args:
    frozen_base: no gradient of any weight but adapters' and heads'. The
      vocabulary's head is of the base, the scalar head is not.
  """
  work = Work()
  for x in matmuls:
    trained = not frozen_base or x.name.endswith(
        ("lora_a", "lora_b", "scalar_head")
    )
    num_grads = 2 if trained or not x.weights else 1
    again = x.chunked or (cfg.remat and x.recomputed)
    num_forwards = 2 if again else 1
    work += total([x.times(num_forwards + num_grads)])
  return work


# ---- Stages of generation ----------------------------------------------------


def prefill(cfg: TransformerConfig, rows: int, prompt_length: int) -> Work:
  """Prompts into a cache, and the first token's logits."""
  return total(
      [*trunk(cfg, rows, prompt_length, prompt_length), head(cfg, rows)]
  )


def decode_steps(
    cfg: TransformerConfig, rows: int, prompt_length: int, num_tokens: int
) -> Work:
  """The steps after the first token, if no row ends before `num_tokens`.

  A step compares one token with all slots of the cache, filled or not.
  """
  num_steps = max(num_tokens - 1, 0)
  slots = prompt_length + max(num_steps, 1)
  step = total([*trunk(cfg, rows, 1, slots + 1), head(cfg, rows)])
  return step.times(num_steps)
