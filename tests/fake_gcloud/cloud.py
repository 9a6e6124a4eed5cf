"""What tests of the scripts start them with, and look at afterwards."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

FAKES = pathlib.Path(__file__).parent
SCRIPTS = FAKES.parent.parent / "tpu_scripts"
# Everything that a shell could trip over.
NASTY = [
    "--config=configs/ppo.py",
    "--config.lora.targets=('attention/query', \"feed_forward/.*\")",
    "--config.note=a  b\t$HOME `id` \\n !x; # {y} *",
    "--config.empty=",
]


class Cloud:
  """A fake Google Cloud, and a tree to launch from."""

  def __init__(self, folder: pathlib.Path):
    self.root = folder / "cloud"
    self.mount = folder / "mnt"
    self.tree = folder / "tree"
    binaries = folder / "bin"
    for path in (self.root, binaries, self.tree / "experiments"):
      path.mkdir(parents=True)
    gcloud = binaries / "gcloud"
    gcloud.write_text(
        f'#!/bin/sh\nexec {sys.executable} -S -E {FAKES}/gcloud.py "$@"\n'
    )
    gcloud.chmod(0o755)
    shutil.copytree(SCRIPTS, self.tree / "tpu_scripts")
    (self.tree / "experiments" / "ppo.py").write_text("")
    subprocess.run(["git", "init", "-q", self.tree], check=True)
    self.env = os.environ | {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "FAKE_GCLOUD": str(self.root),
        "PROJECT": "fake-project",
        "BUCKET": "fake-bucket",
        "ZONE": "us-west4-a",
        "MOUNT": str(self.mount),
        "POLL_SECONDS": "0",
    }
    self.plan()

  def plan(self, **plan):
    (self.root / "plan.json").write_text(json.dumps(plan))

  def run(self, script, *args, **env):
    return subprocess.run(
        [self.tree / "tpu_scripts" / script, *args],
        env=self.env | env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )

  def ok(self, script, *args, **env):
    done = self.run(script, *args, **env)
    assert done.returncode == 0, done.stderr
    return done

  def failed(self, script, *args, **env):
    done = self.run(script, *args, **env)
    assert done.returncode != 0, done.stdout
    return done.stderr

  def calls(self, text=""):
    path = self.root / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    calls = [" ".join(json.loads(line)) for line in lines]
    return [call for call in calls if text in call]

  def binary_runs(self):
    path = self.root / "binary.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]

  def resources(self):
    return json.loads((self.root / "resources.json").read_text())

  def is_done(self, run="first"):
    return (
        self.root / "buckets/fake-bucket/runs" / run / "finished.json"
    ).exists()

  def clean_up(self):
    """Ends what still runs on workers."""
    if (self.root / "resources.json").exists():
      for name, made in self.resources().items():
        resource = "vm" if made["kind"] == "tpu-vm" else "queued"
        count = str(len(made["nodes"]))
        self.ok(
            "delete.sh", RESOURCE=resource, TPU_NAME=name, NUM_SLICES=count
        )
