"""Prompts to completions: one prefill, then a loop that ends early.

1. The left-padded prompts run once and fill the cache.
2. Each step draws one token a row. A row ends at an end id, or at a stop id
   from completion token `stop_after` on; the token that ended it belongs to the
   completion. Ended rows hold `pad_id` and mask 0 from there on.
3. The loop ends when every row has ended, at the latest after max_new_tokens.

A step attends over all columns of the cache, filled or not. With several cache
buckets the loop is several, one after the other, and the cache grows between
them.

Randomness: row r draws token t with fold_in(fold_in(rng, rows[r]), t). What a
row becomes depends on its own prompt and row number alone: not on the rows
beside it, on its place in the batch, on the batch's size or on sharding.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from rlhf_jax import collectives
from rlhf_jax.generation import bound_model, sampling
from rlhf_jax.losses import language_modeling
from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.models.transformer import Cache
from rlhf_jax.types import Rollout, pytree_dataclass, static


@pytree_dataclass
class SamplingConfig:
  """How completions are drawn. Temperature and top_p are data, the rest static.

  temperature: of the sampling distribution and of the reported logprobs.
  top_k: 0 is off. top_p counts only with use_top_p (it costs a sort a step).
    Both bound what is drawn; the logprobs stay those of the full distribution.
  greedy: argmax instead of a draw.
  eos_id: ends a completion anywhere; -1 if nothing does.
  other_eos_ids: so do these; models for chats have several.
  stop_ids: end it from completion token `stop_after` (counted from 0) on, e.g.
    the id of "." with stop_after=16 (Ziegler et al., arXiv 1909.08593).
  pad_id: stands after the end; it may equal any other id, as masks are arrays.
  """

  temperature: Float[Array, ""] | float = 1.0
  top_p: Float[Array, ""] | float = 1.0
  max_new_tokens: int = static()
  eos_id: int = static()
  top_k: int = static(0)
  use_top_p: bool = static(False)
  greedy: bool = static(False)
  other_eos_ids: tuple[int, ...] = static(())
  stop_ids: tuple[int, ...] = static(())
  stop_after: int = static(0)
  pad_id: int = static(0)

  def __post_init__(self):
    # Leaves may be tracers (or placeholders of tree_map): only numbers count.
    if self.max_new_tokens < 1:
      raise ValueError(f"max_new_tokens must be >= 1: {self.max_new_tokens}")
    for name in ("top_k", "stop_after"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name} must be >= 0: {getattr(self, name)}")
    if isinstance(self.temperature, (int, float)) and not self.temperature > 0:
      raise ValueError(
          f"temperature must be > 0: {self.temperature}; use greedy=True for "
          "the likeliest token"
      )
    if isinstance(self.top_p, (int, float)) and not 0 < self.top_p <= 1:
      raise ValueError(f"top_p must be in (0, 1]: {self.top_p}")


class Drawn(NamedTuple):
  """One token a row, its log-probability, and whether it ends the row."""

  token: Int[Array, "B"]
  logprob: Float[Array, "B"]
  ends: Bool[Array, "B"]


class _State(NamedTuple):
  step: Int[Array, ""]
  token: Int[Array, "B"]
  done: Bool[Array, "B"]
  cache: Cache
  completions: Int[Array, "B C"]
  mask: Int[Array, "B C"]
  logprobs: Float[Array, "B C"]


def make_generate(
    model: LanguageModel,
    is_unrolled: bool | None = None,
    num_completions: int = 1,
    num_cache_buckets: int = 1,
    weights: bound_model.Weights = "compute",
) -> Callable[..., Rollout]:
  """generate(params, prompts, prompt_mask, rng, cfg, rows=None) -> Rollout.

  The returned function is pure; jit it. Its arguments:
    params: of the LanguageModel; also a base with an adapter.
    prompts, prompt_mask: [B, P], left-padded.
    rng: one key.
    cfg: SamplingConfig; its static fields fix the program.
    rows: [B] row numbers for the random streams, 0..B-1 if None. Give a
      prompt's number in the whole set when the set is sampled in parts.
      [B * num_completions] if there are several.

  Args:
    is_unrolled: layers one after another instead of one scan; see
      `transformer.unrolled` for what that spares a step and copies once. None:
      on a CPU. Elsewhere a scan reads slices where they are, and there is no
      room for a copy but in bfloat16, of float32 params that it would convert.
    num_completions: of each prompt, which runs once for all of them. They are
      rows of their own, one after the other, B * num_completions in all.
    num_cache_buckets: loops that the steps are divided into. Each has a cache
      with columns for its own steps and those before, so that of n loops over
      long completions of short prompts a step reads (n + 1) / 2n of the columns
      that one loop would. It costs n loops to compile, and n - 1 copies of the
      cache, for which the old and the new one exist together. With fewer steps
      than buckets each step is a bucket.
    weights: 'int8' samples from a model whose layers are rounded, see
      `models/quantization.py`, and reports its log-probs. They are rounded once
      a call. Of the params' model it is another distribution.
  """
  if num_completions < 1:
    raise ValueError(f"num_completions must be >= 1: {num_completions}")
  if num_cache_buckets < 1:
    raise ValueError(f"num_cache_buckets must be >= 1: {num_cache_buckets}")

  def generate(
      params,
      prompts: Int[Array, "B P"],
      prompt_mask: Int[Array, "B P"],
      rng: Key[Array, ""] | UInt32[Array, "2"],
      cfg: SamplingConfig,
      rows: Int[Array, "_"] | None = None,
  ) -> Rollout:
    b = prompts.shape[0] * num_completions
    row_rngs = row_streams(rng, rows, b)
    bound = bound_model.bind(model, params, prompts, is_unrolled, weights)
    ends = _bucket_ends(cfg.max_new_tokens, num_cache_buckets)
    lengths = [bound_model.cache_length(prompts.shape[1], x) for x in ends]
    logits, cache = bound.prefill(
        prompts, prompt_mask, lengths[0], num_completions
    )
    apply = bound.make_step()
    state = _record(_empty(b, cache, cfg), logits[:, 0], row_rngs, cfg)

    def unfinished(end: int, state: _State):
      is_any_left = collectives.any_member(~jnp.all(state.done))
      return (state.step < end) & is_any_left

    def advance(state: _State) -> _State:
      real = (~state.done).astype(jnp.int32)[:, None]
      logits, cache = apply(state.token[:, None], real, state.cache)
      state = state._replace(cache=cache)
      return _record(state, logits[:, 0], row_rngs, cfg)

    for end, length in zip(ends, lengths):
      state = state._replace(cache=bound.longer(state.cache, length))
      state = jax.lax.while_loop(
          functools.partial(unfinished, end), advance, state
      )
    again = lambda x: jnp.repeat(x, num_completions, axis=0)
    return Rollout(
        prompts=again(prompts),
        prompt_mask=again(prompt_mask),
        completions=state.completions,
        completion_mask=state.mask,
        logprobs=state.logprobs,
        ended=state.done,
    )

  return generate


def row_streams(
    rng: Key[Array, ""] | UInt32[Array, "2"],
    rows: Int[Array, "_"] | None,
    num_rows: int,
) -> Key[Array, "B"] | UInt32[Array, "B 2"]:
  """The random stream of each row, by its number.

  Args:
    rows: the numbers; None counts from 0.

  Raises:
    ValueError: they are not one a row.
  """
  if rows is None:
    rows = jnp.arange(num_rows, dtype=jnp.int32)
  if rows.shape != (num_rows,):
    raise ValueError(
        f"rows has shape {rows.shape}, and there are {num_rows} rows: give a "
        "number for every completion of every prompt"
    )
  return jax.vmap(jax.random.fold_in, (None, 0))(rng, rows)


def _bucket_ends(max_new_tokens: int, num_buckets: int) -> list[int]:
  """How many tokens a row has, at the most, when each bucket's loop ends.

  The first token is the prefill's. Example: of (8, 3) [4, 6, 8].
  """
  num_steps = max_new_tokens - 1
  num = min(num_buckets, max(num_steps, 1))
  return [1 + math.ceil(num_steps * i / num) for i in range(1, num + 1)]


def _empty(batch_size: int, cache: Cache, cfg: SamplingConfig) -> _State:
  shape = (batch_size, cfg.max_new_tokens)
  return _State(
      step=jnp.zeros((), jnp.int32),
      token=jnp.zeros((batch_size,), jnp.int32),
      done=jnp.zeros((batch_size,), jnp.bool_),
      cache=cache,
      completions=jnp.full(shape, cfg.pad_id, jnp.int32),
      mask=jnp.zeros(shape, jnp.int32),
      logprobs=jnp.zeros(shape, jnp.float32),
  )


def _record(
    state: _State,
    logits: Float[Array, "B V"],
    row_rngs: Key[Array, "B"] | UInt32[Array, "B 2"],
    cfg: SamplingConfig,
) -> _State:
  """Draws token number state.step of every row and writes it down."""
  steps = jnp.broadcast_to(state.step, state.token.shape)
  drawn = draw(logits, row_rngs, steps, cfg)
  real = ~state.done
  token = jnp.where(real, drawn.token, cfg.pad_id)

  def put(buffer, column):
    column = column.astype(buffer.dtype)[:, None]
    return jax.lax.dynamic_update_slice_in_dim(
        buffer, column, state.step, axis=1
    )

  return state._replace(
      step=state.step + 1,
      token=token,
      done=state.done | drawn.ends,
      completions=put(state.completions, token),
      mask=put(state.mask, real),
      logprobs=put(state.logprobs, jnp.where(real, drawn.logprob, 0.0)),
  )


def draw(
    logits: Float[Array, "B V"],
    row_rngs: Key[Array, "B"] | UInt32[Array, "B 2"],
    steps: Int[Array, "B"],
    cfg: SamplingConfig,
) -> Drawn:
  """Draws token number steps[r] of every row r."""
  token = _choose(logits, row_rngs, steps, cfg)
  return Drawn(
      token=token,
      logprob=language_modeling.selected_logprobs(
          logits, token, temperature=cfg.temperature
      ),
      ends=_ends(token, steps, cfg),
  )


def _choose(logits, row_rngs, steps, cfg: SamplingConfig) -> Int[Array, "B"]:
  if cfg.greedy:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = sampling.apply_temperature(logits, cfg.temperature)
  logits = sampling.apply_top_k(logits, cfg.top_k)
  if cfg.use_top_p:
    logits = sampling.apply_top_p(logits, cfg.top_p)
  rngs = jax.vmap(jax.random.fold_in)(row_rngs, steps)
  return jax.vmap(sampling.sample)(rngs, logits)


def _ends(token, steps, cfg: SamplingConfig) -> Bool[Array, "B"]:
  ends = _is_any(token, (cfg.eos_id, *cfg.other_eos_ids))
  if cfg.stop_ids:
    stops = _is_any(token, cfg.stop_ids)
    ends = ends | (stops & (steps >= cfg.stop_after))
  return ends


def _is_any(token, ids: tuple[int, ...]) -> Bool[Array, "B"]:
  ids = jnp.asarray(ids, jnp.int32)
  return jnp.any(token[:, None] == ids[None], axis=-1)
