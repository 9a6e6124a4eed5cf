"""A sentencepiece model as tokenizer.json, which transformers reads.

transformers can read a sentencepiece file too, but then goes by the model's
class and not by the file: it leaves out the space before the first word, say.
"""

import base64
import json
from typing import Any

_SPACE = "▁"


def to_fast(proto: bytes) -> str:
  """tokenizer.json of a BPE or unigram model, with `Tokenizer`'s own rules.

  White space is kept as it stands, as `Tokenizer` keeps it. Text that spells a
  control token ("</s>") becomes it, as transformers has it anyway.

  Raises:
    ValueError: the model is of another type.
  """
  # Here and not above: it needs protobuf, and nothing else here does.
  from sentencepiece import sentencepiece_model_pb2

  model = sentencepiece_model_pb2.ModelProto.FromString(proto)
  types = model.SentencePiece
  special = [
      {
          "id": i, "content": piece.piece, "single_word": False,
          "lstrip": False, "rstrip": False, "normalized": False,
          "special": piece.type != types.USER_DEFINED,
      }
      for i, piece in enumerate(model.pieces)
      if piece.type in (types.CONTROL, types.UNKNOWN, types.USER_DEFINED)
  ]
  has_prefix = model.normalizer_spec.add_dummy_prefix
  return json.dumps({
      "version": "1.0",
      "truncation": None,
      "padding": None,
      "added_tokens": special,
      "normalizer": _normalizer(model, has_prefix),
      "pre_tokenizer": None,
      "post_processor": None,
      "decoder": _decoder(has_prefix),
      "model": _model(model),
  }, ensure_ascii=False)


def _model(model: Any) -> dict[str, Any]:
  spec, types = model.trainer_spec, model.SentencePiece
  pieces = [(piece.piece, piece.score) for piece in model.pieces]
  unk_id = next(
      i for i, x in enumerate(model.pieces) if x.type == types.UNKNOWN
  )
  has_bytes = any(x.type == types.BYTE for x in model.pieces)
  if spec.model_type == spec.UNIGRAM:
    return {
        "type": "Unigram", "unk_id": unk_id, "byte_fallback": has_bytes,
        "vocab": [list(x) for x in pieces],
    }
  if spec.model_type != spec.BPE:
    raise ValueError("only BPE and unigram models of sentencepiece can be read")
  score = {
      x.piece: x.score for x in model.pieces if x.type == types.NORMAL
  }
  merges = [
      (-score[piece], piece[:i], piece[i:])
      for piece in score
      for i in range(1, len(piece))
      if piece[:i] in score and piece[i:] in score
  ]
  # The best piece is merged first, from whichever two parts come up.
  merges.sort(key=lambda x: x[0])
  return {
      "type": "BPE", "dropout": None, "unk_token": pieces[unk_id][0],
      "continuing_subword_prefix": None, "end_of_word_suffix": None,
      "fuse_unk": True, "byte_fallback": has_bytes, "ignore_merges": False,
      "vocab": {piece: i for i, (piece, _) in enumerate(pieces)},
      "merges": [[left, right] for _, left, right in merges],
  }


def _normalizer(model: Any, has_prefix: bool) -> dict[str, Any]:
  rules = []
  if charsmap := model.normalizer_spec.precompiled_charsmap:
    rules.append({
        "type": "Precompiled",
        "precompiled_charsmap": base64.b64encode(charsmap).decode(),
    })
  if has_prefix:
    rules.append({"type": "Prepend", "prepend": _SPACE})
  rules.append(
      {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
  )
  return {"type": "Sequence", "normalizers": rules}


def _decoder(has_prefix: bool) -> dict[str, Any]:
  rules = [
      {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
      {"type": "ByteFallback"},
      {"type": "Fuse"},
  ]
  if has_prefix:
    rules.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
  return {"type": "Sequence", "decoders": rules}
