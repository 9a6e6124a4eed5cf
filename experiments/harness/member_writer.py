"""Lines of many runs that are trained as one, each run's in its own folder.

    <member's folder>/metrics.jsonl, samples.jsonl   as of a lone run
    timing.jsonl                                     of all of them together
"""

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

from experiments.harness.metric_writer import MetricWriter


class MemberWriter:
  """A `MetricWriter` whose names begin with a member's: 'seed0/ppo/kl'.

  Attributes:
    num_lines: of each file, by its path in the workdir.

  Args:
    workdir: of all members.
    folders: each member's, in the workdir, by its name.
    tensorboard, wandb: see `MetricWriter`.
  """

  def __init__(
      self,
      workdir: str | os.PathLike,
      *,
      folders: Mapping[str, str],
      tensorboard: bool,
      wandb: bool,
  ):
    make = lambda folder: MetricWriter(
        pathlib.Path(workdir) / folder, tensorboard=tensorboard, wandb=wandb
    )
    self._folders = folders
    self._whole = make(".")
    self._members = {name: make(x) for name, x in folders.items()}

  @property
  def num_lines(self) -> dict[str, int]:
    """See the class."""
    return self._whole.num_lines | {
        f"{self._folders[member]}/{name}": num
        for member, writer in self._members.items()
        for name, num in writer.num_lines.items()
    }

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """One line to the file of each member that is named."""
    by_member: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
      member, _, own = name.partition("/")
      by_member.setdefault(member, {})[own] = value
    for member, own in by_member.items():
      self._members[member].write(step, own)

  def timing(self, step: int, seconds: Mapping[str, float]) -> None:
    """One line for all members."""
    self._whole.timing(step, seconds)

  def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each row, to the file of the 'member' that it names."""
    by_member: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
      own = {name: x for name, x in row.items() if name != "member"}
      by_member.setdefault(row["member"], []).append(own)
    for member, own in by_member.items():
      self._members[member].samples(step, own)

  def sync(self) -> None:
    """See `MetricWriter`."""
    for writer in self._all():
      writer.sync()

  def truncate_after(self, step: int) -> None:
    """See `MetricWriter`."""
    for writer in self._all():
      writer.truncate_after(step)

  def close(self) -> None:
    """See `MetricWriter`."""
    for writer in self._all():
      writer.close()

  def _all(self) -> list[MetricWriter]:
    return [self._whole, *self._members.values()]
