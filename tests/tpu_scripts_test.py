"""The scripts of tpu_scripts/, against a gcloud that lives in a folder.

`fake_gcloud/gcloud.py` records every call and runs what goes over ssh in a real
shell, so these tests hold what a run goes through: that the chips are asked for
once, that arguments arrive as they were given, that a run whose chips are taken
away goes on to its done-mark.
"""

import importlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import time

import pytest

from tests.fake_gcloud.cloud import FAKES, NASTY, SCRIPTS

GOLDEN = FAKES / "golden"
TREE = SCRIPTS.parent


def golden_text(cloud, text: str) -> str:
  """Without the tree's place, and hashes that change when a script does."""
  return re.sub(r"\b[0-9a-f]{12}\b", "ID", text).replace(
      str(cloud.tree), "TREE"
  )


@pytest.mark.parametrize(
    "name, script, args, env",
    [
        ("create", "create.sh", [], {}),
        ("create_vm", "create.sh", [], {"RESOURCE": "vm", "SPOT": "false"}),
        ("create_slices", "create.sh", [], {"NUM_SLICES": "2"}),
        ("setup", "setup.sh", [], {}),
        (
            "launch",
            "launch.sh",
            ["--delete", "experiments.ppo", *NASTY],
            {"NUM_SLICES": "2"},
        ),
        ("watch", "watch.sh", [], {}),
        ("fetch", "fetch.sh", [], {}),
        ("delete", "delete.sh", [], {}),
        ("delete_vm", "delete.sh", [], {"RESOURCE": "vm"}),
    ],
)
def test_dry_run_prints_the_exact_commands_and_does_nothing(
    cloud, name, script, args, env
):
  env = env | {"MOUNT": "/mnt/rlhf_jax", "POLL_SECONDS": "60"}
  done = cloud.ok(script, "--dry_run", *args, **env)
  printed = golden_text(cloud, done.stdout)
  golden = GOLDEN / f"{name}.txt"
  if os.environ.get("WRITE_GOLDEN"):
    golden.parent.mkdir(exist_ok=True)
    golden.write_text(printed)
  assert printed == golden.read_text()
  assert cloud.calls() == []
  # What is printed can be given to a shell.
  subprocess.run(["bash", "-n"], input=printed, text=True, check=True)


def test_a_run_ends_with_its_done_mark_and_a_second_launch_does_nothing(cloud):
  done = cloud.ok("launch.sh", "experiments.ppo", *NASTY)
  assert cloud.is_done()
  assert "first is done" in done.stderr
  runs = cloud.binary_runs()
  assert sorted(run["host"] for run in runs) == ["rlhf-w-0", "rlhf-w-1"]
  for run in runs:
    # Through the command line, a file and three shells, to the letter.
    assert run["argv"] == [
        "-m",
        "experiments.ppo",
        f"--workdir={cloud.mount}/runs/first",
        "--distributed",
        *NASTY,
    ]
    assert "/.rlhf_jax/trees/" in run["cwd"]
    assert (pathlib.Path(run["cwd"]) / "experiments/ppo.py").exists()
  before = len(cloud.calls())
  again = cloud.ok("launch.sh", "experiments.ppo", *NASTY)
  assert "done already" in again.stderr
  assert len(cloud.calls()) == before + 1
  assert len(cloud.binary_runs()) == 2


def test_everything_can_be_done_twice(cloud):
  cloud.plan(runs=["hang"])
  for _ in range(2):
    cloud.ok("create.sh")
    cloud.ok("setup.sh")
    cloud.ok("launch.sh", "--detach", "experiments.ppo", *NASTY)
  for words in ("buckets create", "queued-resources create", "tree.tar.gz gs:"):
    assert len(cloud.calls(words)) == 1, words
  # A worker was installed, mounted and started once.
  assert _wait_for_runs(cloud, 2) == 2
  did = (cloud.root / "workers/rlhf-w-1/did").read_text().splitlines()
  starts = [line.split()[0] + " " + line.split()[-1] for line in did]
  assert len(starts) == len(set(starts)), did
  for _ in range(2):
    cloud.ok("delete.sh")
  assert cloud.resources() == {}
  assert len(cloud.calls("queued-resources delete")) == 1


