"""Where records come from: a config's source string, made into records.

    world:assistant        the embedded domain; as many as asked for
    stories:PATH           TinyStories' text layout: a lone line break ends a
                           story
    text:PATH              documents divided by blank lines
    polarity:ZIP:HALF      film sentences as comparisons, half 0 or 1
    gsm8k:PATH             GSM8K's file, as demonstrations
    oasst:PATH             Open Assistant's trees, as rankings
    anything else          JSONL (gz too): a path or glob, or tfds:NAME; for
                           text to pretrain on, named .jsonl or .jsonl.gz, of
                           {"text"} or demonstrations

One file can serve training and evaluation: `use` says whether a stage gets its
share of the records or all of them. How many it got is logged. Records of one
origin (one prompt, one dialogue's first turn or continuation, one story's first
sentence) are all on one side, so that nothing held out was half seen in
training.

`${NAME}` stands for an environment variable. What cannot be used is written
with its reason to `<stage>/skipped/`.
"""

import collections
import dataclasses
import pathlib
import re
from typing import Literal
import zlib

from absl import logging

from experiments.harness.models import expand
from rlhf_jax.data import chat, publishers, readers, records
from rlhf_jax.data.records import Comparison, Demonstration, Prompt, Ranking
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.worlds import assistant

ASSISTANT = "world:assistant"
_HELDOUT_EVERY = 10
# Sources that are no records, so that none of them can be passed over.
_NO_RECORDS = ("world", "stories", "text", "polarity", "gsm8k", "oasst")
_JSONL = re.compile(rf"^{readers.TFDS_PREFIX}|\.jsonl(\.gz)?$")
_SENTENCE_END = re.compile(r"(?<=[.!?]) ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
  """Which records, and how many.

  source: see the module's docstring.
  limit: at most so many, in their order; of a world, exactly so many. 0 is all.
  use: 'share' holds every tenth prompt out (of polarity, its own tenth):
    training gets the others, evaluation those. 'all' gives either everything,
    for files that were divided already. A world is divided by itself.
  on_error: 'raise' stops at the first bad record, 'skip' writes it down.
  chat_template: how {messages} become text: 'plain', 'hh', 'tokenizer' for the
    tokenizer's own, a .jinja file or a Jinja string.
  """

  source: str
  limit: int
  on_error: str = "raise"
  use: Literal["share", "all"] = "share"
  chat_template: str = "plain"

  def __post_init__(self):
    if self.limit < 0:
      raise ValueError(f"limit must not be negative: {self.limit}")
    if self.on_error not in ("raise", "skip"):
      raise ValueError(f"on_error must be 'raise' or 'skip': {self.on_error!r}")
    kind = self.source.partition(":")[0]
    if self.on_error == "skip" and kind in _NO_RECORDS:
      raise ValueError(f"on_error='skip' is for files of records, not {kind}:")
    if self.source == ASSISTANT and self.limit == 0:
      raise ValueError(f"{ASSISTANT} has no end: give a limit")


@dataclasses.dataclass(frozen=True)
class Reader:
  """Reads the sources of one stage.

  Every method takes the split, 'train' or 'heldout', that it reads for.

  seed: of what a world makes up and of random pairings.
  skipped_dir: where passed-over records go.
  tokenizer: what reads the records; without it a chat template knows no special
    tokens, and there is no 'tokenizer' template.
  """

  seed: int
  skipped_dir: pathlib.Path
  tokenizer: Tokenizer | None = None

  def documents(self, cfg: SourceConfig, split: str) -> list[str]:
    """Text to pretrain on."""
    if cfg.source == ASSISTANT:
      # Held-out documents are other draws of the same source.
      seed = self.seed if split == "train" else self.seed + 1_000_003
      return assistant.corpus(seed, cfg.limit)
    source = expand(cfg.source)
    if _JSONL.search(source):
      return _used(self._record_texts(source, cfg), split, cfg)
    return _used(_documents(source), split, cfg)

  def demonstrations(
      self, cfg: SourceConfig, split: str
  ) -> list[Demonstration]:
    """Demonstrations to imitate."""
    source = expand(cfg.source)
    kind, _, path = source.partition(":")
    if source == ASSISTANT:
      rows = assistant.demonstrations(self.seed, cfg.limit, split)
      return [records.validate_record("demonstration", row) for row in rows]
    if kind in ("stories", "text"):
      found = [Demonstration(spans=((x, True),)) for x in _documents(source)]
    elif kind == "gsm8k":
      found = publishers.read_gsm8k(path)
    else:
      found = self._records(source, "demonstration", cfg)
    return _used(found, split, cfg)

  def prompts(self, cfg: SourceConfig, split: str) -> list[Prompt]:
    """Prompts to complete; of stories, their first sentences."""
    source = expand(cfg.source)
    if source == ASSISTANT:
      requests = assistant.sample_requests(self.seed, cfg.limit, split)
      return [Prompt(prompt=request.prompt) for request in requests]
    if source.partition(":")[0] in ("stories", "text"):
      found = [Prompt(prompt=_first_sentence(x)) for x in _documents(source)]
    else:
      found = self._records(source, "prompt", cfg)
    return _used(found, split, cfg)

  def comparisons(
      self, cfg: SourceConfig, split: str
  ) -> list[Comparison] | list[Ranking]:
    """Comparisons; or rankings, if the first record has ranks."""
    source = expand(cfg.source)
    kind, _, path = source.partition(":")
    if kind == "polarity":
      path, _, half = path.rpartition(":")
      if half not in ("0", "1"):
        raise readers.ReadError(
            f"{source}: want polarity:ZIP:0 or polarity:ZIP:1"
        )
      parts = publishers.read_sentence_polarity(
          path, half=int(half), seed=self.seed
      )
      whole = parts["train"] + parts["heldout"]
      mine = whole if cfg.use == "all" else parts[split]
      return _limited(mine, len(whole), cfg)
    if kind == "oasst":
      found = publishers.read_oasst(path, chat_template=self._template(cfg))
    elif "ranks" in readers.field_names(source):
      found = self._records(source, "ranking", cfg)
    else:
      found = self._records(source, "comparison", cfg)
    return _used(found, split, cfg)

  def _template(self, cfg: SourceConfig) -> str | chat.Template:
    if self.tokenizer is None:
      return cfg.chat_template
    return self.tokenizer.template(cfg.chat_template)

  def _record_texts(self, source: str, cfg: SourceConfig) -> list[str]:
    """Documents of a file of records: their text, or whole demonstrations."""
    if "text" not in readers.field_names(source):
      # Nothing to pretrain on has special tokens: no tokenizer is known yet.
      plain = dataclasses.replace(self, tokenizer=None)
      found = plain._records(source, "demonstration", cfg)
      return [x.prompt + x.completion for x in found]
    if cfg.on_error == "skip":
      raise readers.ReadError(f"{source}: on_error='skip' is not for documents")
    return readers.read_texts(source)

  def _records(self, source: str, kind: str, cfg: SourceConfig):
    template = self._template(cfg)
    if cfg.on_error == "raise":
      return readers.read_records(source, kind, chat_template=template)
    return readers.read_records(
        source,
        kind,
        chat_template=template,
        on_error="skip",
        skipped_path=self._skipped(f"{kind}:{source}"),
    )

  def _skipped(self, source: str) -> pathlib.Path:
    name = re.sub(r"[^\w.]+", "_", source.rpartition("/")[2])
    # Files of one name in two folders must not overwrite one another.
    unique = zlib.crc32(source.encode())
    return self.skipped_dir / f"{name}_{unique:08x}.jsonl"


def _documents(source: str) -> list[str]:
  kind, _, path = source.partition(":")
  if kind not in ("stories", "text"):
    raise readers.ReadError(
        f"{source}: text comes from stories:PATH or text:PATH, from {ASSISTANT}"
        " or from .jsonl"
    )
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise readers.ReadError(f"{path}: not UTF-8: {error}") from error
  if "\0" in text:
    # As records: it marks special tokens, which no text may do.
    raise readers.ReadError(f"{path}: NUL character at {text.index(chr(0))}")
  pattern = r"(?<!\n)\n(?!\n)" if kind == "stories" else r"\n\s*\n"
  found = [x.strip() for x in re.split(pattern, text)]
  found = [x for x in found if x]
  if not found:
    raise readers.ReadError(f"{path}: holds no text.")
  return found


def _used(items: list, split: str, cfg: SourceConfig) -> list:
  """What a stage gets of a file's records."""
  mine = items if cfg.use == "all" else _share(items, split, cfg)
  return _limited(mine, len(items), cfg)


def _share(items: list, split: str, cfg: SourceConfig) -> list:
  """Every tenth origin is held out, the others are for training.

  Not the last tenth: files are often sorted, by length or by origin.
  """
  origins = _origins(items)
  distinct = list(dict.fromkeys(origins))
  if len(distinct) < 2:
    raise readers.ReadError(
        f"{cfg.source}: records of one prompt alone cannot be divided into"
        " training and held-out ones; use='all' takes them as they are."
    )
  # From the end, so that two are enough for two splits.
  heldout = set(distinct[::-_HELDOUT_EVERY])
  wanted = split == "heldout"
  return [
      item
      for item, origin in zip(items, origins, strict=True)
      if (origin in heldout) == wanted
  ]


def _origins(items: list) -> list[str]:
  """A name for what each record has in common with those of its origin.

  A beginning that more than a tenth of the records have is an instruction and
  no origin.
  """
  most = max(len(items) // _HELDOUT_EVERY, 2)
  texts = [_text(item) for item in items]
  openings = [_opening(text, item) for text, item in zip(texts, items)]
  count = collections.Counter(openings)
  texts = [
      opening if count[opening] <= most else text
      for opening, text in zip(openings, texts)
  ]
  count = collections.Counter(texts)
  # Sorted, what goes on from a text comes after it.
  members, start = collections.defaultdict(list), None
  for text in sorted(count):
    if start is None or not _goes_on(text, start):
      start = text
    members[start].append(text)
  origin = {
      text: start if sum(count[x] for x in mine) <= most else text
      for start, mine in members.items()
      for text in mine
  }
  return [origin[text] for text in texts]


def _goes_on(text: str, start: str) -> bool:
  if not text.startswith(start) or text == start:
    return text == start
  # "page 10" does not go on from "page 1".
  return not (start[-1].isalnum() and text[len(start)].isalnum())


def _text(item) -> str:
  if isinstance(item, str):
    return item
  return item.prompt or getattr(item, "completion", "") or repr(item)


def _opening(text: str, item) -> str:
  if isinstance(item, str) or not item.prompt:
    return _first_sentence(text)
  # Dialogues are often there at several lengths.
  return text.partition("\n\nAssistant:")[0] or text


def _first_sentence(text: str) -> str:
  return _SENTENCE_END.split(text, maxsplit=1)[0]


def _limited(items: list, num: int, cfg: SourceConfig) -> list:
  used = items[: cfg.limit] if cfg.limit else items
  logging.info("%s: %d of %d records used", cfg.source, len(used), num)
  return used
