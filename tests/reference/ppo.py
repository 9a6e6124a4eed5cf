"""Naive oracle of PPO on tables: float64 loops over the real tokens alone.

`policy` and `ref_policy` are logits [B][C + 1][V], `value` is [B][C + 1].
Gradients are central differences, so that nothing is derived by hand.
"""

import math

import numpy as np

from tests.reference import losses


def _per_token(policy, rollout, temperature):
  """One list a row of (scaled logits, sampled token)."""
  rows = []
  lengths = np.asarray(rollout.completion_mask).sum(axis=1)
  for r, tokens in enumerate(np.asarray(rollout.completions)):
    rows.append([
        ([float(x) / temperature for x in policy[r][t]], int(tokens[t]))
        for t in range(lengths[r])
    ])
  return rows


def logprobs(policy, rollout, temperature):
  return [
      [losses.log_softmax(logits)[token] for logits, token in row]
      for row in _per_token(policy, rollout, temperature)
  ]


def entropies(policy, rollout, temperature):
  return [
      [losses.entropy(logits) for logits, _ in row]
      for row in _per_token(policy, rollout, temperature)
  ]


def kls(policy, ref_policy, rollout, temperature):
  """name of the estimator -> rows."""
  new = logprobs(policy, rollout, temperature)
  ref = logprobs(ref_policy, rollout, temperature)
  pairs = [list(zip(a, b, strict=True)) for a, b in zip(new, ref, strict=True)]
  exact = []
  for p_row, q_row in zip(
      _per_token(policy, rollout, temperature),
      _per_token(ref_policy, rollout, temperature),
      strict=True,
  ):
    exact.append([
        losses.kl_exact(p, q)
        for (p, _), (q, _) in zip(p_row, q_row, strict=True)
    ])
  return {
      "k1": [[losses.kl_k1(a, b) for a, b in row] for row in pairs],
      "k2": [[losses.kl_k2(a, b) for a, b in row] for row in pairs],
      "k3": [[losses.kl_k3(a, b) for a, b in row] for row in pairs],
      "exact": exact,
  }


def score_rollout(policy, value, ref_policy, rollout, score, kl_coef, cfg):
  """(name -> rows of the scored rollout, name -> metric)."""
  all_kls = kls(policy, ref_policy, rollout, cfg.temperature)
  new = logprobs(policy, rollout, cfg.temperature)
  kl = all_kls[cfg.kl_estimator]
  values = [list(map(float, v[: len(row)])) for v, row in zip(value, new)]
  final = [
      float(cfg.missing_eos_score)
      if cfg.replace_missing_eos and not ended
      else float(s)
      for s, ended in zip(score, np.asarray(rollout.ended), strict=True)
  ]
  rewards = []
  for row, s in zip(kl, final, strict=True):
    rewards.append([-kl_coef * x for x in row])
    rewards[-1][-1] += s
  reward_sum = float(np.mean([sum(row) for row in rewards]))
  if cfg.whiten_rewards:
    rewards = losses.whiten(rewards, shift_mean=False, epsilon=1e-8)
  pairs = [
      losses.gae(r, v, cfg.gamma, cfg.gae_lambda)
      for r, v in zip(rewards, values, strict=True)
  ]
  advantages, returns = (list(x) for x in zip(*pairs, strict=True))
  residual = losses.var(advantages) / losses.var(returns)
  if cfg.whiten_advantages:
    advantages = losses.whiten(advantages, shift_mean=True, epsilon=1e-8)
  scored = {
      "score": final,
      "old_logprobs": new,
      "ref_logprobs": logprobs(ref_policy, rollout, cfg.temperature),
      "values": values,
      "kl": kl,
      "rewards": rewards,
      "advantages": advantages,
      "returns": returns,
  }
  per_episode = lambda rows: float(np.mean([sum(row) for row in rows]))
  metrics = {
      "ppo/score": float(np.mean(score)),
      "ppo/score_after_eos_rule": float(np.mean(final)),
      "ppo/reward_sum": reward_sum,
      "ppo/kl": per_episode(kl),
      "ppo/kl_k1": per_episode(all_kls["k1"]),
      "ppo/kl_k2": per_episode(all_kls["k2"]),
      "ppo/kl_k3": per_episode(all_kls["k3"]),
      "ppo/kl_exact": per_episode(all_kls["exact"]),
      "ppo/kl_coef": kl_coef,
      "ppo/entropy": losses.mean(entropies(policy, rollout, cfg.temperature)),
      "ppo/completion_length": float(np.mean([len(row) for row in kl])),
      "ppo/ended": float(np.mean(np.asarray(rollout.ended))),
      "ppo/value": losses.mean(values),
      "ppo/explained_variance": 1 - residual,
  }
  return scored, metrics


def objective(policy, value, rollout, scored, cfg):
  """(loss, name -> metric) over all episodes as one minibatch."""
  new = logprobs(policy, rollout, cfg.temperature)
  entropy = entropies(policy, rollout, cfg.temperature)
  parts = []
  for r, row in enumerate(new):
    for t, logprob in enumerate(row):
      old, v_old = scored["old_logprobs"][r][t], scored["values"][r][t]
      ratio = math.exp(logprob - old)
      v = float(value[r][t])
      parts.append({
          "ppo/policy_loss": losses.clipped_surrogate(
              logprob, old, scored["advantages"][r][t], cfg.cliprange
          ),
          "ppo/value_loss": losses.clipped_value(
              v, v_old, scored["returns"][r][t], cfg.cliprange_value
          ),
          "ppo/clip_fraction": float(abs(ratio - 1) > cfg.cliprange),
          "ppo/value_clip_fraction": float(
              abs(v - v_old) > cfg.cliprange_value
          ),
          "ppo/ratio": ratio,
          "ppo/ratio_gap": abs(ratio - 1),
          "ppo/update_kl": ratio - 1 - math.log(ratio),
          "entropy": entropy[r][t],
      })
  metrics = {
      name: float(np.mean([part[name] for part in parts])) for name in parts[0]
  }
  loss = (
      metrics["ppo/policy_loss"]
      + cfg.vf_coef * metrics["ppo/value_loss"]
      - cfg.entropy_coef * metrics.pop("entropy")
  )
  return loss, metrics


def gradient(fn, x, step=1e-6):
  """Central differences of a scalar function of one array."""
  x = np.array(x, np.float64)
  grad = np.zeros_like(x)
  for i in np.ndindex(x.shape):
    kept = x[i]
    x[i] = kept + step
    above = fn(x)
    x[i] = kept - step
    below = fn(x)
    x[i] = kept
    grad[i] = (above - below) / (2 * step)
  return grad


def update(policy, value, rollout, scored, cfg, learning_rate):
  """`cfg.num_epochs` plain gradient steps on all episodes at once.

  Returns (policy, value, name -> mean of the metric over the steps).
  """
  policy, value = np.array(policy, np.float64), np.array(value, np.float64)
  history = []
  for _ in range(cfg.num_epochs):
    history.append(objective(policy, value, rollout, scored, cfg)[1])
    loss = lambda p, v: objective(p, v, rollout, scored, cfg)[0]
    policy_grad = gradient(lambda p: loss(p, value), policy)
    value_grad = gradient(lambda v: loss(policy, v), value)
    policy -= learning_rate * policy_grad
    value -= learning_rate * value_grad
  metrics = {
      name: float(np.mean([x[name] for x in history])) for name in history[0]
  }
  metrics["ppo/first_ratio_gap"] = history[0]["ppo/ratio_gap"]
  return policy, value, metrics