def _wait_for_runs(cloud, count):
  deadline = time.monotonic() + 20
  while time.monotonic() < deadline:
    if (cloud.root / "binary.jsonl").exists():
      if len(cloud.binary_runs()) >= count:
        break
    time.sleep(0.05)
  return len(cloud.binary_runs())


@pytest.mark.parametrize("resource", ["queued", "vm"])
def test_a_run_whose_chips_are_taken_away_goes_on_to_its_end(cloud, resource):
  cloud.plan(
      runs=["hang"],
      faults=[
          {"on": "worker.sh status", "preempt": True, "after": 1, "times": 1}
      ],
  )
  done = cloud.ok("launch.sh", "experiments.ppo", *NASTY, RESOURCE=resource)
  assert cloud.is_done()
  kind = "queued-resources" if resource == "queued" else "tpu-vm"
  assert len(cloud.calls(f"{kind} create")) == 2
  assert len(cloud.calls(f"{kind} delete")) == 1
  hosts = [run["host"] for run in cloud.binary_runs()]
  assert hosts.count("rlhf-w-0") == 2
  assert "rlhf is gone" in done.stderr


def test_chips_taken_away_while_they_are_readied_are_asked_for_anew(cloud):
  cloud.plan(faults=[{"on": "uv venv", "preempt": True}])
  cloud.ok("launch.sh", "experiments.ppo", *NASTY)
  assert cloud.is_done()
  assert len(cloud.calls("queued-resources create")) == 2


def test_two_slices_are_one_run(cloud):
  cloud.plan(
      runs=["hang"],
      faults=[{"on": "worker.sh status", "preempt": True, "after": 2}],
  )
  cloud.ok("launch.sh", "experiments.ppo", *NASTY, NUM_SLICES="2")
  assert cloud.is_done()
  (first, _) = cloud.calls("queued-resources create")
  assert "--node-count=2 --node-prefix=rlhf" in first
  hosts = {run["host"] for run in cloud.binary_runs()}
  assert hosts == {f"rlhf-{i}-w-{j}" for i in range(2) for j in range(2)}


def test_a_slice_that_is_lost_is_seen_though_the_queue_says_active(cloud):
  cloud.ok("create.sh", NUM_SLICES="2")
  cloud.plan(
      faults=[{"on": "tpu-vm describe rlhf-1", "error": "NOT_FOUND: rlhf-1"}]
  )
  done = cloud.ok("create.sh", NUM_SLICES="2")
  assert "rlhf-1 is gone" in done.stderr
  assert len(cloud.calls("queued-resources create")) == 2


def test_a_worker_that_stays_down_is_replaced(cloud):
  cloud.plan(
      runs=["hang"],
      faults=[{"on": "worker.sh status", "down": 1, "after": 1, "times": 3}],
  )
  done = cloud.ok("launch.sh", "experiments.ppo", *NASTY)
  assert cloud.is_done()
  assert "a worker of rlhf is down" in done.stderr
  assert "connect to host rlhf-w-1" in done.stderr
  assert len(cloud.calls("queued-resources create")) == 2


def test_a_worker_that_misses_one_question_is_left_alone(cloud):
  cloud.plan(
      runs=["hang"],
      faults=[
          {"on": "worker.sh status", "down": 1, "times": 2},
          {"on": "worker.sh status", "preempt": True, "after": 3},
      ],
  )
  done = cloud.ok("launch.sh", "experiments.ppo", *NASTY)
  assert "does not answer (2 of 3)" in done.stderr
  assert "is down" not in done.stderr


def test_a_worker_that_is_down_from_the_start_is_an_error_in_the_end(cloud):
  cloud.plan(faults=[{"on": "tpu-vm ssh", "down": 1, "times": 99}])
  stderr = cloud.failed(
      "launch.sh", "experiments.ppo", *NASTY, MAX_RESTARTS="1"
  )
  assert "could not be readied" in stderr
  assert "connect to host rlhf-w-1" in stderr
  assert "not all workers of rlhf answered" in stderr
  assert "tpu_scripts/delete.sh" in stderr
  assert not (cloud.root / "binary.jsonl").exists()


def test_a_run_that_fails_is_started_again_and_goes_on(cloud):
  cloud.plan(runs=["fail"])
  done = cloud.ok("launch.sh", "experiments.ppo", *NASTY)
  assert cloud.is_done()
  assert "rlhf-w-0: ValueError: no such field" in done.stderr
  assert "starting again (1 of 3)" in done.stderr
  assert len(cloud.calls("queued-resources create")) == 1
  logs = cloud.root.glob("buckets/fake-bucket/launch/first-*/logs/rlhf-w-0.*")
  assert any("ValueError" in path.read_text() for path in logs)


