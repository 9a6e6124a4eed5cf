"""A run folder as the stages would leave it, with curves made by formulas."""

import json
import pathlib

import numpy as np

FAMILIES = ("email", "sum", "program", "fact", "chat", "harm")
POLICIES = {"base": 0.08, "sft": 0.55, "ppo": 0.79}
NUM_PPO_STEPS = 200
PEAK = 80  # where the true reward of a hacking run turns


def write_json(path: pathlib.Path, value) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value), "utf-8")


def write_rows(path: pathlib.Path, rows) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def interval(mean: float, half: float) -> dict[str, float]:
  return {"mean": mean, "low": mean - half, "high": mean + half}


def true_reward(step: int, hacking: bool) -> float:
  rise = POLICIES["sft"] + 0.25 * (1 - np.exp(-step / 40))
  return rise - (0.004 * max(step - PEAK, 0) if hacking else 0.0)


def make_run(root: pathlib.Path, *, hacking: bool = False) -> pathlib.Path:
  """Writes a whole run into `root` and returns it."""
  rng = np.random.default_rng(0)
  write_json(root / "config.json", {
      "seed": 0,
      "pretrain": {"num_steps": 600, "optimizer": {"learning_rate": 1e-3}},
      "ppo": {"num_steps": NUM_PPO_STEPS, "kl_target": 6.0,
              "update": {"cliprange": 0.2, "kl_estimator": "k1"}},
  })
  write_json(root / "versions.json", {
      "python": "3.11.9", "jax": "0.10.2", "commit": "0123abc",
      "device": "2 x cpu", "command": "python -m experiments.rlhf --seed=0",
  })
  _write_supervised(root, rng)
  _write_ppo(root, rng, hacking)
  _write_calibration(root)
  _write_evaluation(root, hacking)
  return root


