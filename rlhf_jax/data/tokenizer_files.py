"""A tokenizer's files: its own, and those of a model's folder elsewhere."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from rlhf_jax.data import sentencepiece_export, special_tokens
from rlhf_jax.data.special_tokens import GENERATION_CONFIG, TokenizerError
from rlhf_jax.data.tokenizer_backends import FastBackend, SentencePieceBackend

HF_FILE = "tokenizer.json"
HF_CONFIG = "tokenizer_config.json"
SPM_FILE = "tokenizer.model"
_FILES = (HF_FILE, HF_CONFIG, SPM_FILE, GENERATION_CONFIG)


def read(path: pathlib.Path) -> bytes:
  """The bytes of a file.

  Raises:
    TokenizerError: it cannot be read.
  """
  try:
    return path.read_bytes()
  except OSError as error:
    raise TokenizerError(f"{path}: {error.strerror}.") from error


def write(directory: str | pathlib.Path, files: Mapping[str, bytes]) -> None:
  """Writes the files and takes another tokenizer's away."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  for stale in set(_FILES) - files.keys():
    (directory / stale).unlink(missing_ok=True)
  for name, content in files.items():
    (directory / name).write_bytes(content)


def only_template(fast: Any) -> str | None:
  """A folder's template; of several by name, the one called default."""
  found = fast.chat_template
  return found.get("default") if isinstance(found, dict) else found


def names(
    specials: Mapping[str, str | None],
    backend: FastBackend | SentencePieceBackend,
) -> dict[str, Any]:
  """What a template knows of the tokens."""
  return {
      "bos_token": specials["bos"] or "",
      "eos_token": specials["eos"] or "",
      "special_tokens": tuple(backend.special_tokens),
  }


def fast_files(
    serialized: str, specials: Mapping[str, str | None], tokenizer: Any
) -> dict[str, bytes]:
  """What `Tokenizer.save` writes, and transformers reads.

  Args:
    serialized: tokenizer.json.
    specials: texts of eos, bos and unk.
    tokenizer: the Tokenizer.
  """
  config = {"tokenizer_class": "PreTrainedTokenizerFast"}
  # A lent padding token only where no one can mistake it for another.
  pad = tokenizer.pad_token if tokenizer.pad_is_safe else None
  tokens = {"pad": pad, "eos": specials["eos"], "bos": specials["bos"]}
  if specials["unk"]:
    tokens["unk"] = specials["unk"]
  config |= {f"{name}_token": token for name, token in tokens.items()}
  if tokenizer.chat_template:
    config["chat_template"] = tokenizer.chat_template
  files = {
      HF_FILE: serialized.encode(),
      HF_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
  }
  if len(tokenizer.eos_ids) > 1:
    files[GENERATION_CONFIG] = generation_config(tokenizer)
  return files


def generation_config(tokenizer: Any) -> bytes:
  """generation_config.json with a tokenizer's ids."""
  return special_tokens.generation_config(
      tokenizer.bos_id, tokenizer.eos_ids,
      tokenizer.pad_id if tokenizer.pad_is_safe else None,
  )


def exported_files(
    tokenizer: Any, backend: FastBackend | SentencePieceBackend
) -> dict[str, bytes]:
  """The files of a `Tokenizer` for transformers, with the same ids."""
  if isinstance(backend, SentencePieceBackend):
    spec = json.loads(sentencepiece_export.to_fast(backend.proto))
  else:
    spec = json.loads(backend.serialized)
  if tokenizer.bos_id is not None:
    spec["post_processor"] = _with_start(
        spec["post_processor"], tokenizer.bos_token, tokenizer.bos_id
    )
  specials = {
      "eos": backend.piece(tokenizer.eos_id),
      "bos": tokenizer.bos_token,
      "unk": backend.unk_token,
  }
  serialized = json.dumps(spec, ensure_ascii=False)
  files = fast_files(serialized, specials, tokenizer)
  return files | {GENERATION_CONFIG: generation_config(tokenizer)}


def _with_start(
    found: dict[str, Any] | None, token: str, id_: int
) -> dict[str, Any]:
  """A post-processor that puts the start token before a text.

  The model has seen it there, whatever its tokenizer did elsewhere.
  """
  if json.dumps(token) in json.dumps(found):
    return found
  start = {"SpecialToken": {"id": token, "type_id": 0}}
  text = lambda name: {"Sequence": {"id": name, "type_id": 0}}
  added = {
      "type": "TemplateProcessing",
      "single": [start, text("A")],
      "pair": [start, text("A"), text("B")],
      "special_tokens": {token: {"id": token, "ids": [id_], "tokens": [token]}},
  }
  # transformers fills what is not there by one that does nothing.
  if not found or found.get("special_tokens") == {}:
    return added
  return {"type": "Sequence", "processors": [found, added]}