def test_a_run_that_was_told_to_stop_is_started_again(cloud):
  cloud.plan(runs=["stop"])
  done = cloud.ok("launch.sh", "experiments.ppo", *NASTY)
  assert "left no gs://fake-bucket/runs/first/finished.json" in done.stderr
  assert cloud.is_done()


def test_a_run_that_fails_again_and_again_is_given_up(cloud):
  cloud.plan(runs=["fail"] * 9)
  stderr = cloud.failed(
      "launch.sh", "experiments.ppo", *NASTY, MAX_RESTARTS="1"
  )
  assert re.search(r"the run failed on rlhf-w-[01] exited 1", stderr)
  assert "MAX_RESTARTS=1" in stderr
  assert not cloud.is_done()


def test_another_command_does_not_join_a_run_but_may_replace_it(cloud):
  cloud.plan(runs=["hang"])
  cloud.ok("launch.sh", "--detach", "experiments.ppo", "--config=a")
  _wait_for_runs(cloud, 2)
  stderr = cloud.failed(
      "launch.sh", "experiments.ppo", "--config=b", MAX_RESTARTS="0"
  )
  assert "first runs another tree or command" in stderr
  cloud.ok("launch.sh", "--restart", "experiments.ppo", "--config=b")
  assert cloud.is_done()
  assert cloud.binary_runs()[-1]["argv"][-1] == "--config=b"


def test_waiting_in_the_queue_is_told_and_ends(cloud):
  waiting = ["WAITING_FOR_RESOURCES", "PROVISIONING"]
  cloud.plan(states=[[*waiting, waiting[-1], "ACTIVE"]])
  done = cloud.ok("create.sh")
  for state in waiting:
    assert done.stderr.count(f"rlhf: {state}") == 1
  cloud.ok("delete.sh")

  cloud.plan(states=[[], ["WAITING_FOR_RESOURCES"]])
  stderr = cloud.failed("create.sh", CREATE_TIMEOUT_MINUTES="0")
  assert "is still WAITING_FOR_RESOURCES" in stderr
  assert "Run this again to go on waiting" in stderr


def test_a_request_that_fails_is_an_error_and_the_next_one_replaces_it(cloud):
  cloud.plan(states=[["FAILED"]])
  stderr = cloud.failed("create.sh")
  assert "the request for v5litepod-16 in us-west4-a failed" in stderr
  cloud.ok("create.sh")
  assert len(cloud.calls("queued-resources delete")) == 1
  assert len(cloud.calls("queued-resources create")) == 2


def test_a_vm_is_asked_for_until_there_is_capacity(cloud):
  error = "There is no more capacity in the zone \"us-west4-a\" (code 8)"
  cloud.plan(faults=[{"on": "tpu-vm create", "error": error, "times": 2}])
  done = cloud.ok("create.sh", RESOURCE="vm")
  assert done.stderr.count("no capacity for v5litepod-16") == 2
  assert len(cloud.calls("tpu-vm create")) == 3


@pytest.mark.parametrize(
    "said, expected",
    [
        ("Quota limit 'TPUV5s' has been exceeded", "ask for quota"),
        ("PERMISSION_DENIED: tpu.nodes.create", "what gcloud said is above"),
    ],
)
def test_what_waiting_does_not_mend_is_an_error_at_once(cloud, said, expected):
  cloud.plan(faults=[{"on": "tpu-vm create", "error": said, "times": 9}])
  stderr = cloud.failed("create.sh", RESOURCE="vm")
  assert said in stderr and expected in stderr
  assert len(cloud.calls("tpu-vm create")) == 1


def test_a_passing_failure_of_the_network_does_not_end_the_watch(cloud):
  cloud.plan(
      runs=["hang"],
      faults=[
          {"on": "worker.sh status", "preempt": True, "after": 1},
          {
              "on": "queued-resources describe",
              "error": "Network is unreachable",
              "after": 6,
              "times": 3,
          },
      ],
  )
  done = cloud.ok("launch.sh", "experiments.ppo", *NASTY)
  assert "(3 of 10): " in done.stderr
  assert cloud.is_done()


