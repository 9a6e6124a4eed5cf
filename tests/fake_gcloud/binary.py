"""Stands in for the Python of a worker: plays a run as the test's plan says.

It appends its arguments to FAKE_GCLOUD/binary.jsonl. `plan.json` has, under
`runs`, what the first, second, ... start on worker 0 does, and all workers with
it: "done" leaves finished.json, "fail" a traceback, "stop" nothing, as after a
SIGTERM, "hang" waits to be killed; after the last, "done".
"""

import json
import os
import pathlib
import sys
import time

root = pathlib.Path(os.environ["FAKE_GCLOUD"])
host = os.environ["FAKE_HOST"]
with (root / "binary.jsonl").open("a") as f:
  f.write(json.dumps({"host": host, "cwd": os.getcwd(), "argv": sys.argv[1:]}))
  f.write("\n")
plan = json.loads((root / "plan.json").read_text())
lines = (root / "binary.jsonl").read_text().splitlines()
turn = sum(json.loads(x)["host"] == host for x in lines) - 1
runs = plan.get("runs", [])
what = runs[turn] if turn < len(runs) else "done"
print(f"step {turn} on {host}", flush=True)
if what == "hang":
  time.sleep(60)
elif what == "fail":
  print("Traceback (most recent call last):\nValueError: no such field")
  sys.exit(1)
elif what == "done" and host.endswith("-w-0"):
  (workdir,) = [x for x in sys.argv if x.startswith("--workdir=")]
  folder = pathlib.Path(workdir.removeprefix("--workdir="))
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "metrics.jsonl").write_text("{}\n")
  (folder / "finished.json").write_text("{}\n")
