"""Stands in for gcloud: records calls, keeps state on disk, fails on demand.

The scripts' tests put it on the PATH as `gcloud`. FAKE_GCLOUD names a folder:

    calls.jsonl     one line a call: its arguments
    plan.json       what the test wants, see `Plan`
    resources.json  TPUs by name: kind, states to go through, nodes
    counts.json     how often each entry of the plan was met
    workers/NODE-w-I/   the home of a worker, where ssh runs commands for real
    buckets/NAME/   the objects

A command over ssh runs in a real shell, with the tools of `worker_bin` before
all others, so that what is tested is what the scripts say, and not their text.
"""

import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(os.environ["FAKE_GCLOUD"])
HERE = pathlib.Path(__file__).parent
NUM_WORKERS = 2
PLAIN_TOOLS = (
    "basename bash cat cp date dirname env grep gzip head id kill ln ls mkdir"
    " chmod rm rmdir sed setsid sleep tail tar touch tr wc"
)


def _read(name, default):
  path = ROOT / name
  return json.loads(path.read_text()) if path.exists() else default


def _write(name, value):
  (ROOT / name).write_text(json.dumps(value))


def _fail(message, code=1):
  sys.stderr.write(f"ERROR: (gcloud) {message}\n")
  sys.exit(code)


def _flags(argv):
  """Words, and flags by name; a flag without a value is True."""
  words, flags = [], {}
  for word in argv:
    if word.startswith("--"):
      name, equals, value = word[2:].partition("=")
      flags.setdefault(name, value if equals else True)
    else:
      words.append(word)
  return words, flags


def _met(argv):
  """The first entry of the plan for this call whose turn it is, or {}.

  An entry has `on`, a text in the joined call; `after`, how many such calls
  pass first; `times`, for how many it then holds; and what happens: `error` (a
  message), `preempt` (the chips are taken away first), `down` (that worker does
  not answer).
  """
  counts = _read("counts.json", {})
  found = {}
  for i, entry in enumerate(_read("plan.json", {}).get("faults", [])):
    if entry["on"] not in " ".join(argv):
      continue
    count = counts.get(str(i), 0)
    counts[str(i)] = count + 1
    after = entry.get("after", 0)
    if after <= count < after + entry.get("times", 1) and not found:
      found = entry
  _write("counts.json", counts)
  return found


def _wipe(node):
  """A node's workers: their processes and their disks."""
  for home in (ROOT / "workers").glob(f"{node}-w-*"):
    for path in (home / ".tmux").glob("*"):
      try:
        os.killpg(int(path.read_text()), signal.SIGKILL)
      except ProcessLookupError:
        pass
    shutil.rmtree(home)


def _preempt(resources):
  for resource in resources.values():
    queued = resource["kind"] == "queued-resources"
    resource["states"] = ["SUSPENDED" if queued else "PREEMPTED"]
    for node in resource["nodes"]:
      _wipe(node)
  _write("resources.json", resources)


def _create(kind, name, flags, resources):
  if name in resources:
    _fail(f"ALREADY_EXISTS: Resource '{name}' already exists")
  plan = _read("plan.json", {})
  made = _read("counts.json", {}).get("made", 0)
  _write("counts.json", _read("counts.json", {}) | {"made": made + 1})
  ready = "ACTIVE" if kind == "queued-resources" else "READY"
  # The states that the first, second, ... resource goes through.
  states = plan.get("states", [])
  states = states[made] if made < len(states) else [ready]
  count = int(flags.get("node-count", 1))
  nodes = [name] if count == 1 else [f"{name}-{i}" for i in range(count)]
  resources[name] = {
      "kind": kind,
      "states": states,
      "type": flags["accelerator-type"],
      "nodes": nodes,
  }
  _write("resources.json", resources)


def _describe(kind, name, resources):
  """As the scripts' --format prints it: of a queue's node, the state alone."""
  for resource in resources.values():
    if kind == "tpu-vm" and resource["kind"] != kind:
      if name in resource["nodes"]:
        ready = resource["states"][0] == "ACTIVE"
        print("READY" if ready else "PREEMPTED")
        return
  if name not in resources or resources[name]["kind"] != kind:
    _fail(f"NOT_FOUND: Resource '{name}' was not found")
  resource = resources[name]
  fields = [resource["states"][0], resource["type"]]
  if kind == "queued-resources":
    fields += [resource["nodes"][0], str(len(resource["nodes"]))]
  print(",".join(fields))
  if len(resource["states"]) > 1:
    resource["states"].pop(0)
    _write("resources.json", resources)


