"""The scripts that run on Kubernetes and under SLURM, against stand-ins."""

import json
import os
import pathlib
import re
import subprocess

import pytest

from experiments.harness import cli
from tests.fake_gcloud.cloud import NASTY


def _manifest(cloud, *args, **env):
  """What gke.sh would apply, parsed, and what it copies to the bucket."""
  yaml = pytest.importorskip("yaml")
  printed = cloud.ok("gke.sh", "--dry_run", *args, **env).stdout
  _, _, rest = printed.partition("kubectl apply -f - <<'END'\n")
  return yaml.safe_load(rest.removesuffix("END\n")), printed


def test_gke_dry_run_prints_a_whole_job_set(cloud):
  manifest, printed = _manifest(
      cloud, "experiments.ppo", *NASTY, NUM_SLICES="2", MAX_RESTARTS="7"
  )
  assert cloud.calls() == []
  assert (manifest["apiVersion"], manifest["kind"]) == (
      "jobset.x-k8s.io/v1alpha2",
      "JobSet",
  )
  assert manifest["metadata"]["name"] == "first"
  assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 7}
  (job,) = manifest["spec"]["replicatedJobs"]
  assert job["replicas"] == 2
  slice_ = job["template"]["spec"]
  assert (slice_["parallelism"], slice_["completions"]) == (4, 4)
  pod = slice_["template"]["spec"]
  assert pod["nodeSelector"] == {
      "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
      "cloud.google.com/gke-tpu-topology": "4x4",
      "cloud.google.com/gke-spot": "true",
  }
  (container,) = pod["containers"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  (volume,) = pod["volumes"]
  assert volume["csi"]["volumeAttributes"]["bucketName"] == "fake-bucket"
  assert container["volumeMounts"][0]["name"] == volume["name"]
  assert "{" not in json.dumps(container["command"]).replace("{}", "")
  # What the container does is a script, and it does what launch.sh's does.
  *_, script = container["command"]
  subprocess.run(["bash", "-n"], input=script, text=True, check=True)
  launch = re.search(r"bash (\S+)/command.sh", script)[1]
  assert launch.removeprefix(f"{cloud.mount}/") in printed
  assert _words_of_command(printed) == [
      *["python", "-m", "experiments.ppo"],
      *[f"--workdir={cloud.mount}/runs/first", "--distributed", *NASTY],
  ]


def _words_of_command(printed):
  """What a shell makes of the `exec` of the command.sh in a dry run."""
  _, _, command = printed.partition("exec ")
  command, _, _ = command.partition("\nEND\n")
  done = subprocess.run(
      ["bash", "-c", f"printf '%s\\0' {command}"],
      capture_output=True,
      text=True,
      check=True,
  )
  return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    "command, code, said",
    [
        ("touch $mark", 0, ""),
        ("exit 3", 3, ""),
        # Told to stop, it ends well, and is not done.
        ("exit 0", 1, "left no"),
        ("trap 'exit 7' TERM; kill -TERM $PPID; sleep 1 & wait", 7, ""),
    ],
)
def test_gke_pods_end_as_the_run_does(cloud, tmp_path, command, code, said):
  manifest, _ = _manifest(cloud, "experiments.ppo")
  (job,) = manifest["spec"]["replicatedJobs"]
  pod = job["template"]["spec"]["template"]["spec"]
  *_, script = pod["containers"][0]["command"]
  launch = re.search(r"bash (\S+)/command.sh", script)[1]
  pathlib.Path(launch).mkdir(parents=True)
  (cloud.mount / "runs/first").mkdir(parents=True)
  (pathlib.Path(launch) / "command.sh").write_text(command)
  done = subprocess.run(
      ["bash", "-ec", script.replace("seq 60", "seq 1")],
      # What the image does, and a place that is not ours.
      env=os.environ
      | {
          "mark": str(cloud.mount / "runs/first/finished.json"),
          "PATH": f"{_doing_nothing(tmp_path, 'tar', 'pip', 'mkdir')}:"
          + os.environ["PATH"],
      },
      capture_output=True,
      text=True,
      timeout=60,
  )
  assert done.returncode == code, done.stderr
  assert said in done.stderr


def _doing_nothing(tmp_path, *names):
  folder = tmp_path / "nothing"
  folder.mkdir()
  for name in names:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)
  return folder


def test_gke_without_spot_asks_for_no_spot_nodes(cloud):
  manifest, _ = _manifest(cloud, "experiments.ppo", SPOT="false")
  assert "gke-spot" not in json.dumps(manifest)


def test_gke_copies_the_tree_and_applies_the_same_twice(cloud, tmp_path):
  kubectl = tmp_path / "bin" / "kubectl"
  kubectl.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/kubectl\ncat >&2\n')
  kubectl.chmod(0o755)
  (cloud.root / "buckets/fake-bucket").mkdir(parents=True)
  said = [cloud.ok("gke.sh", "experiments.ppo", *NASTY).stderr for _ in "12"]
  applied = [x[x.index("# One run on TPUs") :] for x in said]
  assert applied[0] == applied[1]
  assert (tmp_path / "kubectl").read_text() == "apply -f -\n" * 2
  assert len(cloud.calls("command.sh gs:")) == 1


