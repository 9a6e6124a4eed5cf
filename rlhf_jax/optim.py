"""Optimizers: Adam with the epsilon where the recipe had it, and schedules."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from rlhf_jax.types import pytree_dataclass, static


@pytree_dataclass
class OptimizerConfig:
  """AdamW with a learning-rate schedule and clipping by the global norm.

  learning_rate: the peak, after warm-up.
  schedule: the shape from the end of warm-up to the last step.
  warmup_steps: linear warm-up from 0, in optimizer steps.
  final_fraction: of the peak, reached at the last step ('constant' ignores it).
  epsilon_placement: 'optax' adds epsilon to the bias-corrected root,
    m_hat / (sqrt(v_hat) + epsilon), as PyTorch does; 'tf' adds it before bias
    correction, as TensorFlow 1's Adam does, which damps the first steps
    (Ziegler et al. 2019 trained with it; see `scale_by_tf_adam`).
  weight_decay: decoupled, on matrices and embeddings alone.
  max_grad_norm: gradients are scaled down to this global norm.
  """

  learning_rate: float
  schedule: Literal["constant", "linear", "cosine"] = static("constant")
  warmup_steps: int = static(0)
  final_fraction: float = 0.0
  b1: float = static(0.9)
  b2: float = static(0.999)
  epsilon: float = static(1e-8)
  epsilon_placement: Literal["optax", "tf"] = static("optax")
  weight_decay: float = 0.0
  max_grad_norm: float = 1.0


def scale_by_tf_adam(
    b1: float, b2: float, epsilon: float
) -> optax.GradientTransformation:
  """Adam as TensorFlow 1 computes it.

  update = sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + epsilon)

  Reference: Kingma and Ba, arXiv 1412.6980, the note after Algorithm 1
  ("epsilon hat"). Differs from optax.scale_by_adam only in that epsilon is not
  divided by the bias correction, so early steps are smaller.
  """

  def init(params):
    return optax.ScaleByAdamState(
        count=jnp.zeros((), jnp.int32),
        mu=optax.tree.zeros_like(params),
        nu=optax.tree.zeros_like(params),
    )

  def update(updates, state, params=None):
    del params
    mu = optax.tree.update_moment(updates, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
    count = state.count + 1
    t = count.astype(jnp.float32)
    scale = jnp.sqrt(1 - b2**t) / (1 - b1**t)
    updates = jax.tree.map(
        lambda m, v: scale.astype(m.dtype) * m / (jnp.sqrt(v) + epsilon),
        mu,
        nu,
    )
    return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  return optax.GradientTransformation(init, update)


def _scale_by_adam(
    b1: float, b2: float, epsilon: float
) -> optax.GradientTransformation:
  """optax.scale_by_adam, also under jax's strict dtype promotion.

  It raises a float to the power of an integer count, which strict promotion
  refuses.
  """
  tx = optax.scale_by_adam(b1, b2, epsilon)

  def update(updates, state, params=None):
    with jax.numpy_dtype_promotion("standard"):
      return tx.update(updates, state, params)

  return optax.GradientTransformation(tx.init, update)


def schedule_shape(cfg: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """step -> the fraction of the peak learning rate, in [0, 1]."""
  num_decay_steps = max(num_steps - cfg.warmup_steps, 1)
  if cfg.schedule == "constant":
    decay = optax.constant_schedule(1.0)
  elif cfg.schedule == "linear":
    decay = optax.linear_schedule(1.0, cfg.final_fraction, num_decay_steps)
  else:
    decay = optax.cosine_decay_schedule(
        1.0, num_decay_steps, alpha=cfg.final_fraction
    )
  if cfg.warmup_steps == 0:
    return decay
  warmup = optax.linear_schedule(0.0, 1.0, cfg.warmup_steps)
  return optax.join_schedules([warmup, decay], [cfg.warmup_steps])


def _is_decayed(path, _) -> bool:
  # By name and not by rank: layers are stacked, so that a norm's scale is a
  # matrix too.
  return path[-1].key.endswith(("kernel", "embedding", "lora_a", "lora_b"))


def make_optimizer(
    cfg: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """AdamW over `num_steps` optimizer steps, as `cfg` says.

  The learning rate, weight decay and clipping norm live in the optimizer's
  state, as data: a sweep over them shares one compiled program.
  """

  def chain(learning_rate, weight_decay, max_grad_norm):
    adam = (
        scale_by_tf_adam(cfg.b1, cfg.b2, cfg.epsilon)
        if cfg.epsilon_placement == "tf"
        else _scale_by_adam(cfg.b1, cfg.b2, cfg.epsilon)
    )
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        adam,
        optax.add_decayed_weights(
            weight_decay,
            mask=lambda p: jax.tree_util.tree_map_with_path(_is_decayed, p),
        ),
        optax.scale_by_schedule(schedule_shape(cfg, num_steps)),
        optax.scale(-learning_rate),
    )

  return optax.inject_hyperparams(chain)(
      learning_rate=cfg.learning_rate,
      weight_decay=cfg.weight_decay,
      max_grad_norm=cfg.max_grad_norm,
  )
