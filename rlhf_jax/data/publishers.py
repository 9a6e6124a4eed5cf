"""Reads public data sets from the files that their publishers ship."""

import dataclasses
import hashlib
import os
import pathlib
import random
import zipfile

from rlhf_jax.data import chat, readers, records, special_tokens
from rlhf_jax.data.records import (
    Comparison,
    Demonstration,
    Ranking,
    RecordError,
)


def read_gsm8k(path: str | os.PathLike) -> list[Demonstration]:
  """GSM8K: lines of {question, answer}.

  The prompt is "Question: ...\\nAnswer:", the completion a space and the worked
  answer as published, with its <<48/2=24>> notes and "#### 72" at the end.

  Raises:
    ReadError: with file, line and field.
  """
  found = []
  for file in readers.resolve_files(os.fspath(path)):
    for number, line in readers.read_lines(file):
      try:
        found.append(_gsm8k_record(readers.parse_line(line)))
      except RecordError as error:
        raise readers.ReadError(f"{file}:{number}: {error}") from error
  if not found:
    raise readers.ReadError(f"{path}: holds no records.")
  return found


def _gsm8k_record(obj) -> Demonstration:
  if not isinstance(obj, dict):
    raise RecordError("", "is not a JSON object")
  for field in ("question", "answer"):
    if field not in obj or not isinstance(obj[field], str):
      raise RecordError(field, "missing or not a string")
  if "\n#### " not in obj["answer"]:
    raise RecordError("answer", "does not end with '#### ' and a number")
  return records.validate_record("demonstration", {
      "prompt": f"Question: {obj['question']}\nAnswer:",
      "completion": f" {obj['answer']}",
  })


def read_oasst(
    path: str | os.PathLike, *, chat_template: str | chat.Template = "hh"
) -> list[Ranking]:
  """Open Assistant's trees: one ranking for each message with ranked replies.

  Wherever at least two of the assistant's replies to a message have a rank,
  they are ranked with the conversation up to there as the prompt. Deleted and
  unranked replies are left out.

  Args:
    path: JSONL file or glob, one tree a line (`*.trees.jsonl`, gzip too).
    chat_template: how the conversation becomes text, see `chat`.

  Raises:
    ReadError: with file, line and reason.
  """
  found = []
  for file in readers.resolve_files(os.fspath(path)):
    for number, line in readers.read_lines(file):
      try:
        tree = readers.parse_line(line)
        found += _tree_rankings(tree["prompt"], chat_template)
      except (RecordError, KeyError, TypeError) as error:
        raise readers.ReadError(
            f"{file}:{number}: not a tree of messages: {error!r}"
        ) from error
  if not found:
    raise readers.ReadError(f"{path}: holds no ranked replies.")
  return found


def _tree_rankings(
    root: dict, chat_template: str | chat.Template
) -> list[Ranking]:
  found = []
  # A stack and not recursion: nobody promises how deep a tree is.
  stack = [(root, [])]
  while stack:
    node, before = stack.pop()
    role = {"prompter": "user", "assistant": "assistant"}[node["role"]]
    messages = [*before, {"role": role, "content": node["text"]}]
    stack += [(reply, messages) for reply in reversed(node["replies"])]
    ranked = [
        reply for reply in node["replies"]
        if reply.get("rank") is not None and not reply["deleted"]
    ]
    if role == "user" and len(ranked) > 1:
      prompt = chat.render_prompt(messages, chat_template)
      ranking = records.validate_record("ranking", {
          "prompt": special_tokens.unmarked(prompt),
          "completions": [f" {reply['text']}" for reply in ranked],
          "ranks": [reply["rank"] for reply in ranked],
      })
      # The marks of special tokens are nothing that a file may hold.
      found.append(dataclasses.replace(ranking, prompt=prompt))
  return found


def read_sentence_polarity(
    zip_path: str | os.PathLike, *, half: int, seed: int
) -> dict[str, list[Comparison]]:
  """Film sentences (rt-polarity.pos, .neg) as comparisons without a prompt.

  Each positive sentence is chosen over a negative one. Which half a sentence
  is in, and whether it is held out, follows from a hash of the sentence: halves
  and splits are disjoint for all seeds, so a judge that learned from one half
  has seen nothing that a reward model learned from the other. A sentence that
  occurs twice counts once; one that is both positive and negative is left out,
  and so is what the larger side has too many.

  Args:
    zip_path: the zip as published, with one .pos and one .neg file inside.
    half: 0 or 1.
    seed: decides the pairing and the order.

  Returns:
    {"train": ..., "heldout": ...}; a tenth is held out.
  """
  if half not in (0, 1):
    raise ValueError(f"half={half} is neither 0 nor 1.")
  positive, negative = (_sentences(zip_path, end) for end in (".pos", ".neg"))
  both = positive & negative
  rng = random.Random(seed)
  pairs = {}
  for split in ("train", "heldout"):
    sides = []
    for sentences in (positive - both, negative - both):
      mine = sorted(s for s in sentences if _place(s) == (half, split))
      rng.shuffle(mine)
      sides.append(mine)
    pairs[split] = [
        records.validate_record(
            "comparison", {"prompt": "", "chosen": good, "rejected": bad}
        )
        for good, bad in zip(*sides, strict=False)
    ]
  return pairs


def _place(sentence: str) -> tuple[int, str]:
  digest = hashlib.sha256(sentence.encode()).digest()
  return digest[0] % 2, "heldout" if digest[1] % 10 == 0 else "train"


def _sentences(zip_path: str | os.PathLike, suffix: str) -> set[str]:
  path = pathlib.Path(zip_path)
  try:
    with zipfile.ZipFile(path) as archive:
      names = [n for n in archive.namelist() if n.endswith(suffix)]
      if len(names) != 1:
        raise readers.ReadError(
            f"{path}: holds {len(names)} {suffix} files instead of one."
        )
      text = archive.read(names[0]).decode("latin-1")
  except (OSError, zipfile.BadZipFile) as error:
    raise readers.ReadError(f"{path}: {error}") from error
  # Not splitlines: Latin-1 text holds 0x85, which it would break lines at.
  lines = (" ".join(line.split()) for line in text.split("\n"))
  return {line for line in lines if line}