def _plain_tools():
  """A folder with what every Linux has, and no gcsfuse of this machine's."""
  folder = ROOT / "tools"
  if not folder.exists():
    folder.mkdir()
    for name in PLAIN_TOOLS.split():
      (folder / name).symlink_to(shutil.which(name))
  return folder


def _ssh(node, flags, resources, down):
  owner = [r for r in resources.values() if node in r["nodes"]]
  if not owner or owner[0]["states"][0] not in ("ACTIVE", "READY"):
    _fail(f"NOT_FOUND: TPU '{node}' is not there, or not READY")
  workers = range(NUM_WORKERS) if flags["worker"] == "all" else [0]
  code = 0
  for i in workers:
    if i == down:
      sys.stderr.write(f"ssh: connect to host {node}-w-{i}: timed out\n")
      code = 255
      continue
    home = ROOT / "workers" / f"{node}-w-{i}"
    home.mkdir(parents=True, exist_ok=True)
    env = os.environ | {
        "HOME": str(home),
        "FAKE_HOST": home.name,
        "FAKE_PYTHON": sys.executable,
        "PATH": f"{home}/bin:{HERE}/worker_bin:{_plain_tools()}",
    }
    # As ssh: the words with blanks between, for the login shell to read.
    command = ["bash", "-c", " ".join(flags["command"].split(" "))]
    code = subprocess.run(command, cwd=home, env=env).returncode or code
  sys.exit(code)


def _path(url):
  return ROOT / "buckets" / url.removeprefix("gs://")


def _storage(words, flags):
  match words:
    case ["buckets", "describe", url]:
      if not _path(url).exists():
        _fail(f"{url} not found: 404.")
      print(_read("plan.json", {}).get("hierarchical", True))
    case ["buckets", "create", url]:
      _path(url).mkdir(parents=True)
    case ["ls", url]:
      if not _path(url).exists():
        _fail("One or more URLs matched no objects.")
      print(url)
    case ["cp", source, url]:
      _path(url).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(source, _path(url))
    case ["rsync", url, folder]:
      for path in sorted(_path(url).rglob("*")):
        name = str(path.relative_to(_path(url)))
        excluded = flags.get("exclude")
        if path.is_file() and not (excluded and re.match(excluded, name)):
          target = pathlib.Path(folder) / name
          target.parent.mkdir(parents=True, exist_ok=True)
          shutil.copyfile(path, target)
    case _:
      _fail(f"unknown storage command {words}", 2)


def main(argv):
  with (ROOT / "calls.jsonl").open("a") as f:
    f.write(json.dumps(argv) + "\n")
  for flag in ("--project=fake-project", "--quiet"):
    if flag not in argv:
      _fail(f"{flag} is missing in {argv}", 2)
  words, flags = _flags(argv)
  # Slices are spoken to at once.
  lock = (ROOT / "lock").open("w")
  fcntl.flock(lock, fcntl.LOCK_EX)
  entry = _met(argv)
  resources = _read("resources.json", {})
  if entry.get("preempt"):
    _preempt(resources)
  if "error" in entry:
    _fail(entry["error"])
  if words[0] == "storage":
    _storage(words[1:], flags)
    return
  _, _, kind, action, name = words
  if flags.get("zone") != "us-west4-a":
    _fail(f"no --zone in {argv}", 2)
  match action:
    case "create":
      _create(kind, name, flags, resources)
    case "describe":
      _describe(kind, name, resources)
    case "ssh":
      _plain_tools()
      lock.close()
      _ssh(name, flags, resources, entry.get("down"))
    case "delete":
      if name not in resources:
        _fail(f"NOT_FOUND: Resource '{name}' was not found")
      for node in resources.pop(name)["nodes"]:
        _wipe(node)
      _write("resources.json", resources)
    case _:
      _fail(f"unknown command {words}", 2)


main(sys.argv[1:])