def test_an_answer_that_cannot_be_had_deletes_and_makes_nothing(cloud):
  cloud.plan(
      faults=[
          {"on": "describe rlhf", "error": "UNAUTHENTICATED", "times": 99}
      ]
  )
  for script in ("create.sh", "delete.sh"):
    stderr = cloud.failed(script)
    assert "UNAUTHENTICATED" in stderr, script
  assert cloud.calls("queued-resources create") == []
  assert cloud.calls("queued-resources delete") == []


def test_a_bucket_without_folders_is_refused(cloud):
  cloud.ok("create.sh")
  cloud.plan(hierarchical=False)
  assert "no hierarchical namespace" in cloud.failed("create.sh")


@pytest.mark.parametrize("resource", ["queued", "vm"])
def test_chips_of_another_shape_are_not_taken_for_ours(cloud, resource):
  cloud.ok("create.sh", RESOURCE=resource)
  others = [{"ACCELERATOR_TYPE": "v6e-8"}]
  if resource == "queued":
    others.append({"NUM_SLICES": "2"})
  for other in others:
    for script in ("create.sh", "delete.sh"):
      stderr = cloud.failed(script, RESOURCE=resource, **other)
      assert "rlhf is a v5litepod-16" in stderr or "the node rlhf," in stderr
  cloud.ok("delete.sh", RESOURCE=resource)
  if resource == "queued":
    cloud.ok("create.sh", NUM_SLICES="3")
    assert "has 3 slices" in cloud.failed("create.sh", NUM_SLICES="2")
    assert "the node rlhf-0," in cloud.failed("create.sh")
    cloud.ok("delete.sh", NUM_SLICES="3")
  assert len(cloud.calls(" delete rlhf")) == len(cloud.calls(" create rlhf"))


def test_a_bucket_that_does_not_mount_is_an_error_before_anything_runs(cloud):
  cloud.ok("create.sh")
  for home in ("rlhf-w-0", "rlhf-w-1"):
    bin_ = cloud.root / "workers" / home / "bin"
    bin_.mkdir(parents=True)
    gcsfuse = bin_ / "gcsfuse"
    gcsfuse.write_text("#!/bin/sh\necho 403 storage.objects.list >&2\nexit 1\n")
    gcsfuse.chmod(0o755)
    shutil.copy(FAKES / "apt/tmux", bin_ / "tmux")
  stderr = cloud.failed("setup.sh")
  assert "403" in stderr and "storage.objectAdmin" in stderr


def test_watch_follows_worker_0_and_tells_of_errors_on_all(cloud):
  cloud.plan(runs=["fail"])
  cloud.ok("launch.sh", "--detach", "experiments.ppo", *NASTY)
  _wait_for_runs(cloud, 2)
  deadline = time.monotonic() + 20
  while time.monotonic() < deadline:
    done = cloud.ok("watch.sh", "--once")
    if done.stderr.count("exited with 1") == 2:
      break
  assert "step 0 on rlhf-w-0" in done.stdout
  assert "step 0 on rlhf-w-1" not in done.stdout
  assert "rlhf-w-1: ValueError: no such field" in done.stderr
  cloud.ok("launch.sh", "experiments.ppo", *NASTY)
  done = cloud.ok("watch.sh")
  assert "step 1 on rlhf-w-0" in done.stdout
  assert "first is done" in done.stderr


def test_watch_of_chips_that_are_not_there_says_so(cloud):
  done = cloud.ok("watch.sh", "--once")
  assert "rlhf (absent): not all workers answer" in done.stderr


def test_fetch_brings_all_but_arrays(cloud, tmp_path):
  assert "holds nothing yet" in cloud.failed("fetch.sh", str(tmp_path / "no"))
  cloud.ok("launch.sh", "--delete", "experiments.ppo", *NASTY)
  assert cloud.resources() == {}
  run = cloud.root / "buckets/fake-bucket/runs/first"
  for name in ("checkpoints/step_1/arrays", "model/arrays", "tensorboard"):
    (run / name).mkdir(parents=True)
    (run / name / "file").write_text(name)
  for _ in range(2):
    cloud.ok("fetch.sh", str(tmp_path / "here"))
  names = _files(tmp_path / "here")
  assert names == ["finished.json", "metrics.jsonl", "tensorboard/file"]
  cloud.ok("fetch.sh", "--all", str(tmp_path / "all"))
  assert _files(tmp_path / "all") == _files(run)


