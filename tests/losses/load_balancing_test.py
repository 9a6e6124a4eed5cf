import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.load_balancing import load_balancing_loss

L, B, T, E = 3, 2, 5, 4


def random_router(seed=0):
  rng = np.random.default_rng(seed)
  logits = 2 * rng.standard_normal((L, B, T, E)).astype(np.float32)
  mask = rng.integers(0, 2, (B, T))
  mask[0, 0] = 1
  return logits, mask


def naive(logits, mask, k):
  """Token by token, as the equations say it."""
  num, share, probability = 0, np.zeros(E), np.zeros(E)
  for layer in logits.astype(np.float64):
    for row, row_mask in zip(layer, mask):
      for token, real in zip(row, row_mask):
        if not real:
          continue
        num += 1
        probs = np.exp(token) / np.exp(token).sum()
        probability += probs
        for expert in np.argsort(-probs)[:k]:
          share[expert] += 1
  return E * np.sum(share / num * probability / num)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_loss_is_that_of_a_loop_and_padding_may_hold_anything(k):
  logits, mask = random_router()
  probs = jax.nn.softmax(jnp.asarray(logits))
  every = jnp.broadcast_to(jnp.asarray(mask), (L, B, T))
  junk = jnp.where(every[..., None] == 1, probs, jnp.nan)
  loss = load_balancing_loss(junk, every, experts_per_token=k)
  np.testing.assert_allclose(loss, naive(logits, mask, k), rtol=1e-5)


def test_loss_is_that_of_transformers():
  torch = pytest.importorskip("torch")
  from transformers.models.mixtral import modeling_mixtral

  logits, mask = random_router(1)
  theirs = modeling_mixtral.load_balancing_loss_func(
      tuple(torch.as_tensor(x.reshape(B * T, E)) for x in logits),
      num_experts=E,
      top_k=2,
      attention_mask=torch.as_tensor(mask),
  )
  ours = load_balancing_loss(
      jax.nn.softmax(jnp.asarray(logits)),
      jnp.broadcast_to(jnp.asarray(mask), (L, B, T)),
      experts_per_token=2,
  )
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def test_a_step_down_the_gradient_spreads_tokens_more_evenly():
  logits, _ = random_router(2)
  mask = jnp.ones((L, B, T))

  def loss(x):
    probs = jax.nn.softmax(x)
    return load_balancing_loss(probs, mask, experts_per_token=1)

  # All tokens lean to the first expert.
  x = 0.1 * jnp.asarray(logits) + 2.0 * jax.nn.one_hot(0, E)[None, None, None]
  start = loss(x)
  for _ in range(50):
    x = x - 10.0 * jax.grad(loss)(x)
  assert start > 2.0 and loss(x) < 1.2
