"""Fields of a parsed JSON object: checked, or a RecordError names them."""

import math
from typing import Any

# Far above any real record. Whoever meets these has joined two files by
# accident or put a whole corpus into one field.
MAX_CHARACTERS = 1_000_000
MAX_COMPLETIONS = 1_024
MAX_MESSAGES = 10_000
MAX_RANK = 1_000_000
MAX_NUMBER = 3e38  # batches hold float32


class RecordError(ValueError):
  """What is wrong with a record: `field` and `reason`."""

  def __init__(self, field: str, reason: str):
    super().__init__(f"field {field!r}: {reason}" if field else reason)
    self.field = field
    self.reason = reason


def text(
    obj: dict, field: str, *, allow_empty: bool = False, where: str = ""
) -> str:
  """The text of a field."""
  where = where or field
  if field not in obj:
    raise RecordError(where, "missing")
  check_text(where, obj[field], allow_empty)
  return obj[field]


def check_text(where: str, value: Any, allow_empty: bool) -> None:
  """Checks that a value is text that can be encoded."""
  if not isinstance(value, str):
    raise RecordError(where, f"must be a string, not {type_name(value)}")
  check_length(where, len(value))
  if not allow_empty and not value.strip():
    raise RecordError(where, "is empty")
  if "\0" in value:
    raise RecordError(where, f"NUL character at {value.index(chr(0))}")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise RecordError(
        where, f"lone surrogate at character {error.start}"
    ) from error


def check_length(where: str, length: int) -> None:
  """Checks a number of characters."""
  if length > MAX_CHARACTERS:
    raise RecordError(
        where, f"{length} characters; the limit is {MAX_CHARACTERS}"
    )


def optional_text(obj: dict, field: str) -> str | None:
  """The text of a field, or None."""
  if field not in obj or obj[field] is None:
    return None
  return text(obj, field)


def list_of(obj: dict, field: str) -> list:
  """The list in a field."""
  if field not in obj:
    raise RecordError(field, "missing")
  if not isinstance(obj[field], list):
    raise RecordError(field, f"must be a list, not {type_name(obj[field])}")
  return obj[field]


def number(
    obj: dict, field: str, *, default: float | None = None,
    minimum: float = -math.inf,
) -> float:
  """The finite number in a field."""
  if field not in obj and default is not None:
    return default
  if field not in obj:
    raise RecordError(field, "missing")
  value = obj[field]
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise RecordError(field, f"must be a number, not {type_name(value)}")
  try:
    number = float(value)
  except OverflowError:  # JSON's integers have no bound
    number = math.inf
  if not abs(number) <= MAX_NUMBER:  # so put, it refuses NaN too
    raise RecordError(field, "must be a finite number within float32")
  if number < minimum:
    raise RecordError(field, f"is {number:g}; it may not be below {minimum:g}")
  return number


def type_name(value: Any) -> str:
  """What JSON calls the type of a value."""
  names = {bool: "a boolean", type(None): "null", dict: "an object",
           list: "a list", str: "a string", int: "an integer",
           float: "a number"}
  return names[type(value)] if type(value) in names else type(value).__name__
