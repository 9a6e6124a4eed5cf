"""Many prompts through few slots: who has ended makes room for who waits.

A batch of `decode.py` runs until its longest row has ended; with rows of very
different lengths most of it is idle most of the time. Here `num_slots` rows are
decoded at a time, inside one compiled program:

1. Once enough slots are free, the next prompts run together (a refill), draw
   their first token, and their keys and values take the free slots' rows of the
   cache.
2. All slots are decoded, a token a step, until the next refill is due.
3. What a slot has drawn is written out when another prompt takes it.

A slot is a row of the cache here, and a column what `Cache` calls a slot. The
cache is a ring with one column for all rows that is written next, so that a
step writes a slice and scatters nothing. A prompt's P columns are put right
before that column, wherever it is, and a row's own positions say what is in its
columns: it needs at most as many more as the ring has left, so nothing of it is
overwritten while it lives.

Randomness and results are those of `decode.py`: row r draws token t with
fold_in(fold_in(rng, rows[r]), t), whichever slot it has, and when. Its keys lie
in other columns, so sums over them may differ by rounding.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from rlhf_jax.generation import bound_model, decode
from rlhf_jax.generation.bound_model import BoundModel
from rlhf_jax.generation.decode import SamplingConfig
from rlhf_jax.models import partitioning
from rlhf_jax.models.heads import LanguageModel
from rlhf_jax.models.transformer import Cache
from rlhf_jax.types import Rollout


class _Slots(NamedTuple):
  """What is being completed; B slots.

  owner: the number of a slot's row, N if it has had none yet.
  count: how many tokens it has drawn, of which `token` is the last.
  ended: an end or stop id came.
  completions, logprobs: nothing is meant by what is behind `count`.
  """

  owner: Int[Array, "B"]
  count: Int[Array, "B"]
  token: Int[Array, "B"]
  ended: Bool[Array, "B"]
  completions: Int[Array, "B C"]
  logprobs: Float[Array, "B C"]
  cache: Cache


class _Results(NamedTuple):
  """What has been written out; N rows."""

  count: Int[Array, "N"]
  ended: Bool[Array, "N"]
  completions: Int[Array, "N C"]
  logprobs: Float[Array, "N C"]


class _Everyone(NamedTuple):
  """All prompts, and the random streams of their rows: one or more a prompt."""

  prompts: Int[Array, "prompts P"]
  prompt_mask: Int[Array, "prompts P"]
  rngs: Key[Array, "N"] | UInt32[Array, "N 2"]

  @property
  def num_rows(self) -> int:
    return self.rngs.shape[0]

  @property
  def num_completions(self) -> int:
    """Rows of a prompt, one after the other."""
    return self.num_rows // self.prompts.shape[0]

  def rngs_of(self, rows: Int[Array, "_"]):
    """Of these rows, and of any where there is none of that number."""
    return self.rngs[jnp.minimum(rows, self.num_rows - 1)]


def make_generate_many(
    model: LanguageModel,
    num_slots: int,
    refill_size: int | None = None,
    is_unrolled: bool | None = None,
    num_completions: int = 1,
) -> Callable[..., Rollout]:
  """generate(params, prompts, prompt_mask, rng, cfg, rows=None) -> Rollout.

  Arguments and results are those of `decode.make_generate`, in the prompts'
  order; with no more prompts than slots it is that function. Rows are to be on
  one device: a refill of rows that are split over several would gather them.

  Args:
    num_slots: rows that are decoded at a time, and that the cache has.
    refill_size: prompts that run together once there are slots for them; the
      last ones do not wait to be as many. None: a quarter of the slots. Of a
      k-th of them, 1 / 2k idle while they wait; and every c / k steps, with
      completions of mean length c, the weights are read once more, as a step
      reads them. Both together are least at k = sqrt(c / 2), which is 4 at 32
      tokens and 11 at 256, and little more around it.
    is_unrolled, num_completions: see `decode.make_generate`. All completions of
      a prompt start together.
  """
  if num_slots < 1:
    raise ValueError(f"num_slots must be >= 1: {num_slots}")
  at_once = decode.make_generate(model, is_unrolled, num_completions)
  if refill_size is None:
    refill_size = max(1, num_slots // (4 * num_completions))
  if not 1 <= refill_size <= num_slots // num_completions:
    raise ValueError(
        f"refill_size={refill_size} prompts of {num_completions} completions "
        f"each must be at least 1 and fit into num_slots={num_slots}"
    )

  def generate(
      params,
      prompts: Int[Array, "prompts P"],
      prompt_mask: Int[Array, "prompts P"],
      rng: Key[Array, ""] | UInt32[Array, "2"],
      cfg: SamplingConfig,
      rows: Int[Array, "N"] | None = None,
  ) -> Rollout:
    num_prompts = prompts.shape[0]
    n = num_prompts * num_completions
    if n <= num_slots:
      return at_once(params, prompts, prompt_mask, rng, cfg, rows)
    rngs = decode.row_streams(rng, rows, n)
    everyone = _Everyone(prompts, prompt_mask, rngs)
    bound = bound_model.bind(model, params, prompts, is_unrolled)
    length = bound_model.cache_length(prompts.shape[1], cfg.max_new_tokens)
    cache = bound.make_cache(num_slots, length)
    refill = functools.partial(_refill, bound, everyone, refill_size, cfg)
    advance = functools.partial(_advance, bound.make_step(), everyone, cfg)

    def fill_and_decode(state):
      start, slots, results = state
      slots, results = refill(slots, results, start)
      waiting = jnp.maximum(num_prompts - start - refill_size, 0)
      wanted = jnp.minimum(waiting, refill_size) * num_completions

      def goes_on(slots: _Slots):
        live = _is_live(slots, n, cfg)
        is_due = (wanted > 0) & (num_slots - jnp.sum(live) >= wanted)
        return jnp.any(live) & ~is_due

      slots = jax.lax.while_loop(goes_on, advance, slots)
      return num_prompts - waiting, slots, results

    _, slots, results = jax.lax.while_loop(
        lambda state: state[0] < num_prompts,
        fill_and_decode,
        (jnp.int32(0), _free_slots(cache, n, cfg), _no_results(n, cfg)),
    )
    results = _write_out(results, slots, jnp.arange(num_slots))
    return _rollout(results, everyone, cfg)

  return generate


def _free_slots(cache: Cache, n: int, cfg: SamplingConfig) -> _Slots:
  b = cache.positions.shape[0]
  return _Slots(
      owner=jnp.full((b,), n, jnp.int32),
      count=jnp.zeros((b,), jnp.int32),
      token=jnp.zeros((b,), jnp.int32),
      ended=jnp.zeros((b,), jnp.bool_),
      completions=jnp.zeros((b, cfg.max_new_tokens), jnp.int32),
      logprobs=jnp.zeros((b, cfg.max_new_tokens), jnp.float32),
      cache=cache,
  )


def _no_results(n: int, cfg: SamplingConfig) -> _Results:
  return _Results(
      count=jnp.zeros((n,), jnp.int32),
      ended=jnp.zeros((n,), jnp.bool_),
      completions=jnp.zeros((n, cfg.max_new_tokens), jnp.int32),
      logprobs=jnp.zeros((n, cfg.max_new_tokens), jnp.float32),
  )


def _is_live(slots: _Slots, n: int, cfg: SamplingConfig) -> Bool[Array, "B"]:
  """Which slots have a token to draw."""
  is_short = slots.count < cfg.max_new_tokens
  return (slots.owner < n) & is_short & ~slots.ended


def _refill(
    bound: BoundModel,
    everyone: _Everyone,
    refill_size: int,
    cfg: SamplingConfig,
    slots: _Slots,
    results: _Results,
    start: Int[Array, ""],
) -> tuple[_Slots, _Results]:
  """Prompts start, start + 1, ... take free slots and draw their first token.

  There are enough of both, or fewer prompts: then the rest goes nowhere.
  """
  num_prompts, p = everyone.prompts.shape
  n, k = everyone.num_rows, everyone.num_completions
  b = slots.owner.shape[0]
  rows = start * k + jnp.arange(refill_size * k, dtype=jnp.int32)
  free = ~_is_live(slots, n, cfg)
  (places,) = jnp.nonzero(free, size=refill_size * k, fill_value=b)
  places = jnp.where(rows < n, places, b)
  results = _write_out(results, slots, places)

  ids = start + jnp.arange(refill_size, dtype=jnp.int32)
  ids = jnp.minimum(ids, num_prompts - 1)
  logits, cache = bound.prefill(
      everyone.prompts[ids], everyone.prompt_mask[ids], p, k
  )
  first = jnp.zeros_like(rows)
  drawn = decode.draw(logits[:, 0], everyone.rngs_of(rows), first, cfg)
  put = lambda whole, x: whole.at[places].set(x, mode="drop")
  slots = slots._replace(
      owner=put(slots.owner, rows),
      count=put(slots.count, first + 1),
      token=put(slots.token, drawn.token),
      ended=put(slots.ended, drawn.ends),
      completions=slots.completions.at[places, 0].set(drawn.token, mode="drop"),
      logprobs=slots.logprobs.at[places, 0].set(drawn.logprob, mode="drop"),
      cache=_put_rows(slots.cache, cache, places),
  )
  return slots, results


def _put_rows(
    ring: Cache, filled: Cache, places: Int[Array, "refill"]
) -> Cache:
  """The ring with rows of prompts right before the column written next."""
  size, p = ring.positions.shape[1], filled.positions.shape[1]

  def put(old, new, row_axis, column_axis, nothing):
    # Whole rows, so that nothing is left of who was here before.
    widths = [(0, 0)] * new.ndim
    widths[column_axis] = (0, size - p)
    new = jnp.pad(new, widths, constant_values=nothing)
    new = jnp.roll(new, ring.index - p, axis=column_axis)
    where = (*[slice(None)] * row_axis, places)
    return old.at[where].set(new, mode="drop")

  def put_layer(old, new):
    # [..., B, J, S, K]
    place = "layer_cache" if ring.is_unrolled else "cache"
    whole = put(old, new, old.ndim - 4, old.ndim - 2, 0)
    return partitioning.constrain(whole, place)

  return dataclasses.replace(
      ring,
      layers=jax.tree.map(put_layer, ring.layers, filled.layers),
      positions=put(ring.positions, filled.positions, 0, 1, -1),
  )


def _advance(
    apply: Callable[..., Any],
    everyone: _Everyone,
    cfg: SamplingConfig,
    slots: _Slots,
) -> _Slots:
  """One more token in every slot that has one to draw."""
  live = _is_live(slots, everyone.num_rows, cfg)
  real = live.astype(jnp.int32)
  logits, cache = apply(slots.token[:, None], real[:, None], slots.cache)
  size = cache.positions.shape[1]
  rngs = everyone.rngs_of(slots.owner)
  drawn = decode.draw(logits[:, 0], rngs, slots.count, cfg)
  # Columns differ between rows: a choice costs less than a scatter.
  column = jnp.arange(cfg.max_new_tokens, dtype=jnp.int32)
  is_here = live[:, None] & (column[None] == slots.count[:, None])
  put = lambda whole, x: jnp.where(is_here, x[:, None], whole)
  return slots._replace(
      count=slots.count + real,
      token=jnp.where(live, drawn.token, slots.token),
      ended=slots.ended | (live & drawn.ends),
      completions=put(slots.completions, drawn.token),
      logprobs=put(slots.logprobs, drawn.logprob),
      cache=dataclasses.replace(cache, index=cache.index % size),
  )


def _write_out(
    results: _Results, slots: _Slots, places: Int[Array, "_"]
) -> _Results:
  """Results with what the slots `places` hold, if they hold anything."""
  mine = [getattr(slots, name)[places] for name in _Results._fields]
  n, b = results.count.shape[0], slots.owner.shape[0]
  owner = jnp.where(places < b, slots.owner[places], n)
  return _Results(*(
      whole.at[owner].set(x, mode="drop") for whole, x in zip(results, mine)
  ))


def _rollout(
    results: _Results, everyone: _Everyone, cfg: SamplingConfig
) -> Rollout:
  column = jnp.arange(cfg.max_new_tokens, dtype=jnp.int32)
  mask = column[None] < results.count[:, None]
  again = lambda x: jnp.repeat(x, everyone.num_completions, axis=0)
  return Rollout(
      prompts=again(everyone.prompts),
      prompt_mask=again(everyone.prompt_mask),
      completions=jnp.where(mask, results.completions, cfg.pad_id),
      completion_mask=mask.astype(jnp.int32),
      logprobs=jnp.where(mask, results.logprobs, 0.0),
      ended=results.ended,
  )
