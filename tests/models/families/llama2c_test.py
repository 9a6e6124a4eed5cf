import struct

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from rlhf_jax.generation.decode import SamplingConfig, make_generate
from rlhf_jax.models.families.llama2c import load_llama2c
from rlhf_jax.models.heads import LanguageModel
from tests.reference import transformer as reference

# dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len
HEADER = (8, 12, 2, 2, 1, 11, 16)
BOS = 1


def _file(header=HEADER, seed=0) -> bytes:
  dim, hidden, layers, heads, kv_heads, vocab, length = header
  kv = dim // heads * kv_heads
  per_layer = 2 * dim + 2 * dim * dim + 2 * kv * dim + 3 * hidden * dim
  count = abs(vocab) * dim + layers * per_layer + dim + length * dim // heads
  count += abs(vocab) * dim if vocab < 0 else 0
  rng = np.random.default_rng(seed)
  values = 0.4 * rng.standard_normal(count)
  return struct.pack("<7i", *header) + values.astype("<f4").tobytes()


VALID = _file()


@pytest.mark.parametrize("vocab_size", [11, -11])
def test_logits_equal_reference_that_reads_the_raw_file(tmp_path, vocab_size):
  """Grouped heads, a tied and an own output head, rotary layout converted."""
  path = tmp_path / "model.bin"
  path.write_bytes(_file((*HEADER[:5], vocab_size, 16)))
  config, params = load_llama2c(path)
  assert config.tie_head == (vocab_size > 0)
  tokens = jnp.asarray([[1, 5, 3, 10, 0, 7, 7, 2]])
  logits, _ = jax.jit(LanguageModel(config).apply)({"params": params}, tokens)
  expected = reference.llama2c_forward(path, tokens[0])
  np.testing.assert_allclose(logits[0], expected, atol=1e-4)


def _refused(path, data, message):
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message) as info:
    load_llama2c(path)
  assert str(path) in str(info.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, -8, "field dim: -8 is not positive"),
        (1, 0, "field hidden_dim: 0 is not positive"),
        (2, -1, "field n_layers"),
        (3, 0, "field n_heads"),
        (4, -1, "field n_kv_heads"),
        (5, 0, "field vocab_size"),
        (6, -(2**31), "field seq_len"),
        (3, 3, "field dim: 8 is not a multiple of n_heads = 3"),
        (3, 8, "head_dim=1 must be even"),
        (4, 3, "num_heads=2 must be a multiple of num_kv_heads=3"),
        (2, 2**31 - 1, "the file is cut short or the header is wrong"),
        (5, 2**31 - 1, "tensor tok_embeddings .* header is wrong"),
        (6, 15, "bytes follow the last tensor"),
    ],
)
def test_bad_header_names_file_and_field(tmp_path, place, value, message):
  header = list(HEADER)
  header[place] = value
  data = struct.pack("<7i", *header) + VALID[28:]
  _refused(tmp_path / "model.bin", data, message)


@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(length=st.integers(0, len(VALID) - 1))
def test_file_cut_anywhere_is_refused(tmp_path, length):
  _refused(tmp_path / "cut.bin", VALID[:length], "header|cut short")


def test_trailing_bytes_and_nan_are_refused(tmp_path):
  path = tmp_path / "model.bin"
  _refused(path, VALID + b"\0" * 3, "3 bytes follow the last tensor")
  nan = struct.pack("<f", float("nan"))
  _refused(path, VALID[:28] + nan + VALID[32:], "tok_embeddings holds NaN")


@pytest.fixture(scope="module")
def stories(data_dir):
  folder = data_dir / "stories260K"
  if not folder.exists():
    pytest.skip(f"{folder} does not exist")
  return folder


def test_stories_logits_equal_float64_reference(stories):
  path = stories / "stories260K.bin"
  config, params = load_llama2c(path)
  tokens = np.random.default_rng(0).integers(3, 512, 48)
  tokens[0] = BOS
  logits, _ = jax.jit(LanguageModel(config).apply)(
      {"params": params}, jnp.asarray(tokens, jnp.int32)[None]
  )
  expected = reference.llama2c_forward(path, tokens)
  np.testing.assert_allclose(logits[0], expected, atol=1e-4)


def test_stories_greedy_text_equals_the_published_one(stories):
  config, params = load_llama2c(stories / "stories260K.bin")
  bos = jnp.full((1, 1), BOS, jnp.int32)
  rollout = jax.jit(make_generate(LanguageModel(config)))(
      params,
      bos,
      jnp.ones_like(bos),
      jax.random.key(0),
      SamplingConfig(max_new_tokens=256, eos_id=BOS, greedy=True),
  )
  tokenizer = sentencepiece.SentencePieceProcessor(
      str(stories / "tok512.model")
  )
  text = tokenizer.decode(np.asarray(rollout.completions[0]).tolist())
  published = (stories / "stories260K.md").read_text(encoding="utf-8")
  block = published.split("-t 0.0\n")[1].split("\n```")[0]
  assert len(block) > 500
  assert text == block
