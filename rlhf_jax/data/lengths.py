"""What is too long: a policy, applied record by record and counted.

  drop                  the record is left out
  truncate_prompt_left  the prompt loses its beginning (bos stays); a completion
                        that is too long by itself is dropped, never cut,
                        because a cut one would teach the model to stop there
  split                 for documents: consecutive pieces of max_length
  error                 LengthError
"""

from collections.abc import Sequence
import dataclasses

RECORD_POLICIES = ("drop", "truncate_prompt_left", "error")
DOCUMENT_POLICIES = ("drop", "split", "error")


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


class Lengths:
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
