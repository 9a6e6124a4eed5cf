"""JSON files of a run that may have died while it wrote them.

What cannot be read is left out and named, by file and line, in a list of
problems; nothing raises.
"""

import json
import math
import pathlib
from typing import Any

# Floats that JSON has no number for, as the metric files spell them.
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_MAX_LISTED = 3  # unreadable lines named one by one, for each file


def number(value: Any) -> float | None:
  """A JSON value as a float (NaN and infinities too), else None."""
  if isinstance(value, str):
    return _NOT_FINITE.get(value)
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return None
  try:
    return float(value)
  except OverflowError:  # JSON's integers know no bounds
    return math.inf if value > 0 else -math.inf


def finite(value: Any) -> float | None:
  """A JSON value as a finite float, else None."""
  value = number(value)
  return value if value is not None and math.isfinite(value) else None


class TolerantReader:
  """Reads files under `root` and remembers what was wrong with them."""

  def __init__(self, root: pathlib.Path):
    self._root = root
    self.problems: list[str] = []

  def _text(self, name: str) -> str | None:
    try:
      return (self._root / name).read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
      return None
    except OSError as error:
      self.problems.append(f"{name} cannot be read: {error.strerror}.")
      return None

  def json_object(self, name: str) -> dict[str, Any] | None:
    text = self._text(name)
    if text is None:
      return None
    try:
      value = json.loads(text)
    except (ValueError, RecursionError) as error:
      self.problems.append(f"{name} is not JSON and was left out: {error}.")
      return None
    if not isinstance(value, dict):
      self.problems.append(f"{name} does not hold an object; it was left out.")
      return None
    return value

  def rows(self, name: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a half-written last line is expected."""
    lines = (self._text(name) or "").split("\n")
    rows, bad = [], []
    for i, line in enumerate(lines):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      if isinstance(row, dict):
        rows.append(row)
      elif i == len(lines) - 1:
        self.problems.append(
            f"{name}:{i + 1}: the last line is half-written (the run was "
            "stopped, or is still going); it was left out."
        )
      else:
        bad.append(i + 1)
    if bad:
      listed = ", ".join(map(str, bad[:_MAX_LISTED]))
      more = f" and {len(bad) - _MAX_LISTED} more"
      self.problems.append(
          f"{name}: not a JSON object, left out: line {listed}"
          f"{more if len(bad) > _MAX_LISTED else ''}."
      )
    return rows
