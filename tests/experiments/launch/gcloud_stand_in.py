"""Plays `gcloud` for tpu_pod.sh: a queued resource that moves through its states, and two hosts that are folders.

Commands for the hosts run for real, with the host's folder as home. What happens when is told by `plan.json` in the
folder TPU_STAND_IN; every call is recorded in its `calls.jsonl`.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(os.environ["TPU_STAND_IN"])
HOSTS = ("host0", "host1")

# Makes what `tpu_host.sh install` makes, without a network: a .venv whose Python is a training that waits for its end.
PYTHON3 = """\
#!/bin/bash
case "$*" in
*venv*)
    mkdir -p .venv/bin
    cat >.venv/bin/python <<'END'
#!/bin/bash
printf '%s\\n' "$*" >>"$HOME/trainings"
printf '%s\\n' "$@" >"$HOME/arguments"
trap 'exit 0' USR1 TERM
while [ ! -e "$HOME/end" ]; do sleep 0.02; done
status=$(cat "$HOME/end")
rm "$HOME/end"
exit "$status"
END
    chmod +x .venv/bin/python
    ;;
esac
"""


def main(arguments: list[str]) -> int:
    plan_file = ROOT / "plan.json"
    with (ROOT / "plan.lock").open("w") as lock:  # a test may change the plan while the script runs
        fcntl.flock(lock, fcntl.LOCK_EX)
        plan: dict[str, Any] = json.loads(plan_file.read_text())
        with (ROOT / "calls.jsonl").open("a") as calls:
            calls.write(json.dumps(arguments) + "\n")
        verb = " ".join(argument for argument in arguments[:4] if not argument.startswith("-"))
        try:
            return _play(verb.removeprefix("compute tpus "), arguments, plan)
        finally:
            plan_file.write_text(json.dumps(plan))


def _play(verb: str, arguments: list[str], plan: dict[str, Any]) -> int:
    """`plan["slices"]` lists, for each slice to be made, what the looks at it find; the last answer stays. A look is a
    state, or a state with what befalls the hosts: "SUSPENDED preempted", "ACTIVE end 0".
    """
    if plan.get("silent"):  # no answer at all, so many times
        plan["silent"] -= 1
        return _error("UNAVAILABLE: the service is not there")
    looks = plan["slices"][0] if plan["made"] else []
    if verb == "queued-resources describe":
        if not plan["made"]:
            return _error("NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/q' was not found")
        state, _, event = (looks.pop(0) if len(looks) > 1 else looks[0]).partition(" ")
        _befall(event)
        print(state)
    elif verb == "queued-resources create":
        if plan["made"]:
            return _error("ALREADY_EXISTS: Resource 'projects/p/locations/z/queuedResources/q' already exists")
        plan["made"] = True
        for host in HOSTS:
            shutil.rmtree(ROOT / host, ignore_errors=True)
            (ROOT / host).mkdir()
    elif verb == "queued-resources delete":
        _befall("preempted")
        plan["made"] = False
        plan["slices"].pop(0)
    elif verb in ("tpu-vm scp", "tpu-vm ssh"):
        if plan.get("closed"):  # hosts that do not let anybody in, so many times
            plan["closed"] -= 1
            return _error("Connection refused")
        assert "--worker=all" in arguments
        if verb == "tpu-vm scp":
            source, destination = arguments[4:6]
            for host in HOSTS:
                shutil.copy(source, ROOT / host / destination.partition(":")[2])
            return 0
        (command,) = (a.removeprefix("--command=") for a in arguments if a.startswith("--command="))
        return max(_on(host, command) for host in HOSTS)
    else:
        return _error(f"unknown command {verb}")
    return 0


def _on(host: str, command: str) -> int:
    tools = ROOT / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "python3").write_text(PYTHON3)
    (tools / "python3").chmod(0o755)
    environment = {**os.environ, "HOME": str(ROOT / host), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", command], cwd=ROOT / host, env=environment).returncode


def _befall(event: str) -> None:
    kind, _, value = event.partition(" ")
    for host in HOSTS:
        if kind == "end":  # the training of every host ends with this status, and the next look finds it ended
            (ROOT / host / "end.new").write_text(value)
            (ROOT / host / "end.new").rename(ROOT / host / "end")  # never seen empty
            _settle(host)
        elif kind in ("terminated", "preempted"):
            # As at a shutdown: every process gets SIGTERM, the shell around the training too, then SIGKILL.
            for process in _processes(host):
                _signal(process, "TERM" if kind == "terminated" else "KILL")
            _settle(host)


def _settle(host: str) -> None:
    """Returns when no training runs on the host."""
    lock = ROOT / host / "neuronet-jax" / "training.lock"
    if lock.exists():
        subprocess.run(["flock", "--timeout", "10", str(lock), "true"], check=True)


def _processes(host: str) -> list[int]:
    """The training of a host and its shell, by the home in their environment."""
    mark = f"HOME={ROOT / host}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # ended, or another user's
            continue
    return found


def _signal(process: int, name: str) -> None:
    subprocess.run(["kill", f"-{name}", str(process)], stderr=subprocess.DEVNULL)


def _error(text: str) -> int:
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
