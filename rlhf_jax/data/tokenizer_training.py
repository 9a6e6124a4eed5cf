"""Byte-level BPE from text."""

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"


def train_byte_level_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
) -> str:
  """tokenizer.json of a byte-level BPE: every text round-trips.

  Ids 0, 1, 2 are <pad>, <eos>, <bos>, then come other special tokens, the 256
  bytes and the merges. Digits stay single. The same texts give the same.

  Args:
    texts: what to learn the merges from.
    vocab_size: upper bound; with little text there are fewer merges.
    special_tokens: texts of further tokens, for a chat template.

  Raises:
    ValueError: vocab_size has no room for all bytes, or a special token is
      empty, there twice, or could be mistaken for text of another.
  """
  specials = [PAD, EOS, BOS, *special_tokens]
  _check_special(specials)
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
  return backend.to_str()


def _check_special(tokens: Sequence[str]) -> None:
  for token in tokens:
    if len(token) < 2 or token != token.strip() or "\0" in token:
      raise ValueError(
          f"special token {token!r}: it must have two or more characters, no"
          " NUL, and no white space at its ends."
      )
  twice = sorted({x for x in tokens if list(tokens).count(x) > 1})
  if twice:
    raise ValueError(f"special tokens {twice} are there twice.")
