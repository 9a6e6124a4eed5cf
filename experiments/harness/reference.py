"""The reference policy, on the policy's devices or on its own.

On its own it gives hidden states, and its head is where the policy is: exact KL
takes the logits of both side by side, and a position's hidden state is smaller
than its logits.
"""

from typing import Any

import jax
import numpy as np

from experiments.harness import models
from rlhf_jax import device_mesh
from rlhf_jax.models import functions
from rlhf_jax.types import Rollout


class Reference:
  """What scoring needs of a reference policy.

  Args:
    meshes: of 'policy' and 'ref_policy'; None where one program has both.
    place_head: where its head goes on the policy's mesh.

  Attributes:
    params: for a program on the policy's mesh; the head alone, where the rest
      has devices of its own.
  """

  def __init__(
      self,
      policy: models.Policy,
      meshes: dict[str, jax.sharding.Mesh] | None = None,
      place_head: models.PlaceParam | None = None,
  ):
    self._params, self._meshes = policy.params, meshes
    self._is_apart = bool(meshes) and meshes["ref_policy"] != meshes["policy"]
    self.config = policy.config
    self.params = policy.params
    if self._is_apart:
      head = functions.head_params(policy.params, policy.config)
      self.params = models.placed_params(head, place_head)
    model = functions.make_language_model(policy.config)
    self._hidden = jax.jit(
        lambda params, rollout: functions.completion_hidden(
            model, params, rollout
        )
    )

  def hidden(self, rollout: Rollout) -> Any | None:
    """[B, C, D] on the policy's mesh, or None: the program can do it itself."""
    if not self._is_apart:
      return None
    num_rows = rollout.ended.shape[0]
    mine, policys = self._meshes["ref_policy"], self._meshes["policy"]
    # Of an evaluation there may be any number; some are then done twice.
    each = device_mesh.num_row_shards(mine)
    rows = np.arange(-(-num_rows // each) * each) % num_rows
    if len(rows) > num_rows:
      rollout = jax.tree.map(lambda x: x[rows], rollout)
    hidden = self._hidden(self._params, device_mesh.put_rows(rollout, mine))
    if num_rows % device_mesh.num_row_shards(policys):
      return device_mesh.replicate(hidden[:num_rows], policys)
    return device_mesh.put_rows(hidden[:num_rows], policys)
