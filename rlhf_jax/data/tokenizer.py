"""One tokenizer interface over byte-level BPE, Hugging Face and sentencepiece.

What callers may rely on, whatever is inside:

* `encode` never adds a special token and never reads one out of the text: a
  user who types "<eos>" gets its characters, not the end of the sequence.
* `decode` drops the special tokens. Padding must be cut off by its mask first,
  because a model without a padding token pads with an ordinary id.
* Some tokenizers put a space before the first word of a text. A completion that
  follows a prompt is no first word, so it is encoded with `continues=True`:
  then `encode(a) + encode(b, continues=True)` decodes to exactly `a + b`, and
  `decode(ids, continues=True)` gives the completion with the spaces it has.
  For byte-level tokenizers the flag changes nothing.
* White space is kept as it stands. A sentencepiece file that asks for repeated
  or outer spaces to be removed is overruled, because `a + b` would not survive
  otherwise. Its character normalisation (NFKC, say) stays, and the character
  U+2581, its sign for a space, comes back as a space.
"""

from collections.abc import Iterable, Sequence
import copy
import hashlib
import json
import pathlib
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

_HF_FILE = "tokenizer.json"
_HF_CONFIG = "tokenizer_config.json"
_SPM_FILE = "tokenizer.model"

# A serialised protobuf message that is appended to another is merged into it.
# These are `normalizer_spec { remove_extra_whitespaces: false }` and the same
# with `add_dummy_prefix: false`: the model file is overruled without a protobuf
# runtime.
_SPM_KEEP_SPACES = b"\x1a\x02\x20\x00"
_SPM_KEEP_SPACES_NO_PREFIX = b"\x1a\x04\x18\x00\x20\x00"


class TokenizerError(ValueError):
  """A tokenizer file that is missing, damaged or without a needed token."""


class _FastBackend:
  """A `tokenizers.Tokenizer`, and its twin without a prefix space."""

  def __init__(self, serialized: str):
    self.start = tokenizers.Tokenizer.from_str(serialized)
    without_prefix = _without_prefix_space(json.loads(serialized))
    self.middle = tokenizers.Tokenizer.from_str(json.dumps(without_prefix))
    for backend in (self.start, self.middle):
      backend.encode_special_tokens = True
      backend.no_truncation()
      backend.no_padding()
    self.vocab_size = 1 + max(self.start.get_vocab().values())

  def encode_batch(self, texts: list[str], continues: bool) -> list[list[int]]:
    backend = self.middle if continues else self.start
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def decode_batch(self, rows: list[list[int]], continues: bool) -> list[str]:
    backend = self.middle if continues else self.start
    return backend.decode_batch(rows, skip_special_tokens=True)


class _SentencePieceBackend:
  """A sentencepiece processor, and its twin without a dummy prefix."""

  def __init__(self, proto: bytes):
    self.start = _load_proto(proto + _SPM_KEEP_SPACES)
    self.middle = _load_proto(proto + _SPM_KEEP_SPACES_NO_PREFIX)
    self.vocab_size = self.start.vocab_size()

  def encode_batch(self, texts: list[str], continues: bool) -> list[list[int]]:
    return (self.middle if continues else self.start).encode(texts)

  def decode_batch(self, rows: list[list[int]], continues: bool) -> list[str]:
    return (self.middle if continues else self.start).decode(rows)


