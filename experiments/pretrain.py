"""Pretrains a language model on plain text.

    python -m experiments.pretrain --config=configs/pretrain.py --workdir=DIR

  1. Reads the documents, trains or loads the tokenizer.
  2. Packs the documents into rows: none attends to another.
  3. Trains on every token; evaluates on held-out documents, samples
     completions of fixed prompts.
  4. Leaves DIR/model and DIR/tokenizer for the next stage.
"""

import dataclasses
import pathlib

from absl import logging
import jax

from experiments.harness import cli, language_model, models, sources, stage
from experiments.harness.config import ConfigError
from rlhf_jax.data import encoding
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.models import functions
from rlhf_jax.models.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
  """Which tokenizer.

  path: a stage's folder, such as experiments.train_tokenizer leaves; a folder
    in Hugging Face's layout; or a sentencepiece file. '' trains a byte-level
    BPE of vocab_size on the documents.
  """

  path: str
  vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """model.vocab_size must be the tokenizer's."""

  documents: sources.SourceConfig
  heldout_documents: sources.SourceConfig
  tokenizer: TokenizerConfig
  model: TransformerConfig
  train: language_model.LanguageModelConfig

  def __post_init__(self):
    if not self.tokenizer.path and (
        self.tokenizer.vocab_size != self.model.vocab_size
    ):
      raise ValueError(
          f"tokenizer.vocab_size={self.tokenizer.vocab_size} and "
          f"model.vocab_size={self.model.vocab_size} must be equal"
      )


def run(config: Config, workdir: str) -> None:
  """Runs the stage, or what is left of it."""
  out = stage.Stage(workdir, config)
  if out.finished:
    return
  reader = sources.Reader(config.train.seed, out.dir / "skipped")
  tokenizer, examples, _ = make_examples(config, reader)
  params = jax.jit(functions.init_language_model, static_argnums=1)(
      jax.random.key(config.train.seed), config.model
  )
  policy = models.Policy(config.model, params, tokenizer)
  language_model.train("pretrain", out, config.train, policy, examples)


def make_examples(config: Config, reader: sources.Reader):
  """What the stage learns from and is measured on.

  Returns:
    The tokenizer; and by split, the examples to pack and their LengthReport.
  """
  documents = reader.documents(config.documents, "train")
  tokenizer = make_tokenizer(config.tokenizer, documents)
  if tokenizer.vocab_size != config.model.vocab_size:
    raise ConfigError(
        f"the tokenizer has {tokenizer.vocab_size} tokens, and "
        f"model.vocab_size is {config.model.vocab_size}"
    )
  examples, reports = {}, {}
  for split, texts in (
      ("train", documents),
      ("heldout", reader.documents(config.heldout_documents, "heldout")),
  ):
    examples[split], reports[split] = encoding.encode_documents(
        texts, tokenizer, max_length=config.train.seq_len, policy="split"
    )
    logging.info("pretrain: %s documents: %s", split, reports[split])
  return tokenizer, examples, reports


def make_tokenizer(cfg: TokenizerConfig, documents: list[str]) -> Tokenizer:
  """Loads or trains it."""
  if not cfg.path:
    return Tokenizer.train_byte_level_bpe(documents, cfg.vocab_size)
  path = models.expand(cfg.path)
  if path.endswith(".model"):
    return Tokenizer.from_sentencepiece(path)
  if (pathlib.Path(path) / "tokenizer").is_dir():
    return models.load_tokenizer(path)
  return Tokenizer.from_pretrained_folder(path)


if __name__ == "__main__":
  cli.launch(Config, run)
