import hypothesis
from hypothesis.extra import numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.evaluation import policy_kl
from rlhf_jax.models.functions import LanguageModelFns
from rlhf_jax.types import Rollout
from tests.reference import losses as reference

B, P, C, V = 3, 2, 4, 5


def hidden(table, tokens, segment_ids, last):
  """A model that is a table of logits before each completion token."""
  assert tokens.shape == segment_ids.shape == (B, P + C)
  assert last == C + 1
  return table


MODEL = LanguageModelFns(hidden, lambda _: lambda logits: logits, chunk_size=2)
episode_kl = jax.jit(policy_kl.make_episode_kl(MODEL, MODEL))
tables = hnp.arrays(
    np.float32, (B, C + 1, V), elements=st.floats(-4, 4, width=32)
)


def make_rollout(lengths):
  mask = np.arange(C)[None] < np.asarray(lengths)[:, None]
  zeros = jnp.zeros((B, C), jnp.int32)
  return Rollout(
      prompts=zeros[:, :P],
      prompt_mask=jnp.ones((B, P), jnp.int32),
      completions=zeros,
      completion_mask=jnp.asarray(mask, jnp.int32),
      logprobs=jnp.zeros((B, C), jnp.float32),
      ended=jnp.ones((B,), bool),
  )


@hypothesis.given(
    table=tables,
    ref_table=tables,
    lengths=st.tuples(*[st.integers(0, C)] * B),
    junk=st.sampled_from([float("nan"), float("inf"), 3e38]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_kl_of_an_episode_matches_a_loop_over_its_real_tokens(
    table, ref_table, lengths, junk, temperature
):
  expected = [
      sum(
          reference.kl_exact(table[row, t], ref_table[row, t], temperature)
          for t in range(n)
      )
      for row, n in enumerate(lengths)
  ]
  for row, n in enumerate(lengths):
    table[row, n:] = junk
  actual = episode_kl(
      jnp.asarray(table),
      jnp.asarray(ref_table),
      make_rollout(lengths),
      jnp.float32(temperature),
  )
  np.testing.assert_allclose(actual, expected, atol=5e-5)
