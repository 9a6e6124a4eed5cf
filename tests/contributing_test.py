"""What CONTRIBUTING.md names is there."""

import pathlib
import re

REPO = pathlib.Path(__file__).resolve().parents[1]


def test_every_test_that_contributing_names_exists():
  rows = [
      line.split("|")[2]
      for line in (REPO / "CONTRIBUTING.md").read_text().splitlines()
      if line.startswith("| ") and "_test.py" in line
  ]
  assert len(rows) > 10
  for row in rows:
    file = None
    for name in re.findall(r"`([^`]+)`", row):
      path, _, test = name.partition("::")
      file = path or file
      text = (REPO / "tests" / file).read_text() if "/" in file else ""
      assert not text or not test or f"def {test}(" in text, name
