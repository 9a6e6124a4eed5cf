"""PPO of large models, on slices of TPUs: mini-arguments of configs/ppo.py.

    python -m experiments.ppo --config=configs/ppo.py:llama3_8b \
        --workdir=runs/llama3_8b

pythia_1b, pythia_6.9b, llama3_8b and llama3_70b, each with a value network and
a reward model of its own size, by the recipe of TL;DR in Huang et al. (arXiv
2403.17031): prompts of 512 tokens, completions of 53, 512 episodes an
iteration, 4 epochs of 1 minibatch, 10^6 episodes, temperature 0.7, KL 0.05.
pythia_6.9b_lora trains adapters of rank 64 on one bfloat16 base, on 256
episodes an iteration: four models of 6.9B with Adam's moments of two, or the
keys and values of 512 episodes beside adapters, do not fit 16 chips of v5e.

None has been run: what they take is planned, in docs/plans.md, from the shapes
in configs/shapes (the published config.json, without weights). To run one, say
where the models and prompts are:

    --config.init_from=hf:FOLDER --config.reward_model=FOLDER
    --config.prompts.source=FILE.jsonl
    --config.heldout_prompts.source=FILE.jsonl

A mesh is `fsdp` over all chips there are; --config.mesh.tensor=4 and so on
change it, and experiments.plan says what that does.
"""

from ml_collections import ConfigDict

from configs import common

# name -> (folder of its shape, episodes an iteration, microbatches)
_MODELS = {
    "pythia_1b": ("pythia_1b", 512, 2),
    "pythia_6.9b": ("pythia_6.9b", 512, 4),
    "pythia_6.9b_lora": ("pythia_6.9b", 256, 4),
    "llama3_8b": ("llama3_8b", 512, 4),
    "llama3_70b": ("llama3_70b", 512, 4),
}
NAMES = tuple(_MODELS)
_NUM_EPISODES = 1_000_000


def large(config: ConfigDict, name: str) -> ConfigDict:
  """The config of a small PPO run made that of a large one."""
  folder, batch_size, num_microbatches = _MODELS[name]
  place = f"hf:configs/shapes/{folder}"
  num_iterations = _NUM_EPISODES // batch_size
  config.init_from = config.reward_model = place
  prompts = "${RLHF_JAX_DATA}/tldr/prompts.jsonl"
  config.prompts = common.source(prompts)
  config.heldout_prompts = common.source(prompts, limit=512)
  config.rollout_batch_size = batch_size
  config.mesh = common.mesh(fsdp=-1)
  config.optimizer = common.optimizer(3e-6, schedule="linear", epsilon=1e-5)
  config.compute = common.compute(
      dtype="bfloat16", param_dtype="float32", remat=True
  )
  if name.endswith("_lora"):
    config.lora = common.lora(64)
    config.compute.param_dtype = "bfloat16"
    config.value_init = "policy"
  config.ppo.update(
      temperature=0.7,
      kl_controller="fixed",
      kl_coef=0.05,
      num_epochs=4,
      num_minibatches=1,
      num_microbatches=num_microbatches,
  )
  config.loop = common.loop(
      num_iterations,
      log_every=1,
      eval_every=100,
      checkpoint_every=100,
      best_metric="eval/score",
  )
  config.samples = common.samples(
      max_prompt_length=512,
      max_completion_length=53,
      temperature=0.7,
      too_long="drop",
  )
  config.judge = ""
  return config
