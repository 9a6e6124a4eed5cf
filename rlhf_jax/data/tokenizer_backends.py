"""The libraries behind `Tokenizer`: tokenizers and sentencepiece.

Each has two twins: `start` encodes the beginning of a text, `middle` what goes
on from other text, without the space that some put before a first word. A third
reads special tokens that are marked, see `special_tokens`.
"""

import copy
import functools
import json
import re
from typing import Any

import sentencepiece
import tokenizers

from rlhf_jax.data.special_tokens import MARK, mark

# A serialised protobuf message that is appended to another is merged into it.
# These are `normalizer_spec { remove_extra_whitespaces: false }` and the same
# with `add_dummy_prefix: false`: the model file is overruled without a protobuf
# runtime.
_SPM_KEEP_SPACES = b"\x1a\x02\x20\x00"
_SPM_KEEP_SPACES_NO_PREFIX = b"\x1a\x04\x18\x00\x20\x00"

# How byte-level tokenizers write bytes: what is printable in Latin-1 as itself,
# the others as characters from 256 on (GPT-2's table).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [x for x in range(256) if x not in _PRINTABLE]
_BYTE_OF = {chr(x): x for x in _PRINTABLE} | {
    chr(256 + i): x for i, x in enumerate(_OTHERS)
}


class FastBackend:
  """A `tokenizers.Tokenizer`, and its twin without a prefix space."""

  def __init__(self, serialized: str):
    self.serialized = serialized
    self._spec = json.loads(serialized)
    self.start = tokenizers.Tokenizer.from_str(serialized)
    without_prefix = _without_prefix_space(self._spec)
    self.middle = tokenizers.Tokenizer.from_str(json.dumps(without_prefix))
    for backend in (self.start, self.middle):
      backend.encode_special_tokens = True
      backend.no_truncation()
      backend.no_padding()
    self.vocab_size = 1 + max(self.start.get_vocab().values())
    self.special_tokens = {
        token.content: id_
        for id_, token in self.start.get_added_tokens_decoder().items()
        if token.special
    }
    unk = getattr(self.start.model, "unk_token", None)
    self.unk_id = None if unk is None else self.start.token_to_id(unk)
    self.unk_token = unk
    self.covers_all_text = bool(getattr(self.start.model, "byte_fallback", 0))

  @functools.cached_property
  def _marked(self) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """A twin of `start` whose special tokens are marked, and its ids -> ours.

    So the library itself splits at them, with its rules for the white space
    beside them, and leaves alone what people spell.
    """
    spec = copy.copy(self._spec)
    spec["added_tokens"] = [
        {**token, "content": mark(token["content"])}
        if token["special"] else token
        for token in spec["added_tokens"]
    ]
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.no_truncation()
    backend.no_padding()
    ids = {
        backend.token_to_id(mark(token)): id_
        for token, id_ in self.special_tokens.items()
    }
    return backend, ids

  def encode_batch(self, texts: list[str], continues: bool) -> list[list[int]]:
    backend = self.middle if continues else self.start
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def encode_marked(self, text: str) -> list[int]:
    """Ids of a text from its start on, its marked tokens read."""
    backend, ids = self._marked
    found = backend.encode(text, add_special_tokens=False).ids
    return [ids[x] if x in ids else x for x in found]

  def decode_batch(self, rows: list[list[int]], continues: bool) -> list[str]:
    backend = self.middle if continues else self.start
    return backend.decode_batch(rows, skip_special_tokens=True)

  def piece(self, id_: int) -> str:
    """The vocabulary's name of an id; '' if it has none."""
    return self.start.id_to_token(id_) or ""

  def name(self, id_: int) -> str:
    """What an id is for people that is no text by itself."""
    piece = self.piece(id_)
    if "ByteLevel" not in json.dumps(self._spec["decoder"]):
      return piece
    content = bytes(_BYTE_OF[x] for x in piece if x in _BYTE_OF)
    return content.decode("utf-8", "backslashreplace")


class SentencePieceBackend:
  """A sentencepiece processor, and its twin without a dummy prefix."""

  def __init__(self, proto: bytes):
    self.proto = proto
    self.start = _load_proto(proto + _SPM_KEEP_SPACES)
    self.middle = _load_proto(proto + _SPM_KEEP_SPACES_NO_PREFIX)
    self.vocab_size = self.start.vocab_size()
    self.special_tokens = {
        self.start.id_to_piece(i): i
        for i in range(self.vocab_size)
        if self.start.is_control(i)
    }
    self.unk_id = self.start.unk_id()
    self.unk_token = self.start.id_to_piece(self.unk_id)
    self.covers_all_text = any(
        self.start.is_byte(i) for i in range(self.vocab_size)
    )

  def encode_batch(self, texts: list[str], continues: bool) -> list[list[int]]:
    return (self.middle if continues else self.start).encode(texts)

  def encode_marked(self, text: str) -> list[int]:
    """Ids of a text from its start on; after a special token one starts too."""
    ids = []
    for i, part in enumerate(re.split(f"{MARK}([^{MARK}]+){MARK}", text)):
      ids += [self.special_tokens[part]] if i % 2 else self.start.encode(part)
    return ids

  def decode_batch(self, rows: list[list[int]], continues: bool) -> list[str]:
    return (self.middle if continues else self.start).decode(rows)

  def piece(self, id_: int) -> str:
    """The vocabulary's name of an id."""
    return self.start.id_to_piece(id_)

  name = piece


def _load_proto(proto: bytes) -> sentencepiece.SentencePieceProcessor:
  return sentencepiece.SentencePieceProcessor(model_proto=proto)


def _without_prefix_space(spec: Any) -> Any:
  """A tokenizer.json with every rule that adds or strips a first space off.

  The rules are `Prepend` normalizers, `Metaspace` with a prepend scheme,
  `ByteLevel` with add_prefix_space, and `Strip` decoders of leading spaces.
  """
  spec = copy.copy(spec)
  for stage in ("normalizer", "pre_tokenizer", "decoder"):
    spec[stage] = _strip_stage(spec.get(stage))
  return spec


def _strip_stage(stage: dict | None) -> dict | None:
  if stage is None or stage["type"] == "Prepend":
    return None
  stage = dict(stage)
  if stage["type"] == "Sequence":
    for key in ("normalizers", "pretokenizers", "decoders"):
      if key in stage:
        parts = [_strip_stage(part) for part in stage[key]]
        stage[key] = [part for part in parts if part is not None]
  elif stage["type"] == "Metaspace":
    stage["prepend_scheme"] = "never"
  elif stage["type"] == "ByteLevel":
    stage["add_prefix_space"] = False
  elif stage["type"] == "Strip" and "start" in stage:
    stage["start"] = 0
  return stage
