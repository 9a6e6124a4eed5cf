"""Naive oracles of the losses: float64 loops over ragged rows, no masks.

A row is a list of the real entries alone. Whoever compares a padded and masked
computation with these cuts the padding off first.
"""

import itertools
import math

import numpy as np


def mean(rows):
  entries = [x for row in rows for x in row]
  return sum(entries) / len(entries) if entries else 0.0


def var(rows):
  center = mean(rows)
  return mean([[(x - center) ** 2 for x in row] for row in rows])


def whiten(rows, shift_mean, epsilon):
  center, scale = mean(rows), 1 / math.sqrt(var(rows) + epsilon)
  back = 0.0 if shift_mean else center
  return [[(x - center) * scale + back for x in row] for row in rows]


def log_softmax(logits):
  logits = [float(x) for x in logits]
  largest = max(logits)
  normalizer = largest + math.log(sum(math.exp(x - largest) for x in logits))
  return [x - normalizer for x in logits]


def token_logprobs(logits, tokens, temperature=1.0):
  """One row: logits [n][V], tokens [n] -> n - 1 log-probabilities."""
  out = []
  for i in range(len(tokens) - 1):
    scaled = [float(x) / temperature for x in logits[i]]
    out.append(log_softmax(scaled)[int(tokens[i + 1])])
  return out


def log_normalizer(logits):
  largest = max(float(x) for x in logits)
  return largest + math.log(sum(math.exp(float(x) - largest) for x in logits))


def entropy(logits, temperature=1.0):
  logprobs = log_softmax([float(x) / temperature for x in logits])
  return -sum(math.exp(lp) * lp for lp in logprobs)


def kl_exact(logits, ref_logits, temperature=1.0):
  p = log_softmax([float(x) / temperature for x in logits])
  q = log_softmax([float(x) / temperature for x in ref_logits])
  return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def kl_k1(logprob, ref_logprob):
  return logprob - ref_logprob


def kl_k2(logprob, ref_logprob):
  return (logprob - ref_logprob) ** 2 / 2


def kl_k3(logprob, ref_logprob):
  ratio = math.exp(ref_logprob - logprob)
  return ratio - 1 - math.log(ratio)


def adaptive_kl_coef(kl_coef, kl, target, horizon, num_episodes):
  error = kl / target - 1
  if error > 0.2:
    error = 0.2
  if error < -0.2:
    error = -0.2
  return kl_coef + kl_coef * error * num_episodes / horizon


def clipped_surrogate(logprob, old_logprob, advantage, cliprange):
  ratio = math.exp(logprob - old_logprob)
  if advantage >= 0:
    return -min(ratio, 1 + cliprange) * advantage
  return -max(ratio, 1 - cliprange) * advantage


def clipped_value(value, old_value, target, cliprange):
  clipped = min(max(value, old_value - cliprange), old_value + cliprange)
  return max((value - target) ** 2, (clipped - target) ** 2) / 2


def discounted_returns(rewards, gamma):
  """One row, by the definition: quadratic in its length."""
  return [
      sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards)))
      for t in range(len(rewards))
  ]


def gae(rewards, values, gamma, gae_lambda):
  """One row, by the definition: the weighted sum of later TD errors."""
  n = len(rewards)
  deltas = []
  for t in range(n):
    next_value = values[t + 1] if t + 1 < n else 0.0
    deltas.append(rewards[t] + gamma * next_value - values[t])
  advantages = [
      sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, n))
      for t in range(n)
  ]
  returns = [a + v for a, v in zip(advantages, values, strict=True)]
  return advantages, returns


def bradley_terry(chosen, rejected, margin=0.0, label_smoothing=0.0):
  right = 1 / (1 + math.exp(-(chosen - rejected - margin)))
  return -(
      (1 - label_smoothing) * math.log(right)
      + label_smoothing * math.log(1 - right)
  )


def pairwise_ranking(scores, ranks):
  losses = []
  for i, j in itertools.permutations(range(len(scores)), 2):
    if ranks[i] < ranks[j]:
      losses.append(bradley_terry(scores[i], scores[j]))
  return float(np.mean(losses)) if losses else 0.0


def plackett_luce(scores, ranks):
  """Chooses the best, strikes it out, chooses again; ties as Breslow's."""
  loss = 0.0
  for rank in sorted(set(ranks)):
    left = [s for s, r in zip(scores, ranks, strict=True) if r >= rank]
    for score, r in zip(scores, ranks, strict=True):
      if r == rank:
        loss += math.log(sum(math.exp(s) for s in left)) - score
  return loss


def best_of_k(scores, ranks):
  """-log of the softmax's mass on the best ranked."""
  if not len(ranks):
    return 0.0
  logprobs = log_softmax(scores)
  best = [p for p, r in zip(logprobs, ranks, strict=True) if r == min(ranks)]
  return -math.log(sum(math.exp(p) for p in best))
