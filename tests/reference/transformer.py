"""A transformer forward pass in float64 numpy, one document at a time.

Written for being read, not for speed: a loop over layers, heads and positions,
no masks, no padding, no cache. Two entries share nothing but the arithmetic:
`forward` walks our parameter tree and pairs halves in the rotation;
`llama2c_forward` walks the raw file and pairs neighbouring dimensions, as the
file's own program does.
"""

import math
import struct

import numpy as np


def forward(params, config, tokens):
  """Logits [T, V] of one unpadded document under LanguageModel params."""
  trunk = params["trunk"]
  table = _f64(trunk["token_embedding"])
  x = table[np.asarray(tokens)]
  if config.scale_embedding:
    x = x * math.sqrt(config.width)
  if config.position == "learned":
    x = x + _f64(trunk["position_embedding"])[: len(tokens)]
  for i in range(config.num_layers):
    layer = _take_layer(trunk["layers"], i)
    normed = _norm_at(layer, config, "attention_norm", x)
    attended = _attention(layer["attention"], config, normed, i)
    attended = _norm_at(layer, config, "attention_post_norm", attended)
    middle = x if config.parallel_residual else x + attended
    fed = _feed_forward(
        layer["feed_forward"],
        config,
        _norm_at(layer, config, "feed_forward_norm", middle),
    )
    x = x + attended + _norm_at(layer, config, "feed_forward_post_norm", fed)
  x = _norm(trunk["final_norm"], config, x)
  head = table.T if config.tie_head else _f64(params["head"]["kernel"])
  return _softcap(x @ head, config.logit_softcap)


def _softcap(x, cap):
  return cap * np.tanh(x / cap) if cap else x


def _norm_at(layer, config, name, x):
  """The norm of this name where `norm_placement` asks for it."""
  is_post = name.endswith("post_norm")
  wanted = {"pre": not is_post, "post": is_post, "pre_and_post": True}
  return _norm(layer[name], config, x) if wanted[config.norm_placement] else x


def _f64(x):
  return np.asarray(x, np.float64)


def _take_layer(tree, i):
  if isinstance(tree, dict):
    return {name: _take_layer(branch, i) for name, branch in tree.items()}
  return _f64(tree[i])


def _norm(params, config, x):
  out = np.empty_like(x)
  for t, row in enumerate(x):
    if config.norm == "layernorm":
      row = row - row.mean()
    out[t] = row / math.sqrt((row**2).mean() + config.norm_epsilon)
  scale = _f64(params["scale"]) + (1.0 if config.norm_from_one else 0.0)
  return out * scale + _f64(params.get("bias", 0.0))


def _attention(params, config, x, layer):
  def project(name, head):
    kernel = params[name]["kernel"][:, head]
    return x @ kernel + params[name].get("bias", np.zeros(kernel.shape))[head]

  def project_all(name, num_heads):
    heads = [project(name, head) for head in range(num_heads)]
    norm = params.get(f"{name}_norm")
    if config.qk_norm == "head":
      heads = [_norm(norm, config, x) for x in heads]
    if config.qk_norm == "whole":
      whole = _norm(norm, config, np.concatenate(heads, axis=1))
      heads = np.split(whole, num_heads, axis=1)
    return [_rotate_halves(x, config, layer) for x in heads]

  is_full = layer in config.full_attention_layers
  window = 0 if is_full else config.sliding_window
  queries = project_all("query", config.num_heads)
  keys = project_all("key", config.num_kv_heads)
  out = np.zeros_like(x)
  for head in range(config.num_heads):
    kv_head = head * config.num_kv_heads // config.num_heads
    attended = _causal_softmax_attention(
        queries[head],
        keys[kv_head],
        project("value", kv_head),
        window,
        1 / math.sqrt(config.query_scale_dim or config.head_dim),
        config.attention_softcap,
    )
    out += attended @ params["out"]["kernel"][head]
  return out + params["out"].get("bias", 0.0)


def _causal_softmax_attention(q, k, v, window=0, scale=None, cap=0.0):
  out = np.empty_like(v)
  scale = scale or 1 / math.sqrt(q.shape[1])
  for t in range(len(q)):
    first = max(0, t + 1 - window) if window else 0
    scores = [q[t] @ k[s] * scale for s in range(first, t + 1)]
    scores = _softcap(np.array(scores), cap)
    weights = np.exp(scores - max(scores))
    out[t] = (weights / weights.sum()) @ v[first : t + 1]
  return out


def _rotate_halves(x, config, layer):
  if config.position != "rotary":
    return x
  is_local = config.local_rope_theta and (
      layer not in config.full_attention_layers
  )
  theta = config.local_rope_theta if is_local else config.rope_theta
  scaling = None if is_local else config.rope_scaling
  dim = int(x.shape[1] * config.rotary_fraction)
  half = dim // 2
  out = x.copy()
  for t in range(len(x)):
    for i in range(half):
      plain = theta ** (-2 * i / dim)
      angle = t * _frequency(plain, config, scaling, i, dim)
      z = complex(x[t, i], x[t, i + half]) * np.exp(1j * angle)
      if scaling:
        z *= scaling.attention_factor
      out[t, i], out[t, i + half] = z.real, z.imag
  return out


