"""What a benchmark writes: a line of JSON a figure, a table, a comparison."""

from collections.abc import Iterable, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from experiments.harness import plan_report
from experiments.harness.benchmark_limits import Floor
from experiments.harness.benchmark_timing import Part, Spread, spread

OURS = "rlhf_jax"
# Of the median; less is not told from noise, even where repeats agree.
NOISE = 0.05


class CompareError(ValueError):
  """Two results that say nothing of one another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """One figure of one program.

  name: of the part; by: whose program it is.
  unit, value, min, max, values: of the figure, value the median.
  seconds: of one run, the median.
  floor: how fast this machine could be, None where no floor is known. share is
    the floor's seconds over the median's, matmul_share and memory_share those
    of the matmuls and of the bytes alone: shares of their measured rates.
  process: of ours, what it took beside time, see `experiments.benchmark`.
  peer_versions: of others, what they ran.
  skipped: why there is no figure; the numbers are then None.
  """

  size: str
  name: str
  by: str
  unit: str
  value: float | None = None
  min: float | None = None
  max: float | None = None
  values: tuple[float, ...] = ()
  repeats: int = 0
  more_is_better: bool = True
  seconds: float | None = None
  floor: dict[str, Any] | None = None
  share: float | None = None
  matmul_share: float | None = None
  memory_share: float | None = None
  process: dict[str, Any] | None = None
  peer_versions: dict[str, str] | None = None
  skipped: str = ""


def make_line(
    size: str,
    by: str,
    part: Part,
    seconds: Sequence[float],
    floor: Floor | None = None,
    **told: Any,
) -> Line:
  """Of the seconds of all repeats; `told` is as in `Line`."""
  found: Spread = spread([part.figure(x) for x in seconds])
  middle = spread(seconds).median
  if floor is not None:
    told["floor"] = {**dataclasses.asdict(floor), "bound": floor.bound}
    told["share"] = floor.seconds / middle
    told["matmul_share"] = floor.compute / middle
    told["memory_share"] = floor.memory / middle
  return Line(
      size=size,
      name=part.name,
      by=by,
      unit=part.unit,
      value=found.median,
      min=found.min,
      max=found.max,
      values=found.values,
      repeats=len(seconds),
      more_is_better=part.more_is_better,
      seconds=middle,
      **told,
  )


def skipped(size: str, by: str, part: Part, reason: str) -> Line:
  """Of what could not be measured."""
  return Line(
      size=size, name=part.name, by=by, unit=part.unit, skipped=reason
  )


def unmeasured(size: str, name: str, reason: str) -> Line:
  """Of a measure of ours that did not come to its end."""
  return Line(size=size, name=name, by=OURS, unit="", skipped=reason)


def as_json(line: Line, context: dict[str, Any]) -> str:
  """One line of the file; `context` is that of the whole run."""
  return json.dumps({**dataclasses.asdict(line), **context})


def read_lines(path: str) -> list[dict[str, Any]]:
  """Those of a file.

  Raises:
    CompareError: it has a line that is no result.
  """
  found = []
  text = pathlib.Path(path).read_text(encoding="utf-8")
  for number, row in enumerate(text.splitlines(), 1):
    try:
      line = json.loads(row)
      found.append({
          name: line[name]
          for name in (
              "size", "name", "by", "value", "min", "max", "more_is_better",
              "skipped", "device",
          )
      })
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise CompareError(
          f"{path}, line {number}: not a benchmark's result ({error!r}); give "
          "what --out wrote"
      ) from error
  return found


# ---- table -------------------------------------------------------------------

_HEADER = (
    "measure", "by", "median", "min", "max", "unit", "ours is", "floor s",
    "share", "matmul", "copy", "compile s", "programs", "again", "peak GiB",
)


def table(lines: Iterable[Line]) -> str:
  """In Markdown; below it why some were not measured."""
  lines = list(lines)
  ours = {x.name: x for x in lines if x.by == OURS}
  rows, notes, last = [], [], None
  for line in lines:
    if line.skipped:
      notes.append(f"- {line.name} by {line.by}: {line.skipped}")
      continue
    # Once a measure: its parts share them.
    process = line.process if line.process is not last else None
    last = line.process
    rows.append([
        line.name,
        line.by,
        *(_number(x) for x in (line.value, line.min, line.max)),
        line.unit,
        _times(ours.get(line.name), line),
        *_floor_cells(line),
        *_process_cells(process),
    ])
  text = plan_report.table(_HEADER, rows)
  if notes:
    text += "\n\nNot measured:\n" + "\n".join(notes)
  return text + "\n"


def times_faster(ours: Line, other: Line) -> float:
  """How often ours runs while the other runs once."""
  ratio = ours.value / other.value
  return ratio if ours.more_is_better else 1 / ratio


def _times(ours: Line | None, line: Line) -> str:
  if line.by == OURS or ours is None or ours.value is None:
    return ""
  return f"{times_faster(ours, line):.2f}x"


def _floor_cells(line: Line) -> list[str]:
  if line.floor is None:
    return [""] * 4
  shares = (line.share, line.matmul_share, line.memory_share)
  return [_number(line.floor["seconds"]), *(f"{x:.0%}" for x in shares)]


def _process_cells(process: dict[str, Any] | None) -> list[str]:
  if process is None:
    return [""] * 4
  return [
      f"{process['compile_seconds']:.1f}",
      str(process["compilations"]),
      str(process["compilations_after_warmup"]),
      f"{process['peak_bytes'] / 2**30:.2f}",
  ]


def _number(x: float) -> str:
  return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


# ---- comparison --------------------------------------------------------------


def check_comparable(
    old: Iterable[dict[str, Any]],
    size: str,
    measures: Iterable[str],
    device: str,
) -> None:
  """Checks that what will be measured can be held against older lines.

  Raises:
    CompareError: they are of another size or device, or lack a measure.
  """
  ours = [x for x in old if x["by"] == OURS and not x["skipped"]]
  sizes = {x["size"] for x in ours}
  if size not in sizes:
    raise CompareError(
        f"measured at {sorted(sizes)} before and at {size!r} now: compare runs "
        "of one size"
    )
  mine = [x for x in ours if x["size"] == size]
  for x in mine:
    if x["device"] != device:
      raise CompareError(
          f"measured on {x['device']!r} before and on {device!r} now: compare "
          "runs of one machine"
      )
  # A measure's lines are its own and its parts'.
  names = {x["name"].partition("/")[0] for x in mine}
  missing = [name for name in measures if name not in names]
  if missing:
    raise CompareError(
        f"not measured before: {', '.join(missing)}; leave them out with "
        "--config.measures, or measure the older commit again"
    )


def slower(
    old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]
) -> list[str]:
  """What of ours is slower than noise explains, a sentence each.

  That is where old and new repeats do not overlap and the median is worse by
  more than `NOISE`; see `check_comparable` for what the two must be.
  """
  key = lambda x: (x["size"], x["name"])
  mine = lambda lines: {
      key(x): x for x in lines if x["by"] == OURS and not x["skipped"]
  }
  old, new = mine(old), mine(new)
  told = []
  for name in [x for x in new if x in old]:
    before, after = old[name], new[name]
    if _is_slower(before, after):
      told.append(
          f"{name[0]} {name[1]}: {_range(before)} before, {_range(after)} now"
      )
  return told


def _is_slower(before: dict[str, Any], after: dict[str, Any]) -> bool:
  if after["more_is_better"]:
    apart = after["max"] < before["min"]
    return apart and after["value"] < before["value"] * (1 - NOISE)
  apart = after["min"] > before["max"]
  return apart and after["value"] > before["value"] * (1 + NOISE)


def _range(x: dict[str, Any]) -> str:
  low, high = _number(x["min"]), _number(x["max"])
  return f"{_number(x['value'])} [{low}, {high}]"
