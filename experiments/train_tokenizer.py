"""Trains a byte-level BPE tokenizer on text.

    python -m experiments.train_tokenizer --config=configs/train_tokenizer.py \
        --workdir=DIR

  1. Reads documents: of the embedded domain, text, or JSONL.
  2. Learns the merges; the same documents give the same tokenizer, bitwise.
  3. Says how many bytes a token holds, on documents that it has not seen.
  4. Leaves DIR/tokenizer, which `tokenizer.path=DIR` of pretraining takes.
"""

from collections.abc import Iterator
import dataclasses
import sys

from absl import logging
import tqdm

from experiments.harness import checks, cli, sources, stage
from rlhf_jax.data import chat
from rlhf_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """vocab_size: an upper bound, all special tokens and bytes included.

  special_tokens: texts of tokens beside <pad>, <eos> and <bos>.
  chat_template: a .jinja file or a Jinja string that travels along, '' for
    none.
  """

  seed: int
  documents: sources.SourceConfig
  heldout_documents: sources.SourceConfig
  vocab_size: int
  special_tokens: tuple[str, ...]
  chat_template: str

  def __post_init__(self):
    checks.check_ranges(self, "", {"seed": "seed", "vocab_size": ">= 1"})
    if self.chat_template:
      try:
        chat.make_template(self.chat_template)
      except chat.ChatTemplateError as error:
        raise ValueError(f"chat_template: {error}") from error


def run(config: Config, workdir: str) -> None:
  """Trains the tokenizer, unless it is there."""
  out = stage.Stage(workdir, config)
  if out.finished:
    return
  reader = sources.Reader(config.seed, out.dir / "skipped")
  documents = reader.documents(config.documents, "train")
  heldout = reader.documents(config.heldout_documents, "heldout")
  tokenizer = train(config, documents)
  tokenizer.save(out.dir / "tokenizer")
  summary = {
      "vocab_size": tokenizer.vocab_size,
      "bytes_per_token": bytes_per_token(tokenizer, documents),
      "heldout_bytes_per_token": bytes_per_token(tokenizer, heldout),
  }
  if tokenizer.vocab_size < config.vocab_size:
    logging.warning(
        "train_tokenizer: there is text for %d tokens only; give "
        "model.vocab_size=%d to pretraining",
        tokenizer.vocab_size,
        tokenizer.vocab_size,
    )
  logging.info("train_tokenizer: %s", summary)
  out.finish(summary)


def train(config: Config, documents: list[str]) -> Tokenizer:
  """The tokenizer of a config.

  Raises:
    cli.UserError: vocab_size or special_tokens cannot be.
  """
  template = chat.find(config.chat_template) if config.chat_template else None
  try:
    return Tokenizer.train_byte_level_bpe(
        _shown(documents), config.vocab_size, config.special_tokens, template
    )
  except ValueError as error:
    raise cli.UserError(f"train_tokenizer: {error}") from error


def bytes_per_token(tokenizer: Tokenizer, documents: list[str]) -> float:
  """Bytes of text a token stands for, end tokens left out."""
  num_bytes = sum(len(text.encode()) for text in documents)
  return num_bytes / sum(map(len, tokenizer.encode_batch(documents)))


def _shown(documents: list[str]) -> Iterator[str]:
  """The documents, with a bar of how many were read in a terminal."""
  return tqdm.tqdm(
      documents,
      desc="documents",
      disable=not sys.stderr.isatty(),
  )


if __name__ == "__main__":
  cli.launch(Config, run)