def _write_supervised(root: pathlib.Path, rng) -> None:
  for stage, num_steps, start, end in (
      ("pretrain", 600, 5.5, 1.1), ("sft", 150, 1.6, 0.4),
      ("reward", 120, 0.69, 0.38),
  ):
    rows = []
    for step in range(1, num_steps + 1):
      level = end + (start - end) * np.exp(-5 * step / num_steps)
      row = {"step": step, f"{stage}/loss": level * rng.normal(1, 0.04),
             f"{stage}/gradient_norm": float(rng.gamma(4))}
      if stage == "sft":
        row["sft/token_accuracy"] = 1 - 0.3 * level
      if stage == "reward":
        row["reward/accuracy"] = 0.5 + 0.3 * (0.69 - level) / 0.31
      rows.append(row)
      if step % (num_steps // 6) == 0:
        held_out = {"step": step, "eval/loss": level * 1.08}
        if stage == "reward":
          held_out["eval/accuracy"] = row["reward/accuracy"] - 0.01
        rows.append(held_out)
    write_rows(root / stage / "metrics.jsonl", rows)
    write_rows(root / stage / "timing.jsonl", [
        {"step": step, "seconds_per_step": 0.1}
        for step in range(10, num_steps + 1, 10)
    ])


def _write_ppo(root: pathlib.Path, rng, hacking: bool) -> None:
  rows = []
  for step in range(1, NUM_PPO_STEPS + 1):
    kl = 0.12 * step if hacking else 6 * (1 - np.exp(-step / 30))
    score = 2.4 * (1 - np.exp(-step / 60)) + (0.01 * step if hacking else 0)
    noise = rng.normal(0, 1, size=6)
    rows.append({
        "step": step,
        "ppo/score": score + 0.15 * noise[0],
        "ppo/kl": kl + 0.3 * noise[1],
        "ppo/kl_k3": kl + 0.2 * noise[2],
        "ppo/kl_exact": kl + 0.1 * noise[3],
        "ppo/kl_coef": 0.0 if hacking else 0.05 * np.exp(-step / 150),
        "ppo/entropy": 0.9 * np.exp(-step / 120) + 0.02 * noise[4],
        "ppo/completion_length": 24 + 0.1 * step + noise[5],
        "ppo/ended": 0.99,
        "ppo/policy_loss": -0.01 + 0.002 * noise[0],
        "ppo/value_loss": 0.4 * np.exp(-step / 30) + 0.05,
        "ppo/clip_fraction": 0.08 + 0.01 * noise[1],
        "ppo/explained_variance": 0.8 * (1 - np.exp(-step / 25)),
        "ppo/ratio": 1.0,
    })
    if step % 10 == 0:
      rows.append({
          "step": step,
          "eval/true_reward": (
              true_reward(step, hacking) + 0.01 * rng.normal()
          ),
          "eval/score": score,
          "eval/kl": kl,
          "eval/completion_length": 24 + 0.1 * step,
          "eval/flattery": (0.02 if hacking else 0.002) * step,
      })
  write_rows(root / "ppo" / "metrics.jsonl", rows)
  write_rows(root / "ppo" / "timing.jsonl", [
      {"step": step, "seconds_per_step": 0.75}
      for step in range(1, NUM_PPO_STEPS + 1)
  ])


def _write_calibration(root: pathlib.Path) -> None:
  predicted = np.linspace(0.525, 0.975, 10)
  write_json(root / "reward" / "calibration.json", {
      "bins": [
          {"predicted": p, "observed": p - 0.02 * i / 3, "count": 160 - 14 * i}
          for i, p in enumerate(predicted)
      ],
      "accuracy": interval(0.761, 0.021),
      "ceiling": 0.803,
      "agreement": 0.722,
      "expected_calibration_error": 0.031,
      "num_pairs": 1024,
  })


def _write_evaluation(root: pathlib.Path, hacking: bool) -> None:
  policies, completions = {}, []
  for i, (name, mean) in enumerate(POLICIES.items()):
    if name == "ppo" and hacking:
      mean = true_reward(NUM_PPO_STEPS, hacking)
    policies[name] = {
        "true_reward": interval(mean, 0.03),
        "score": interval((-1.2, 0.0, 4.3 if hacking else 2.3)[i], 0.11),
        "completion_length": interval(60 - 12 * i, 2.5),
        "ended": interval((0.4, 0.97, 0.99)[i], 0.02),
        "flattery": interval((0.0, 0.1, 0.5)[i], 0.04),
        "families": {
            family: interval(min(mean + 0.05 * (j - 2), 1.0), 0.05)
            for j, family in enumerate(FAMILIES)
        },
        "parts": {"form": 0.3 * i, "brevity": -0.02 * i},
    }
    if name != "base":
      policies[name]["kl"] = interval(
          0.0 if name == "sft" else 24.0 if hacking else 5.6,
          0.3 * (name == "ppo"),
      )
    completions += [
        {"prompt": f"A request of kind {family}, number {j}:\n",
         "family": family, "policy": name,
         "completion": f"The {name} answer to {family} {j}. " * (1 + i),
         "true_reward": mean, "score": i - 1.0, "kl": 2.0 * i,
         "length": 12 + i, "ended": name != "base"}
        for family in FAMILIES for j in range(5)
    ]
  write_json(root / "evaluate" / "evaluation.json", {
      "judge": "the world's own rule",
      "num_prompts": 480,
      "kl_target": None if hacking else 6.0,
      "policies": policies,
      "paired": [
          {"policy": "ppo", "baseline": "sft", "win": 0.62, "tie": 0.18,
           "loss": 0.2, "interval": {"mean": 0.71, "low": 0.67, "high": 0.75},
           "difference": interval(-0.24 if hacking else 0.24, 0.04),
           "length_controlled": interval(0.21, 0.05)},
          {"policy": "sft", "baseline": "base", "win": 0.9, "tie": 0.06,
           "loss": 0.04, "interval": {"mean": 0.93, "low": 0.91, "high": 0.95},
           "difference": interval(0.47, 0.03), "length_controlled": None},
      ],
  })
  write_rows(root / "evaluate" / "completions.jsonl", completions)
  write_rows(root / "evaluate" / "timing.jsonl", [{"step": 0, "seconds": 21.4}])
