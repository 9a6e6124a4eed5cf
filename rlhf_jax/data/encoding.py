"""Records to token arrays.

Layout of a sequence: bos (if asked for and known), prompt, completion, eos. The
prompt and the completion are tokenized apart, so that the boundary between them
is a token boundary in training as it is when a model samples.

There is one bos and one end. A text of a chat template that writes special
tokens says itself whether it starts with bos, and one that ends with an end
token gets no other. A prompt from a file that spells the start token at its
beginning has it from here, once.

Nothing is cut in silence. What is too long is handled by a policy of
`lengths.py` and counted in the `LengthReport` that every function returns
beside its result.
"""

from collections.abc import Sequence

import numpy as np

from rlhf_jax.data import own_part, special_tokens
from rlhf_jax.data.lengths import (
    DOCUMENT_POLICIES,
    RECORD_POLICIES,
    LengthError,
    LengthReport,
    Lengths,
)
from rlhf_jax.data.records import Comparison, Demonstration, Ranking
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.types import PreferenceBatch, PromptBatch, RankingBatch

Example = tuple[list[int], list[float]]


def encode_documents(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    policy: str,
    add_bos: bool = True,
) -> tuple[list[Example], LengthReport]:
  """Whole texts to learn from, each ended by eos.

  Args:
    texts: documents.
    tokenizer: for all of them.
    max_length: most tokens an example, bos and eos included.
    policy: one of `DOCUMENT_POLICIES`.
    add_bos: start each document with bos, if the tokenizer has one.

  Returns:
    (tokens, loss_mask) pairs for `packing.pack`, and the report.
  """
  _check_positive("max_length", max_length)
  lengths = Lengths(policy, DOCUMENT_POLICIES)
  bos = _bos(tokenizer, add_bos)
  examples = []
  for ids in own_part.encode_batch(tokenizer, texts):
    ids = [*bos, *ids, tokenizer.eos_id]
    lengths.see(0, len(ids))
    if policy == "split":
      lengths.split += len(ids) > max_length
    elif lengths.keep(0, len(ids), 0, max_length) is None:
      continue
    for start in range(0, len(ids), max_length):
      piece = ids[start:start + max_length]
      examples.append((piece, [1.0] * len(piece)))
  return examples, lengths.report()


def encode_demonstrations(
    records: Sequence[Demonstration],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    policy: str,
    train_on_prompt: bool,
    add_bos: bool = True,
) -> tuple[list[Example], LengthReport]:
  """Demonstrations, with a loss on what the assistant wrote.

  Each span is tokenized by itself. The last one is the completion and gets the
  eos, unless a template ended it; the spans before it are the prompt, where
  earlier answers of the assistant are learned from too.

  Args:
    records: demonstrations.
    tokenizer: for all of them.
    max_length: most tokens an example, bos and eos included.
    policy: one of `RECORD_POLICIES`.
    train_on_prompt: put the loss on everything.
    add_bos: start with bos, if the tokenizer has one.

  Returns:
    (tokens, loss_mask) pairs for `packing.pack`, and the report.
  """
  _check_positive("max_length", max_length)
  lengths = Lengths(policy, RECORD_POLICIES)
  examples = []
  for bos, spans in _encode_spans(records, tokenizer, add_bos):
    room = max_length - len(bos)
    prompt = [(i, mask) for ids, mask in spans[:-1] for i in ids]
    completion = [(i, spans[-1][1]) for i in spans[-1][0]]
    lengths.see(len(prompt) + len(bos), len(completion))
    # A prompt may be shortened to its last token but not lost.
    kept = lengths.keep(
        len(prompt), len(completion), room - len(completion),
        room - bool(prompt),
    )
    if kept is None:
      continue
    pairs = prompt[len(prompt) - kept:] + completion
    tokens = [*bos, *(token for token, _ in pairs)]
    mask = [float(train_on_prompt or trained) for _, trained in pairs]
    examples.append((tokens, [0.0] * len(bos) + mask))
  return examples, lengths.report()