def _files(folder):
  return sorted(
      str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file()
  )


@pytest.mark.parametrize(
    "script, args, env, expected",
    [
        ("create.sh", [], {"PROJECT": ""}, "PROJECT is empty"),
        ("create.sh", [], {"BUCKET": "gs://b"}, "leave out gs://"),
        ("create.sh", [], {"RUN_NAME": "My Run"}, "RUN_NAME='My Run'"),
        ("create.sh", [], {"SPOT": "yes"}, "SPOT='yes'"),
        ("create.sh", [], {"ACCELERATOR_TYPE": "v9-8"}, "RUNTIME_VERSION"),
        (
            "create.sh",
            [],
            {"RESOURCE": "vm", "NUM_SLICES": "2"},
            "needs RESOURCE=queued",
        ),
        ("create.sh", ["--dryrun"], {}, "unknown argument '--dryrun'"),
        ("launch.sh", [], {}, "say what to run"),
        ("launch.sh", ["experiments.pop"], {}, "no binary 'experiments.pop'"),
        ("launch.sh", ["--dryrun", "experiments.ppo"], {}, "'--dryrun'"),
        (
            "launch.sh",
            ["experiments.ppo", "--workdir=x"],
            {},
            "leave out --workdir=x",
        ),
        (
            "launch.sh",
            ["experiments.ppo", "--distributed"],
            {},
            "leave out --distributed",
        ),
        ("watch.sh", ["--all"], {}, "unknown argument '--all'"),
        ("fetch.sh", ["--some"], {}, "unknown argument '--some'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_asked(
    cloud, script, args, env, expected
):
  assert expected in cloud.failed(script, *args, **env)
  assert cloud.calls() == []


def _runs_in_readme():
  """(binary, arguments) of every run that the page tells of."""
  text = (SCRIPTS / "README.md").read_text()
  blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
  for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
    words = shlex.split(line, comments=True)
    for i, word in enumerate(words):
      if word.startswith("experiments."):
        yield word, words[i + 1 :]


def test_the_page_names_binaries_and_fields_that_there_are():
  runs = list(_runs_in_readme())
  assert {binary for binary, _ in runs} >= {
      "experiments.plan",
      "experiments.ppo",
      "experiments.rlhf",
  }
  for binary, words in runs:
    assert (TREE / f"{binary.replace('.', '/')}.py").exists(), binary
    (place,) = [x.removeprefix("--config=") for x in words if "config=" in x]
    path, _, arg = place.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    config = module.get_config(arg) if arg else module.get_config()
    for word in words:
      if match := re.match(r"--config\.([\w.]+)=", word):
        section = config
        for name in match[1].split("."):
          assert name in section, word
          section = section[name]


def test_shellcheck_is_content():
  scripts = sorted(str(path) for path in SCRIPTS.glob("*.sh"))
  assert len(scripts) >= 8
  done = subprocess.run(
      ["shellcheck", *scripts], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    not (os.environ.get("RLHF_JAX_GCLOUD_TESTS") and shutil.which("gcloud")),
    reason="slow, and needs gcloud: set RLHF_JAX_GCLOUD_TESTS=1",
)
@pytest.mark.parametrize("name", sorted(x.name for x in GOLDEN.iterdir()))
def test_the_real_gcloud_takes_these_commands(tmp_path, name):
  # A shell splits the golden text, with everything else made to do nothing.
  nothing = "".join(f"{x}() {{ :; }}\n" for x in "mkdir cat tar git cd".split())
  calls = subprocess.run(
      [
          "bash",
          "-c",
          'gcloud() { printf "%s\\0" "$@" "--end"; }\n'
          + nothing
          + (GOLDEN / name).read_text(),
      ],
      capture_output=True,
      text=True,
      check=True,
  ).stdout.split("--end\0")[:-1]
  assert calls
  # Without an account, and with nothing at the other end.
  env = os.environ | {
      "CLOUDSDK_CONFIG": str(tmp_path),
      "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": "http://127.0.0.1:9/",
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": "http://127.0.0.1:9/",
  }
  for call in set(calls):
    done = subprocess.run(
        ["gcloud", *call.split("\0")[:-1]],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "do not currently have an active account" in done.stderr, call
    assert done.returncode == 1
