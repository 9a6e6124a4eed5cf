"""One tokenizer interface over byte-level BPE, Hugging Face and sentencepiece.

What callers may rely on, whatever is inside:

* `encode` never adds a special token and never reads one out of the text: a
  user who types "<eos>" gets its characters, not the end of the sequence.
* Only `encode_rows` reads special tokens, and only those that are marked as
  such, which no user can type (see `special_tokens`).
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
import hashlib
import json
import pathlib
from typing import Any

from rlhf_jax.data import (
    chat,
    marked_text,
    special_tokens,
    tokenizer_files,
    tokenizer_training,
)
from rlhf_jax.data.special_tokens import TokenizerError
from rlhf_jax.data.tokenizer_backends import FastBackend, SentencePieceBackend
from rlhf_jax.data.tokenizer_files import HF_CONFIG, HF_FILE, SPM_FILE


class Tokenizer:
  """Text to token ids and back. See the module docstring for what it promises.

  Build one with `train_byte_level_bpe`, `from_sentencepiece`,
  `from_pretrained_folder` or `load`.

  Attributes:
    pad_id: fills rows; `special_tokens` says how it is chosen. It may be an
      end id: padding is always masked and never recognised by its id.
    pad_is_safe: no text and no completion has it, so that programs which guess
      masks from ids may be told of it.
    eos_id: ends a completion in training.
    eos_ids: all that end one when sampling, `eos_id` the first.
    bos_id: starts a sequence, or None.
    vocab_size: one more than the largest id.
    special_tokens: text -> id.
    chat_template: the Jinja string of the folder it came from, or None.
    fingerprint: sha256 of the files that `save` writes.
  """

  def __init__(
      self,
      backend: FastBackend | SentencePieceBackend,
      files: dict[str, bytes],
      ids: dict[str, int | None],
      eos_ids: tuple[int, ...],
      chat_template: str | None = None,
  ):
    self._backend = backend
    self._files = dict(files)
    self.vocab_size: int = backend.vocab_size
    self.eos_id: int = ids["eos"]
    self.eos_ids = eos_ids
    self.bos_id: int | None = ids["bos"]
    self.special_tokens: dict[str, int] = dict(backend.special_tokens)
    self.pad_id, self.pad_is_safe = special_tokens.choose_pad(
        ids, eos_ids, backend.special_tokens, backend.unk_id,
        backend.covers_all_text,
    )
    self.chat_template = chat_template

  # --- ways to get one ------------------------------------------------------

  @classmethod
  def train_byte_level_bpe(
      cls,
      texts: Iterable[str],
      vocab_size: int,
      special_tokens: Sequence[str] = (),
      chat_template: str | None = None,
  ) -> "Tokenizer":
    """Learns byte-level BPE: every text round-trips, digits stay single.

    Ids 0, 1, 2 are <pad>, <eos>, <bos>, then further special tokens, the 256
    bytes, and the merges. The same texts give the same tokenizer. With little
    text there may be fewer merges than asked for: `vocab_size` of the result
    says how many there are.

    Args:
      texts: what to learn the merges from.
      vocab_size: upper bound, at least 259 and the special tokens.
      special_tokens: texts of further ones, for a chat template.
      chat_template: Jinja that travels along; its end-of-turn token ends
        completions.
    """
    return cls._from_fast(
        tokenizer_training.train_byte_level_bpe(
            texts, vocab_size, special_tokens
        ),
        dict(pad="<pad>", eos="<eos>", bos="<bos>", unk=None),
        template=chat_template,
    )

  @classmethod
  def from_sentencepiece(cls, path: str | pathlib.Path) -> "Tokenizer":
    """Reads a sentencepiece `.model` file."""
    return cls._from_proto(tokenizer_files.read(pathlib.Path(path)), str(path))

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
    names = ("pad", "eos", "bos", "unk")
    specials = {name: getattr(fast, f"{name}_token") for name in names}
    template = tokenizer_files.only_template(fast)
    return cls._from_fast(
        serialized, specials, str(directory), template, directory
    )

  @classmethod
  def load(cls, directory: str | pathlib.Path) -> "Tokenizer":
    """Reads what `save` wrote."""
    directory = pathlib.Path(directory)
    if (directory / SPM_FILE).exists():
      return cls.from_sentencepiece(directory / SPM_FILE)
    serialized = tokenizer_files.read(directory / HF_FILE)
    try:
      config = json.loads(tokenizer_files.read(directory / HF_CONFIG))
      specials = {k: config[f"{k}_token"] for k in ("pad", "eos", "bos")}
      # `save` writes these two only where there are such.
      specials["unk"] = config["unk_token"] if "unk_token" in config else None
      template = config["chat_template"] if "chat_template" in config else None
    except (ValueError, KeyError, TypeError) as error:
      raise TokenizerError(
          f"{directory / HF_CONFIG}: not written by Tokenizer.save"
          f" ({error!r}). Read a Hugging Face folder with"
          " Tokenizer.from_pretrained_folder."
      ) from error
    return cls._from_fast(
        serialized.decode("utf-8", "replace"),
        specials,
        str(directory / HF_FILE),
        template,
        directory,
        is_saved=True,
    )

  @classmethod
  def _from_fast(
      cls,
      serialized: str,
      specials: dict[str, str | None],
      name: str = "tokenizer",
      template: str | None = None,
      folder: pathlib.Path | None = None,
      is_saved: bool = False,
  ) -> "Tokenizer":
    try:
      backend = FastBackend(serialized)
    except Exception as error:  # the library raises bare Exception
      raise TokenizerError(f"{name}: damaged: {error}") from error
    ids = {
        key: None if token is None else backend.start.token_to_id(token)
        for key, token in specials.items()
    }
    _check_eos(ids["eos"], name)
    eos_ids = [ids["eos"]]
    if folder is not None:
      eos_ids += special_tokens.listed_eos_ids(folder, backend.vocab_size)
    if template and not is_saved:  # what was saved has it in its list
      names = tokenizer_files.names(specials, backend)
      end = chat.end_of_turn(chat.Template(template, name, **names))
      eos_ids += [] if end is None else [backend.special_tokens[end]]
    tokenizer = cls(
        backend, {}, ids, tuple(dict.fromkeys(eos_ids)), template
    )
    tokenizer._files = tokenizer_files.fast_files(
        serialized, specials, tokenizer
    )
    return tokenizer

  @classmethod
  def _from_proto(cls, proto: bytes, name: str) -> "Tokenizer":
    try:
      backend = SentencePieceBackend(proto)
    except (RuntimeError, OSError, ValueError) as error:
      raise TokenizerError(
          f"{name}: not a sentencepiece model: {error}"
      ) from error
    start = backend.start
    ids = dict(pad=start.pad_id(), eos=start.eos_id(), bos=start.bos_id())
    ids = {key: None if id_ < 0 else id_ for key, id_ in ids.items()}
    _check_eos(ids["eos"], name)
    return cls(backend, {SPM_FILE: proto}, ids, (ids["eos"],))

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
      marked_text.check_unicode(index, text)
    return self._backend.encode_batch(texts, continues) if texts else []

  def encode_rows(
      self, rows: Sequence[Sequence[str]]
  ) -> list[list[list[int]]]:
    """Ids of texts that follow one another; marked special tokens are read.

    Args:
      rows: each a list of texts, of which one goes on where the other ends.

    Returns:
      For each row, for each of its texts, its ids: a token ends where a text
      does.

    Raises:
      TokenizerError: a marked token is none of this tokenizer's.
    """
    return marked_text.encode_rows(self, self._backend, rows)

  def template(self, choice: str) -> chat.Template:
    """The chat template of a config, which may place special tokens.

    Args:
      choice: 'tokenizer' for this tokenizer's own; else see `chat.find`.

    Raises:
      chat.ChatTemplateError: there is none.
    """
    if choice == chat.OWN and not self.chat_template:
      raise chat.ChatTemplateError(
          f"chat_template={choice!r}: this tokenizer has no chat template; give"
          f" {', '.join(map(repr, chat.TEMPLATES))}, a .jinja file or a Jinja"
          " string."
      )
    source = self.chat_template if choice == chat.OWN else chat.find(choice)
    texts = {"eos": self._text(self.eos_id), "bos": self.bos_token}
    names = tokenizer_files.names(texts, self._backend)
    return chat.Template(source, chat.name_of(choice), **names)

  def _text(self, id_: int | None) -> str | None:
    return None if id_ is None else self._backend.piece(id_)

  @property
  def bos_token(self) -> str | None:
    """The start token's text, or None."""
    return self._text(self.bos_id)

  @property
  def pad_token(self) -> str:
    """The text of what fills rows."""
    return self._text(self.pad_id)

  def piece(self, id_: int) -> str:
    """What one id says, for people: a part of a character by its bytes."""
    for token, special in self.special_tokens.items():
      if special == id_:
        return token
    text = self.decode([id_], continues=True)
    return self._backend.name(id_) if "\ufffd" in text or not text else text

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
      continues: bool = False, drop_unknown: bool = False,
  ) -> list[str]:
    """`decode` of each row.

    Args:
      rows: lists of ids, or an integer array [B, N].
      mask: [B, N], 1 on the tokens to decode; None decodes all of them.
      continues: as in `decode`.
      drop_unknown: leave out ids above the vocabulary instead of refusing them.
        Models often have more embeddings than their tokenizer has tokens, and
        then may sample one.
    """
    rows = [_plain_ids(row) for row in rows]
    if mask is not None:
      rows = [
          [id_ for id_, keep in zip(row, _plain_ids(kept), strict=True) if keep]
          for row, kept in zip(rows, mask, strict=True)
      ]
    if drop_unknown:
      rows = [[x for x in row if x < self.vocab_size] for row in rows]
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
    tokenizer_files.write(directory, self._files)

  def export(self, directory: str | pathlib.Path) -> None:
    """Writes the files of a model's folder that transformers reads.

    Ids are the same there, of a sentencepiece model too; generation_config.json
    lists what ends a completion.
    """
    tokenizer_files.write(
        directory, tokenizer_files.exported_files(self, self._backend)
    )


def _plain_ids(row: Any) -> list[int]:
  """Plain integers: the libraries take neither numpy scalars nor jax arrays."""
  return row.tolist() if hasattr(row, "tolist") else [int(x) for x in row]


def _check_eos(eos_id: int | None, name: str) -> None:
  if eos_id is None:
    raise TokenizerError(
        f"{name}: no end-of-sequence token. Completions could never end; set"
        " eos_token in its tokenizer_config.json."
    )