def encode_comparisons(
    records: Sequence[Comparison],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    max_completion_length: int,
    policy: str,
    add_bos: bool = True,
) -> tuple[PreferenceBatch, LengthReport]:
  """Comparisons to arrays of all rows: R = 0 chosen, 1 rejected.

  A row is T = max_prompt_length + max_completion_length wide. Prompts end at
  max_prompt_length (padded on the left), completions start there (padded on the
  right), so the real tokens are contiguous.

  Args:
    records: comparisons.
    tokenizer: for all of them.
    max_prompt_length: P, bos included.
    max_completion_length: C, eos included.
    policy: one of `RECORD_POLICIES`; a pair is kept or dropped as a whole.
    add_bos: start with bos, if the tokenizer has one.

  Returns:
    A PreferenceBatch of numpy arrays, and the report.
  """
  groups = [(r.prompt, (r.chosen, r.rejected)) for r in records]
  tokens, mask, kept, report = _encode_groups(
      groups, tokenizer, 2, (max_prompt_length, max_completion_length), policy,
      add_bos,
  )
  batch = PreferenceBatch(
      tokens=tokens,
      attention_mask=mask,
      weight=np.asarray([records[i].weight for i in kept], np.float32),
      margin=np.asarray([records[i].margin for i in kept], np.float32),
  )
  return batch, report


def encode_rankings(
    records: Sequence[Ranking],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    max_completion_length: int,
    policy: str,
    add_bos: bool = True,
) -> tuple[RankingBatch, LengthReport]:
  """Rankings to arrays of all rows; K is the longest ranking's length.

  Args: as in `encode_comparisons`. A ranking with one completion that is too
    long is dropped as a whole.

  Returns:
    A RankingBatch of numpy arrays, and the report. Rows that fill a shorter
    ranking up to K have completion_valid False, mask 0 and rank 0.
  """
  size = max((len(r.completions) for r in records), default=0)
  groups = [(r.prompt, r.completions) for r in records]
  tokens, mask, kept, report = _encode_groups(
      groups, tokenizer, size, (max_prompt_length, max_completion_length),
      policy, add_bos,
  )
  ranks = np.zeros((len(kept), size), np.int32)
  valid = np.zeros((len(kept), size), bool)
  for row, index in enumerate(kept):
    count = len(records[index].ranks)
    ranks[row, :count] = records[index].ranks
    valid[row, :count] = True
  batch = RankingBatch(
      tokens=tokens,
      attention_mask=mask,
      ranks=ranks,
      completion_valid=valid,
      weight=np.asarray([records[i].weight for i in kept], np.float32),
  )
  return batch, report


def encode_prompts(
    records: Sequence,
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    policy: str,
    add_bos: bool = True,
) -> tuple[PromptBatch, LengthReport]:
  """Prompts to left-padded arrays; `index` is the place in `records`.

  Args:
    records: anything with a `prompt`.
    tokenizer: for all of them.
    max_prompt_length: P, bos included.
    policy: one of `RECORD_POLICIES`.
    add_bos: start with bos, if the tokenizer has one.

  Returns:
    A PromptBatch of numpy arrays, and the report.
  """
  has_bos = add_bos and tokenizer.bos_id is not None
  _check_positive("max_prompt_length", max_prompt_length - has_bos)
  lengths = Lengths(policy, RECORD_POLICIES)
  kept, rows = [], []
  texts = [(record.prompt,) for record in records]
  for index, (bos, (ids,)) in enumerate(_encode(texts, tokenizer, add_bos)):
    limit = max_prompt_length - len(bos)
    if not ids and not bos:
      raise ValueError(
          f"record {index} has an empty prompt and there is no bos token: there"
          " is nothing to start from."
      )
    lengths.see(len(ids) + len(bos), 0)
    count = lengths.keep(len(ids), 0, limit, 0)
    if count is not None:
      kept.append(index)
      rows.append([*bos, *ids[len(ids) - count:]])
  shape = (len(rows), max_prompt_length)
  prompts = np.full(shape, tokenizer.pad_id, np.int32)
  mask = np.zeros(shape, np.int32)
  for row, ids in enumerate(rows):
    _write_row(prompts[row], mask[row], ids, [], max_prompt_length)
  index = np.asarray(kept, np.int32)
  report = lengths.report()
  return PromptBatch(prompts=prompts, prompt_mask=mask, index=index), report


# --- shared -------------------------------------------------------------------