def _frequency(frequency, config, scaling, i, dim):
  """By wavelength and case by case, as the released Llama 3.1 code does it."""
  if scaling is None:
    return frequency
  if scaling.kind == "linear":
    return frequency / scaling.factor
  if scaling.kind == "yarn":
    return _yarn_frequency(frequency, config, i, dim)
  wavelength = 2 * math.pi / frequency
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  if wavelength < scaling.original_length / high:
    return frequency
  if wavelength > scaling.original_length / low:
    return frequency / scaling.factor
  smooth = (scaling.original_length / wavelength - low) / (high - low)
  return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def _yarn_frequency(frequency, config, i, dim):
  """arXiv 2309.00071, section 3.2, in dimensions as its code has it."""
  scaling = config.rope_scaling

  def where(turns):
    # The i at which original_length * theta^(-2 i / dim) / (2 pi) = turns.
    ratio = scaling.original_length / (2 * math.pi * turns)
    return dim / 2 * math.log(ratio, config.rope_theta)

  first = max(math.floor(where(scaling.high_frequency_factor)), 0)
  last = min(math.ceil(where(scaling.low_frequency_factor)), dim - 1)
  ramp = min(max((i - first) / (last - first), 0), 1)
  return ramp * frequency / scaling.factor + (1 - ramp) * frequency


def _rotate_neighbours(x, theta):
  length, dim = x.shape
  out = np.empty_like(x)
  for t in range(length):
    for i in range(0, dim, 2):
      angle = t * theta ** (-i / dim)
      z = complex(x[t, i], x[t, i + 1]) * np.exp(1j * angle)
      out[t, i], out[t, i + 1] = z.real, z.imag
  return out


def _silu(x):
  return x / (1 + np.exp(-x))


def _feed_forward(params, config, x):
  if not config.num_experts:
    return _one_feed_forward(params, config, x)
  logits = x @ params["router"]["kernel"]
  out = np.zeros_like(x)
  for t, row in enumerate(logits):
    best = np.argsort(-row)[: config.experts_per_token]
    weights = np.exp(row[best] - row.max())
    for expert, weight in zip(best, weights / weights.sum()):
      mine = _take_layer(params["experts"], expert)
      out[t] += weight * _one_feed_forward(mine, config, x[t : t + 1])[0]
  return out


def _one_feed_forward(params, config, x):
  def linear(name, x):
    return x @ params[name]["kernel"] + params[name].get("bias", 0.0)

  up = linear("up", x)
  if config.activation == "swiglu":
    return linear("down", _silu(linear("gate", x)) * up)
  if config.activation == "geglu":
    return linear("down", _gelu_tanh(linear("gate", x)) * up)
  if config.activation == "relu":
    return linear("down", np.maximum(up, 0))
  if config.activation == "gelu_exact":
    erf = np.vectorize(math.erf)
    return linear("down", up * 0.5 * (1 + erf(up / math.sqrt(2))))
  return linear("down", _gelu_tanh(up))


def _gelu_tanh(x):
  inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
  return 0.5 * x * (1 + np.tanh(inner))


def llama2c_forward(path, tokens):
  """Logits [T, V] straight from a llama2.c v0 file."""
  with open(path, "rb") as file:
    header = struct.unpack("<7i", file.read(28))
    flat = np.frombuffer(file.read(), "<f4").astype(np.float64)
  dim, hidden, layers, heads, kv_heads, vocab, length = header
  tied, vocab = vocab > 0, abs(vocab)
  size = dim // heads
  kv = size * kv_heads
  taken = 0

  def take(*shape):
    nonlocal taken
    taken += math.prod(shape)
    return flat[taken - math.prod(shape) : taken].reshape(shape)

  embedding = take(vocab, dim)
  attention_norm = take(layers, dim)
  wq, wk = take(layers, dim, dim), take(layers, kv, dim)
  wv, wo = take(layers, kv, dim), take(layers, dim, dim)
  ffn_norm = take(layers, dim)
  w1, w2 = take(layers, hidden, dim), take(layers, dim, hidden)
  w3, final_norm = take(layers, hidden, dim), take(dim)
  take(2, length, size // 2)
  output = embedding if tied else take(vocab, dim)

  def norm(weight, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight

  x = embedding[np.asarray(tokens)]
  for i in range(layers):
    h = norm(attention_norm[i], x)
    q, k, v = h @ wq[i].T, h @ wk[i].T, h @ wv[i].T
    mixed = np.empty_like(q)
    for head in range(heads):
      mine = slice(head * size, (head + 1) * size)
      shared = head // (heads // kv_heads)
      theirs = slice(shared * size, (shared + 1) * size)
      mixed[:, mine] = _causal_softmax_attention(
          _rotate_neighbours(q[:, mine], 10000.0),
          _rotate_neighbours(k[:, theirs], 10000.0),
          v[:, theirs],
      )
    x = x + mixed @ wo[i].T
    h = norm(ffn_norm[i], x)
    x = x + (_silu(h @ w1[i].T) * (h @ w3[i].T)) @ w2[i].T
  return norm(final_norm, x) @ output.T
