"""Reads a llama2.c checkpoint (the v0 `.bin` format) into our parameters.

The file: seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads,
vocab_size, seq_len), then float32 tensors in the order of `_layout`. A negative
vocab_size says that the output head is not tied to the embedding; its tensor
then ends the file. Two rotary tables before it are redundant and skipped.

Its rotary positions pair neighbouring dimensions; ours pair halves, so the
output dimensions of the query and key kernels are permuted on the way in.

Reference: github.com/karpathy/llama2.c, `export.py` (legacy_export).
"""

import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models.transformer import TransformerConfig

_HEADER = (
    "dim hidden_dim n_layers n_heads n_kv_heads vocab_size seq_len".split()
)
_NORM_EPSILON = 1e-5
_ROPE_THETA = 10000.0


def load_llama2c(
    path: str | os.PathLike,
) -> tuple[TransformerConfig, dict[str, Any]]:
  """(config, LanguageModel params) of a llama2.c v0 file.

  Raises:
    ValueError: naming the file and the header field or tensor that is wrong.
  """
  path = pathlib.Path(path)
  data = path.read_bytes()
  config = _read_config(path, data)
  tensors = _read_tensors(path, data, config)
  params = jax.tree.map(jnp.asarray, _convert(tensors, config))
  return config, params


def _read_config(path: pathlib.Path, data: bytes) -> TransformerConfig:
  size = 4 * len(_HEADER)
  if len(data) < size:
    raise ValueError(
        f"{path}: header: expected {size} bytes, the file has {len(data)}; "
        "this is not a llama2.c v0 checkpoint"
    )
  values = (int(v) for v in np.frombuffer(data, "<i4", len(_HEADER)))
  header = dict(zip(_HEADER, values, strict=True))
  tie_head = header["vocab_size"] > 0
  header["vocab_size"] = abs(header["vocab_size"])
  for name, value in header.items():
    if value <= 0:
      raise ValueError(f"{path}: header field {name}: {value} is not positive")
  if header["dim"] % header["n_heads"]:
    raise ValueError(
        f"{path}: header field dim: {header['dim']} is not a multiple of "
        f"n_heads = {header['n_heads']}"
    )
  try:
    return TransformerConfig(
        vocab_size=header["vocab_size"],
        num_layers=header["n_layers"],
        width=header["dim"],
        num_heads=header["n_heads"],
        num_kv_heads=header["n_kv_heads"],
        head_dim=header["dim"] // header["n_heads"],
        ff_dim=header["hidden_dim"],
        max_length=header["seq_len"],
        tie_head=tie_head,
        norm_epsilon=_NORM_EPSILON,
        rope_theta=_ROPE_THETA,
    )
  except ValueError as error:
    raise ValueError(f"{path}: header: {error}") from error


def _layout(cfg: TransformerConfig) -> dict[str, tuple[int, ...]]:
  """Tensors in file order; matrices are [out, in], as torch stores them."""
  layers, width, ff = cfg.num_layers, cfg.width, cfg.ff_dim
  kv = cfg.num_kv_heads * cfg.head_dim
  table = (cfg.max_length, cfg.head_dim // 2)
  layout = {
      "tok_embeddings": (cfg.vocab_size, width),
      "attention_norm": (layers, width),
      "wq": (layers, width, width),
      "wk": (layers, kv, width),
      "wv": (layers, kv, width),
      "wo": (layers, width, width),
      "ffn_norm": (layers, width),
      "w1": (layers, ff, width),
      "w2": (layers, width, ff),
      "w3": (layers, ff, width),
      "norm": (width,),
      "freqs_cos": table,
      "freqs_sin": table,
  }
  if not cfg.tie_head:
    layout["output"] = (cfg.vocab_size, width)
  return layout


def _read_tensors(
    path: pathlib.Path, data: bytes, cfg: TransformerConfig
) -> dict[str, np.ndarray]:
  offset = 4 * len(_HEADER)
  tensors = {}
  for name, shape in _layout(cfg).items():
    count = math.prod(shape)
    if offset + 4 * count > len(data):
      raise ValueError(
          f"{path}: tensor {name} {list(shape)}: the file ends at byte "
          f"{len(data)}, the tensor at {offset + 4 * count}; the file is cut "
          "short or the header is wrong"
      )
    tensors[name] = np.frombuffer(data, "<f4", count, offset).reshape(shape)
    if not np.isfinite(tensors[name]).all():
      raise ValueError(f"{path}: tensor {name} holds NaN or Inf")
    offset += 4 * count
  if offset != len(data):
    raise ValueError(
        f"{path}: {len(data) - offset} bytes follow the last tensor; the "
        "header is wrong or this is another version of the format"
    )
  return tensors


def _convert(
    tensors: dict[str, np.ndarray], cfg: TransformerConfig
) -> dict[str, Any]:
  def kernel(name: str) -> dict[str, np.ndarray]:
    return {"kernel": np.swapaxes(tensors[name], 1, 2)}

  def heads(name: str, num_heads: int, rotary: bool) -> dict[str, np.ndarray]:
    # [L, D, heads, K]
    shape = (cfg.num_layers, cfg.width, num_heads, cfg.head_dim)
    split = kernel(name)["kernel"].reshape(shape)
    return {"kernel": split[..., _halves(cfg.head_dim)] if rotary else split}

  out_shape = (cfg.num_layers, cfg.num_heads, cfg.head_dim, cfg.width)
  layers = {
      "attention_norm": {"scale": tensors["attention_norm"]},
      "attention": {
          "query": heads("wq", cfg.num_heads, rotary=True),
          "key": heads("wk", cfg.num_kv_heads, rotary=True),
          "value": heads("wv", cfg.num_kv_heads, rotary=False),
          "out": {"kernel": kernel("wo")["kernel"].reshape(out_shape)},
      },
      "feed_forward_norm": {"scale": tensors["ffn_norm"]},
      "feed_forward": {
          "gate": kernel("w1"),
          "down": kernel("w2"),
          "up": kernel("w3"),
      },
  }
  trunk = {
      "token_embedding": tensors["tok_embeddings"],
      "layers": layers,
      "final_norm": {"scale": tensors["norm"]},
  }
  if cfg.tie_head:
    return {"trunk": trunk}
  return {"trunk": trunk, "head": {"kernel": tensors["output"].T}}


def _halves(head_dim: int) -> np.ndarray:
  """Where each of our dimensions stands in the neighbouring-pairs layout."""
  return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