def _encode_groups(
    groups: Sequence[tuple[str, Sequence[str]]],
    tokenizer: Tokenizer,
    size: int,
    limits: tuple[int, int],
    policy: str,
    add_bos: bool,
) -> tuple[np.ndarray, np.ndarray, list[int], LengthReport]:
  """Prompts with up to `size` completions each.

  Returns:
    tokens [N, size, P + C], mask [N, size, P + C], the N kept places, report.
  """
  prompt_limit, completion_limit = limits
  _check_positive("max_prompt_length", prompt_limit)
  _check_positive("max_completion_length", completion_limit)
  lengths = Lengths(policy, RECORD_POLICIES)
  kept, rows = [], []
  for index, (bos, prompt, completions) in enumerate(
      _encode_prompts_and_completions(groups, tokenizer, add_bos)
  ):
    longest = max(map(len, completions))
    lengths.see(len(prompt) + len(bos), longest)
    count = lengths.keep(
        len(prompt), longest, prompt_limit - len(bos), completion_limit
    )
    if count is not None:
      kept.append(index)
      rows.append(([*bos, *prompt[len(prompt) - count:]], completions))
  shape = (len(rows), size, prompt_limit + completion_limit)
  tokens = np.full(shape, tokenizer.pad_id, np.int32)
  mask = np.zeros(shape, np.int32)
  for row, (prompt, completions) in enumerate(rows):
    for k, ids in enumerate(completions):
      _write_row(tokens[row, k], mask[row, k], prompt, ids, prompt_limit)
  return tokens, mask, kept, lengths.report()


def _encode_prompts_and_completions(
    groups, tokenizer: Tokenizer, add_bos: bool
):
  """Yields (bos, prompt ids, [completion ids with eos]) for each group."""
  rows = [
      (prompt, text) for prompt, completions in groups for text in completions
  ]
  # Completions of one prompt repeat it.
  together = max((len(completions) for _, completions in groups), default=1)
  flat = iter(_encode(rows, tokenizer, add_bos, together))
  for _, completions in groups:
    encoded = [next(flat) for _ in completions]
    bos, (prompt, _) = encoded[0]
    yield bos, prompt, [_ended(ids, tokenizer) for _, (_, ids) in encoded]


def _encode_spans(
    records: Sequence[Demonstration], tokenizer: Tokenizer, add_bos: bool
):
  """Yields (bos, [(ids, trained)]) for each record, one entry a span."""
  rows = [[text for text, _ in record.spans] for record in records]
  encoded = _encode(rows, tokenizer, add_bos)
  for record, (bos, ids) in zip(records, encoded, strict=True):
    ids[-1] = _ended(ids[-1], tokenizer)
    flags = [trained for _, trained in record.spans]
    yield bos, list(zip(ids, flags, strict=True))


def _encode(
    rows: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    add_bos: bool,
    together: int = 1,
) -> list[tuple[list[int], list[list[int]]]]:
  """(bos, the ids of its texts) of each row; no bos is left in the ids.

  Args:
    together: see `own_part.encode_rows`.
  """
  start = tokenizer.bos_token
  rows = [_without_spelled_bos(row, start, add_bos) for row in rows]
  found = []
  encoded = own_part.encode_rows(tokenizer, rows, together=together)
  for row, ids in zip(rows, encoded, strict=True):
    is_rendered = special_tokens.is_rendered(row)
    bos = _bos(tokenizer, add_bos and not is_rendered)
    first = next((x for x in ids if x), [])
    if is_rendered and first[:1] == [tokenizer.bos_id]:
      bos = [first.pop(0)]
    found.append((bos, ids))
  return found


def _without_spelled_bos(
    row: Sequence[str], bos_token: str | None, add_bos: bool
) -> Sequence[str]:
  first = row[0] if row else ""
  if not add_bos or not bos_token or not first.startswith(bos_token):
    return row
  return [first.removeprefix(bos_token), *row[1:]]


def _ended(completion: list[int], tokenizer: Tokenizer) -> list[int]:
  if completion and completion[-1] in tokenizer.eos_ids:
    return completion
  return [*completion, tokenizer.eos_id]


def _write_row(
    tokens: np.ndarray, mask: np.ndarray, prompt: Sequence[int],
    completion: Sequence[int], boundary: int,
) -> None:
  """Writes a prompt that ends, and a completion that starts, at `boundary`."""
  start, end = boundary - len(prompt), boundary + len(completion)
  tokens[start:boundary] = prompt
  tokens[boundary:end] = completion
  mask[start:end] = 1


def _bos(tokenizer: Tokenizer, add_bos: bool) -> list[int]:
  if not add_bos or tokenizer.bos_id is None:
    return []
  return [tokenizer.bos_id]


def _check_positive(name: str, value: int) -> None:
  if value < 1:
    raise LengthError(f"{name} leaves no room for a token.")
