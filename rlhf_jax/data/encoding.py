"""Records to token arrays.

Layout of a sequence: bos (if asked for and known), prompt, completion, eos. The
prompt and the completion are tokenized apart, so that the boundary between them
is a token boundary in training as it is when a model samples.

Nothing is cut in silence. What is too long is handled by a policy and counted
in the `LengthReport` that every function returns beside its result:

  drop                  the record is left out
  truncate_prompt_left  the prompt loses its beginning (bos stays); a completion
                        that is too long by itself is dropped, never cut,
                        because a cut one would teach the model to stop there
  split                 for documents: consecutive pieces of max_length
  error                 LengthError
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from rlhf_jax.data.records import Comparison, Demonstration, Ranking
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.types import PreferenceBatch, PromptBatch, RankingBatch

RECORD_POLICIES = ("drop", "truncate_prompt_left", "error")
DOCUMENT_POLICIES = ("drop", "split", "error")

Example = tuple[list[int], list[float]]


class LengthError(ValueError):
  """A record is longer than its limit, or none can be short enough."""


@dataclasses.dataclass(frozen=True)
class LengthReport:
  """What the length limits did to a data set.

  num_records = num_kept + num_dropped; num_truncated of the kept ones lost a
  part of their prompt (num_split: were cut into pieces). The longest lengths
  are in tokens, before the policy, bos and eos included. dropped: the places of
  the dropped ones.
  """

  num_records: int
  num_kept: int
  num_dropped: int
  num_truncated: int
  num_split: int
  longest_prompt: int
  longest_completion: int
  dropped: tuple[int, ...]

  def __str__(self) -> str:
    return (
        f"{self.num_kept} of {self.num_records} records kept,"
        f" {self.num_dropped} dropped, {self.num_truncated} truncated,"
        f" {self.num_split} split; longest prompt {self.longest_prompt} tokens,"
        f" longest completion {self.longest_completion}"
    )


class _Lengths:
  """Applies a policy record by record and keeps count."""

  def __init__(self, policy: str, allowed: Sequence[str]):
    if policy not in allowed:
      raise ValueError(f"policy={policy!r} is not one of {', '.join(allowed)}.")
    self.policy = policy
    self.truncated = self.split = self.records = 0
    self.dropped = []
    self.longest_prompt = self.longest_completion = 0

  def see(self, prompt: int, completion: int) -> None:
    self.records += 1
    self.longest_prompt = max(self.longest_prompt, prompt)
    self.longest_completion = max(self.longest_completion, completion)

  def keep(
      self, prompt: int, completion: int, prompt_limit: int,
      completion_limit: int,
  ) -> int | None:
    """How many prompt tokens to keep, or None to drop the record."""
    if prompt <= prompt_limit and completion <= completion_limit:
      return prompt
    if self.policy == "error":
      what, size, limit = "completion", completion, completion_limit
      if completion <= completion_limit:
        what, size, limit = "prompt", prompt, prompt_limit
      raise LengthError(
          f"record {self.records - 1}: its {what} has {size} tokens, the limit"
          f" is {limit}. Raise the limit, or choose another policy than"
          " 'error'."
      )
    if self.policy == "drop" or completion > completion_limit:
      self.dropped.append(self.records - 1)
      return None
    self.truncated += 1
    return prompt_limit

  def report(self) -> LengthReport:
    kept = self.records - len(self.dropped)
    if not kept:
      raise LengthError(
          f"all {self.records} records are longer than the limits: the longest"
          f" prompt has {self.longest_prompt} tokens, the longest completion"
          f" {self.longest_completion}."
          if self.records else "there are no records to encode."
      )
    return LengthReport(
        num_records=self.records, num_kept=kept, num_dropped=len(self.dropped),
        num_truncated=self.truncated, num_split=self.split,
        longest_prompt=self.longest_prompt,
        longest_completion=self.longest_completion,
        dropped=tuple(self.dropped),
    )


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
  lengths = _Lengths(policy, DOCUMENT_POLICIES)
  bos = _bos(tokenizer, add_bos)
  examples = []
  for ids in tokenizer.encode_batch(texts):
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
  eos; the spans before it are the prompt, where earlier answers of the
  assistant are learned from too.

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
  lengths = _Lengths(policy, RECORD_POLICIES)
  bos = _bos(tokenizer, add_bos)
  room = max_length - len(bos)
  examples = []
  for spans in _encode_spans(records, tokenizer):
    prompt = [(i, mask) for ids, mask in spans[:-1] for i in ids]
    completion = [(i, spans[-1][1]) for i in spans[-1][0]]
    completion.append((tokenizer.eos_id, spans[-1][1]))
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
  bos = _bos(tokenizer, add_bos)
  _check_positive("max_prompt_length", max_prompt_length - len(bos))
  lengths = _Lengths(policy, RECORD_POLICIES)
  limit = max_prompt_length - len(bos)
  kept, rows = [], []
  for index, ids in enumerate(
      tokenizer.encode_batch([record.prompt for record in records])
  ):
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
  bos = _bos(tokenizer, add_bos)
  _check_positive("max_prompt_length", prompt_limit)
  _check_positive("max_completion_length", completion_limit)
  lengths = _Lengths(policy, RECORD_POLICIES)
  kept, rows = [], []
  for index, (prompt, completions) in enumerate(
      _encode_prompts_and_completions(groups, tokenizer)
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


def _encode_prompts_and_completions(groups, tokenizer: Tokenizer):
  """Yields (prompt ids, [completion ids with eos]) for each group."""
  texts = [(text, bool(p)) for p, completions in groups for text in completions]
  flat = iter(_encode_flagged(texts, tokenizer))
  prompts = tokenizer.encode_batch([prompt for prompt, _ in groups])
  for prompt, (_, completions) in zip(prompts, groups, strict=True):
    yield prompt, [[*next(flat), tokenizer.eos_id] for _ in completions]


def _encode_spans(records: Sequence[Demonstration], tokenizer: Tokenizer):
  """Yields [(ids, trained)] for each record, one entry a span."""
  texts = [
      (text, place > 0)
      for record in records for place, (text, _) in enumerate(record.spans)
  ]
  flat = iter(_encode_flagged(texts, tokenizer))
  for record in records:
    yield [(next(flat), trained) for _, trained in record.spans]


def _encode_flagged(
    texts: Sequence[tuple[str, bool]], tokenizer: Tokenizer
) -> list[list[int]]:
  """Encodes (text, continues) pairs, each kind in one batch, in order."""
  result: list[list[int]] = [[]] * len(texts)
  for flag in (False, True):
    places = [i for i, (_, continues) in enumerate(texts) if continues == flag]
    ids = tokenizer.encode_batch([texts[i][0] for i in places], continues=flag)
    for place, row in zip(places, ids, strict=True):
      result[place] = row
  return result


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
