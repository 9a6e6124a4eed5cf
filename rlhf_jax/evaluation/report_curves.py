"""Which metrics share a figure, what it is called and in which unit it is."""

# (title, unit, {metric: its name in the legend})
PanelSpec = tuple[str, str, dict[str, str]]

LEARNING_CURVES: dict[str, tuple[PanelSpec, ...]] = {
    "pretrain": (
        ("Pretraining: loss", "nats per token",
         {"pretrain/loss": "training", "eval/loss": "held-out"}),
    ),
    "sft": (
        ("SFT: loss", "nats per token",
         {"sft/loss": "training", "eval/loss": "held-out"}),
        ("SFT: token accuracy", "share of tokens",
         {"sft/token_accuracy": "training",
          "eval/token_accuracy": "held-out"}),
    ),
    "reward": (
        ("Reward model: loss", "nats per comparison",
         {"reward/loss": "training", "eval/loss": "held-out"}),
        ("Reward model: accuracy", "share of pairs",
         {"reward/accuracy": "training", "eval/accuracy": "held-out"}),
    ),
    "ppo": (
        ("PPO: score", "score",
         {"ppo/score": "training", "eval/score": "held-out"}),
        ("PPO: KL from the SFT policy", "nats per completion",
         {"ppo/kl": "penalised", "ppo/kl_k3": "k3", "ppo/kl_exact": "exact",
          "eval/kl": "held-out"}),
        ("PPO: KL coefficient", "score per nat", {"ppo/kl_coef": "kl_coef"}),
        ("PPO: entropy of the policy", "nats per token",
         {"ppo/entropy": "training"}),
        ("PPO: policy loss", "clipped surrogate",
         {"ppo/policy_loss": "training"}),
        ("PPO: value loss", "half squared error",
         {"ppo/value_loss": "training"}),
        ("PPO: explained variance of the values", "share; 1 is perfect",
         {"ppo/explained_variance": "training"}),
        ("PPO: clipped policy ratios", "share of tokens",
         {"ppo/clip_fraction": "training"}),
    ),
}
LENGTH_CURVES: tuple[PanelSpec, ...] = (
    ("Length of completions", "tokens",
     {"ppo/completion_length": "training",
      "eval/completion_length": "held-out"}),
    ("Flattery", "phrases per completion", {"eval/flattery": "held-out"}),
    ("Completions that ended by themselves", "share",
     {"ppo/ended": "training", "eval/ended": "held-out"}),
)
# Of the PPO stage, in figures of their own.
_SHOWN_APART = {"eval/true_reward"}


def shown_metrics(stage: str) -> set[str]:
  """The metrics of a stage that some figure shows."""
  specs = LEARNING_CURVES.get(stage, ())
  shown = set()
  if stage == "ppo":
    specs, shown = specs + LENGTH_CURVES, set(_SHOWN_APART)
  for _, _, metrics in specs:
    shown |= metrics.keys()
  return shown
