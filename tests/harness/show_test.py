"""Rows for people: nothing is lost without colour, nothing added with it."""

import re

import numpy as np
import pytest

from experiments.harness import show
from rlhf_jax.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train_byte_level_bpe(["ab ab"], 262)
BOS, EOS, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id


def row(*segments, padding=2):
  """Of (text, target) segments, packed."""
  tokens, ids, marked = [], [], []
  for i, (text, target) in enumerate(segments, start=1):
    one = [BOS, *TOKENIZER.encode(text)]
    two = [*TOKENIZER.encode(target), EOS]
    tokens += one + two
    ids += [i] * (len(one) + len(two))
    marked += [0] * len(one) + [1] * len(two)
  return show.Row(
      "row 0",
      np.asarray(tokens + [PAD] * padding),
      np.asarray(ids + [0] * padding),
      np.asarray(marked + [0] * padding),
      num_records=len(segments),
  )


def lines(row, **fields):
  fields = {"color": False, "table": False} | fields
  return show.Painter(TOKENIZER, **fields).lines(row)


def test_text_without_colour_says_all():
  assert lines(row(("c\nd", "e"), ("f", "☃"))) == [
      "row 0",
      "  segment 1: columns 0-5, positions 0-5, 6 tokens, 2 marked",
      "    <bos>│c│⏎",
      "    │d│[[e│<eos>]]",
      "  segment 2: columns 6-11, positions 0-5, 6 tokens, 4 marked",
      r"    <bos>│f│[[\xe2│\x98│\x83│<eos>]]",
      "  (<pad> x 2)",
  ]


def test_colour_adds_colours_alone():
  shown = row(("c\nd", "e"), ("f", "g"))
  plain = re.sub(r"\[\[|\]\]", "", "\n".join(lines(shown)))
  colored = "\n".join(lines(shown, color=True))
  assert re.sub(r"\033\[[\d;]*m", "", colored) == plain
  # Every kind has a colour of its own, which ends with the line.
  codes = re.findall(r"\033\[([\d;]+)m(?:<bos>|e|\(<pad>)", colored)
  assert len(set(codes)) == 3
  for line in colored.split("\n"):
    assert line.count("\033[0m") * 2 == line.count("\033[")


def test_a_table_has_a_line_a_token():
  found = lines(row(("c", "e")), table=True)
  cells = [line.split() for line in found[3:-1]]
  assert cells == [
      ["0", "0", "1", str(BOS), "context", "<bos>"],
      ["1", "1", "1", str(TOKENIZER.encode("c")[0]), "context", "c"],
      ["2", "2", "1", str(TOKENIZER.encode("e")[0]), "marked", "e"],
      ["3", "3", "1", str(EOS), "marked", "<eos>"],
  ]


def test_left_padding_and_positions():
  shown = row(("c", "e"), padding=0)
  pad = lambda x, value: np.concatenate([np.full(3, value), x])
  padded = show.Row(
      "r", pad(shown.tokens, PAD), pad(shown.segment_ids, 0),
      pad(shown.marked, 0), num_records=1,
  )
  assert padded.positions.tolist() == [0, 0, 0, 0, 1, 2, 3]
  assert lines(padded)[1:3] == [
      "  (<pad> x 3)",
      "  segment 1: columns 3-6, positions 0-3, 4 tokens, 2 marked",
  ]


def test_padding_is_told_by_its_mask_and_not_by_its_id():
  shown = row(("c", "e"), padding=0)
  tokens = shown.tokens.copy()
  tokens[1] = PAD
  odd = show.Row("r", tokens, shown.segment_ids, shown.marked, num_records=1)
  assert lines(odd)[-1] == "    <bos>│<pad>│[[e│<eos>]]"


@pytest.mark.parametrize("num", [1, 2, 3])
def test_so_many_records_are_shown_and_the_others_counted(num):
  shown = row(("a", "b"), ("c", "d"))
  part = show.Part(
      "p", "train", iter([shown, shown]), "target", None, "limits"
  )
  painter = show.Painter(TOKENIZER, color=False, table=False)
  text = "\n".join(show.shown(part, painter, num))
  assert text.count("segment ") == num
  assert ("and 1 more in this row" in text) == (num % 2 == 1)
  assert text.count("row 0") == -(-num // 2)