def _slurm(cloud, tmp_path, *args, **env):
  """slurm.sh as a job of 2 nodes and 4 tasks, or outside of any."""
  binaries = tmp_path / "bin"
  for name, text in {
      "scontrol": f'echo "$@" >>{tmp_path}/scontrol; printf "n7\\nn8\\n"',
      "scancel": (
          f'echo scancel "$@" >>{tmp_path}/scontrol; sleep "$SCANCEL_SECONDS"'
      ),
      # srun --kill-on-bad-exit=1 COMMAND...
      "srun": 'shift; for i in 0 1 2 3; do SLURM_PROCID=$i "$@" || exit; done',
      "fake_python": (
          f'for x; do printf "%s\\0" "$x"; done >>{tmp_path}/ran\n'
          f'printf "\\n" >>{tmp_path}/ran\n'
          '[ "$SIGNAL" != "$SLURM_PROCID" ] ||'
          ' { kill -USR1 "$BATCH"; sleep 0.3; exit "$CODE"; }'
      ),
  }.items():
    (binaries / name).write_text(f"#!/bin/bash\n{text}\n")
    (binaries / name).chmod(0o755)
  return subprocess.run(
      ["bash", "tpu_scripts/slurm.sh", *args],
      cwd=cloud.tree,
      env=cloud.env | {"PYTHON": "fake_python"} | env,
      capture_output=True,
      text=True,
      timeout=60,
  )


JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "n[7-8]",
    "SLURM_NTASKS": "4",
}


def test_slurm_dry_run_prints_the_exact_command(cloud, tmp_path):
  workdir = f"--workdir={tmp_path}/run"
  done = _slurm(cloud, tmp_path, "--dry_run", "experiments.ppo", workdir)
  assert done.stdout == (
      "srun --kill-on-bad-exit=1 bash -c exec\\ \\\"\\$@\\\"\\ "
      "--process_id=\\\"\\$SLURM_PROCID\\\" run fake_python -m "
      f"experiments.ppo {workdir} --distributed "
      "--coordinator_address=node1:20001 --num_processes=16 \n"
  )
  assert not (tmp_path / "ran").exists()


def test_slurm_starts_one_process_a_task_with_the_arguments_as_given(
    cloud, tmp_path
):
  workdir = f"--workdir={tmp_path}/run"
  done = _slurm(cloud, tmp_path, "experiments.ppo", workdir, *NASTY, **JOB)
  assert done.returncode == 0, done.stderr
  lines = (tmp_path / "ran").read_text().splitlines()
  assert [line.split("\0")[:-1] for line in lines] == [
      [
          *["-m", "experiments.ppo", workdir, *NASTY, "--distributed"],
          "--coordinator_address=n7:24711",
          "--num_processes=4",
          f"--process_id={i}",
      ]
      for i in range(4)
  ]


def test_binaries_have_the_flags_that_the_scripts_add(cloud, tmp_path):
  args = ["experiments.ppo", f"--workdir={tmp_path}/run"]
  slurm = _slurm(cloud, tmp_path, "--dry_run", *args).stdout
  _, launch = _manifest(cloud, "experiments.ppo")
  added = set(re.findall(r"--(\w+)", slurm.partition("--workdir")[2]))
  added |= set(re.findall(r"--workdir=\S+ --(\w+)", launch))
  assert {"distributed", "coordinator_address", "num_processes"} <= added
  for name in added | {"process_id"}:
    assert name in cli.flags.FLAGS, name


def test_slurm_ends_at_once_where_the_done_mark_is(cloud, tmp_path):
  (tmp_path / "run").mkdir()
  (tmp_path / "run/finished.json").write_text("{}")
  args = ["experiments.ppo", f"--workdir={tmp_path}/run"]
  done = _slurm(cloud, tmp_path, *args, **JOB)
  assert done.returncode == 0 and "done already" in done.stderr
  assert not (tmp_path / "ran").exists()


# Of the run's four tasks the one that brings the signal may be any, and it may
# end while the signal is dealt with.
@pytest.mark.parametrize(
    "task, scancel_seconds, code",
    [("0", "0", 0), ("3", "0.6", 0), ("3", "0.6", 7), ("3", "0", 138)],
)
def test_slurm_saves_and_is_queued_again_when_its_time_is_up(
    cloud, tmp_path, task, scancel_seconds, code
):
  script = cloud.tree / "tpu_scripts/slurm.sh"
  text = script.read_text().replace("set -euo pipefail\n", "export BATCH=$$\n")
  script.write_text(text)
  args = ["experiments.ppo", f"--workdir={tmp_path}/run"]
  done = _slurm(
      cloud,
      tmp_path,
      *args,
      SIGNAL=task,
      CODE=str(code),
      SCANCEL_SECONDS=scancel_seconds,
      **JOB,
  )
  assert done.returncode == code, done.stderr
  assert "time is almost up" in done.stderr
  asked = (tmp_path / "scontrol").read_text().splitlines()
  assert asked == [
      "show hostnames n[7-8]", "scancel --signal=TERM 4711", "requeue 4711"
  ]
  # The tasks were waited for.
  assert len((tmp_path / "ran").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "args, env, expected",
    [
        ([], JOB, "say what to run"),
        (["experiments.pop"], JOB, "no binary 'experiments.pop'"),
        (["experiments.ppo"], JOB, "give --workdir=/..."),
        (["experiments.ppo", "--workdir=here"], JOB, "not 'here'"),
        (["experiments.ppo", "--process_id=1"], JOB, "leave out --process_id"),
        (["experiments.ppo", "--workdir=/x"], {}, "this is no SLURM job"),
    ],
)
def test_slurm_tells_what_is_wrong(cloud, tmp_path, args, env, expected):
  done = _slurm(cloud, tmp_path, *args, **env)
  assert done.returncode == 1 and expected in done.stderr
