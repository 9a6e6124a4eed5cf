"""Batches from arrays in memory, shuffled anew each epoch, exactly resumable.

The order is a function of the seed and the step alone, so the iterator's state
is one small JSON object. It belongs into the checkpoint beside the train state:
a run that is killed and restored sees the batches that it would have seen.
"""

from typing import TypeVar

import grain
import jax
import numpy as np

T = TypeVar("T")


class DatasetError(ValueError):
  """The rows do not make the batches asked for; names the numbers."""


def make_dataset(
    arrays: T,
    *,
    batch_size: int,
    seed: int,
    num_epochs: int | None = None,
    local_rows: np.ndarray | None = None,
) -> grain.IterDataset:
  """A dataset of batches of a dataclass of arrays.

  `iter(dataset)` yields the same dataclass with `batch_size` rows. The rest of
  an epoch that does not fill a batch is dropped; since every epoch has its own
  order, it is another rest each time. `iterator.get_state()` is JSON-able, and
  `iterator.set_state(state)` on a new iterator goes on from there.

  Args:
    arrays: a pytree (LMBatch, PreferenceBatch, ...) of numpy arrays that all
      have the same number of rows.
    batch_size: rows a batch, over all devices.
    seed: decides the order of every epoch.
    num_epochs: passes over the rows, or None to go on for ever.
    local_rows: only these rows of each batch are made, those of this process
      (`device_mesh.local_rows`); None for all. Order and state are of the whole
      batch, so a run may go on with another number of processes.

  Raises:
    DatasetError: there are fewer rows than batch_size.
    ValueError: the leaves differ in rows.
  """
  num_rows = count_rows(arrays)
  if not 1 <= batch_size <= num_rows:
    raise DatasetError(
        f"batch_size={batch_size} does not fit {num_rows} rows; give 1 to"
        f" {num_rows}."
    )
  if num_epochs is not None and num_epochs < 1:
    raise ValueError(f"num_epochs={num_epochs} must be at least 1, or None.")

  def gather(rows: np.ndarray) -> T:
    mine = rows if local_rows is None else rows[local_rows]
    return jax.tree.map(lambda leaf: leaf[mine], arrays)

  # Row numbers are shuffled and batched, and each batch gathered once.
  dataset = (
      grain.MapDataset.range(num_rows)
      .shuffle(seed=seed)
      .batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
      .repeat(num_epochs)
      .map(gather)
  )
  # The rows are in memory: threads would only get in each other's way.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return dataset.to_iter_dataset(options)


def count_rows(arrays) -> int:
  """The leading size that all leaves share."""
  leaves = jax.tree_util.tree_leaves_with_path(arrays)
  if not leaves:
    raise ValueError("there are no arrays to batch.")
  sizes = {jax.tree_util.keystr(path): len(leaf) for path, leaf in leaves}
  if len(set(sizes.values())) > 1:
    listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
    raise ValueError(f"the arrays differ in their number of rows ({listed}).")
  return next(iter(sizes.values()))