class Tokenizer:
  """Text to token ids and back. See the module docstring for what it promises.

  Build one with `train_byte_level_bpe`, `from_sentencepiece`,
  `from_pretrained_folder` or `load`.

  Attributes:
    pad_id: never `eos_id`. A vocabulary without a padding token lends an
      ordinary id (`unk` if there is one, else the lowest free id); it does no
      harm because padding is always masked and never recognised by its id.
    eos_id: ends a completion.
    bos_id: starts a sequence, or None.
    vocab_size: one more than the largest id.
    chat_template: the Jinja string of the folder it came from, or None.
    fingerprint: sha256 of the files that `save` writes.
  """

  def __init__(
      self,
      backend,
      files: dict[str, bytes],
      special_ids: dict,
      chat_template: str | None = None,
  ):
    self._backend = backend
    self._files = dict(files)
    self.vocab_size: int = backend.vocab_size
    self.eos_id: int = special_ids["eos"]
    self.bos_id: int | None = special_ids["bos"]
    self.pad_id: int = special_ids["pad"]
    self.chat_template = chat_template

  # --- ways to get one ------------------------------------------------------

  @classmethod
  def train_byte_level_bpe(
      cls, texts: Iterable[str], vocab_size: int
  ) -> "Tokenizer":
    """Learns byte-level BPE: every text round-trips, digits stay single.

    Ids 0, 1, 2 are <pad>, <eos>, <bos>, then the 256 bytes, then the merges.
    The same texts give the same tokenizer. With little text there may be fewer
    merges than asked for: `vocab_size` of the result says how many there are.

    Args:
      texts: what to learn the merges from.
      vocab_size: upper bound, at least 259.
    """
    specials = ["<pad>", "<eos>", "<bos>"]
    if vocab_size < 256 + len(specials):
      raise ValueError(
          f"vocab_size={vocab_size} is too small: 256 bytes and"
          f" {len(specials)} special tokens need at least"
          f" {256 + len(specials)}."
      )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return cls._from_fast(
        backend.to_str(), dict(pad="<pad>", eos="<eos>", bos="<bos>")
    )

  @classmethod
  def from_sentencepiece(cls, path: str | pathlib.Path) -> "Tokenizer":
    """Reads a sentencepiece `.model` file."""
    return cls._from_proto(_read(pathlib.Path(path)), str(path))

  @classmethod
  def from_pretrained_folder(cls, directory: str | pathlib.Path) -> "Tokenizer":
    """Reads a tokenizer folder in Hugging Face's layout, from disk only."""
    # Here and not above: the import takes a second and is seldom needed.
    import transformers

    directory = pathlib.Path(directory)
    if not directory.is_dir():
      raise TokenizerError(f"{directory}: no such folder.")
    try:
      fast = transformers.AutoTokenizer.from_pretrained(
          str(directory), local_files_only=True
      )
      serialized = fast.backend_tokenizer.to_str()
    except Exception as error:
      # The library raises many kinds of errors; all of them are about this
      # folder, which its messages do not always name.
      raise TokenizerError(
          f"{directory}: transformers cannot read a fast tokenizer from this"
          f" folder: {error}"
      ) from error
    specials = dict(pad=fast.pad_token, eos=fast.eos_token, bos=fast.bos_token)
    return cls._from_fast(
        serialized, specials, chat_template=fast.chat_template
    )

  @classmethod
  def load(cls, directory: str | pathlib.Path) -> "Tokenizer":
    """Reads what `save` wrote."""
    directory = pathlib.Path(directory)
    if (directory / _SPM_FILE).exists():
      return cls.from_sentencepiece(directory / _SPM_FILE)
    serialized = _read(directory / _HF_FILE).decode("utf-8", "replace")
    try:
      config = json.loads(_read(directory / _HF_CONFIG))
      specials = {k: config[f"{k}_token"] for k in ("pad", "eos", "bos")}
    except (ValueError, KeyError, TypeError) as error:
      raise TokenizerError(
          f"{directory / _HF_CONFIG}: not written by Tokenizer.save"
          f" ({error!r}). Read a Hugging Face folder with"
          " Tokenizer.from_pretrained_folder."
      ) from error
    return cls._from_fast(
        serialized,
        specials,
        str(directory / _HF_FILE),
        config.get("chat_template"),
    )

  @classmethod
  def _from_fast(
      cls,
      serialized: str,
      specials: dict,
      name: str = "tokenizer",
      chat_template: str | None = None,
  ) -> "Tokenizer":
    try:
      backend = _FastBackend(serialized)
    except Exception as error:  # the library raises bare Exception
      raise TokenizerError(f"{name}: damaged: {error}") from error
    ids = {
        key: None if token is None else backend.start.token_to_id(token)
        for key, token in specials.items()
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {f"{key}_token": specials[key] for key in ("pad", "eos", "bos")}
    if chat_template:
      config["chat_template"] = chat_template
    files = {
        _HF_FILE: serialized.encode(),
        _HF_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    unk = getattr(backend.start.model, "unk_token", None)
    unk_id = None if unk is None else backend.start.token_to_id(unk)
    special_ids = _complete_special_ids(ids, unk_id, name)
    return cls(backend, files, special_ids, chat_template)

  @classmethod
  def _from_proto(cls, proto: bytes, name: str) -> "Tokenizer":
    try:
      backend = _SentencePieceBackend(proto)
    except (RuntimeError, OSError, ValueError) as error:
      raise TokenizerError(
          f"{name}: not a sentencepiece model: {error}"
      ) from error
    start = backend.start
    ids = dict(pad=start.pad_id(), eos=start.eos_id(), bos=start.bos_id())
    ids = {key: None if id_ < 0 else id_ for key, id_ in ids.items()}
    special_ids = _complete_special_ids(ids, start.unk_id(), name)
    return cls(backend, {_SPM_FILE: proto}, special_ids)

  # --- use ------------------------------------------------------------------

  def encode(self, text: str, *, continues: bool = False) -> list[int]:
    """Ids of `text`, without special tokens.

    Args:
      text: any Unicode text (no lone surrogates).
      continues: the text goes on after other text, as a completion after its
        prompt does: no space is put before its first word.
    """
    return self.encode_batch([text], continues=continues)[0]

  def encode_batch(
      self, texts: Sequence[str], *, continues: bool = False
  ) -> list[list[int]]:
    """`encode` of each text, in parallel where the library can."""
    texts = list(texts)
    for index, text in enumerate(texts):
      try:
        text.encode()
      except UnicodeEncodeError as error:
        raise ValueError(
            f"text {index} holds a lone surrogate at character {error.start},"
            " which is no Unicode text; clean it before encoding."
        ) from error
    return self._backend.encode_batch(texts, continues) if texts else []

  def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
    """Text of `ids`; special tokens are dropped.

    Bytes that are no valid UTF-8 (a sampled model may end within a character)
    become U+FFFD.

    Args:
      ids: token ids, without padding.
      continues: the ids are a completion: a space that its first token starts
        with is kept.
    """
    return self.decode_batch([ids], continues=continues)[0]

  def decode_batch(
      self, rows: Sequence[Sequence[int]], mask: Any = None, *,
      continues: bool = False,
  ) -> list[str]:
    """`decode` of each row.

    Args:
      rows: lists of ids, or an integer array [B, N].
      mask: [B, N], 1 on the tokens to decode; None decodes all of them.
      continues: as in `decode`.
    """
    rows = [_plain_ids(row) for row in rows]
    if mask is not None:
      rows = [
          [id_ for id_, keep in zip(row, _plain_ids(kept), strict=True) if keep]
          for row, kept in zip(rows, mask, strict=True)
      ]
    for index, row in enumerate(rows):
      if row and not 0 <= min(row) <= max(row) < self.vocab_size:
        raise ValueError(
            f"row {index} holds ids from {min(row)} to {max(row)}, outside the"
            f" vocabulary of {self.vocab_size}."
        )
    return self._backend.decode_batch(rows, continues) if rows else []

  @property
  def fingerprint(self) -> str:
    digest = hashlib.sha256()
    for name in sorted(self._files):
      content = self._files[name]
      digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()

  def save(self, directory: str | pathlib.Path) -> None:
    """Writes the files that `load` reads (and transformers, for a BPE)."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for stale in {_HF_FILE, _HF_CONFIG, _SPM_FILE} - self._files.keys():
      (directory / stale).unlink(missing_ok=True)
    for name, content in self._files.items():
      (directory / name).write_bytes(content)


def _plain_ids(row: Any) -> list[int]:
  """Plain integers: the libraries take neither numpy scalars nor jax arrays."""
  return row.tolist() if hasattr(row, "tolist") else [int(x) for x in row]


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise TokenizerError(f"{path}: {error.strerror}.") from error


def _load_proto(proto: bytes) -> sentencepiece.SentencePieceProcessor:
  return sentencepiece.SentencePieceProcessor(model_proto=proto)


def _complete_special_ids(
    ids: dict[str, int | None], unk_id: int | None, name: str
) -> dict[str, int | None]:
  """Checks that eos exists and finds a pad id that is neither eos nor bos."""
  if ids["eos"] is None:
    raise TokenizerError(
        f"{name}: no end-of-sequence token. Completions could never end; set"
        " eos_token in its tokenizer_config.json."
    )
  taken = {ids["eos"], ids["bos"]}
  if ids["pad"] is None or ids["pad"] in taken:
    lenders = [unk_id, *range(len(taken) + 1)]
    free = [i for i in lenders if i is not None and i >= 0 and i not in taken]
    ids = ids | {"pad": free[0]}
  return ids


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
