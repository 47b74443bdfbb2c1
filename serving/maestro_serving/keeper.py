"""Between an agent and a server that shall outlive it for a while: this file, run as a script.

`maestro_agents.guard` ends a command as soon as its owner is gone. A keeper waits: while its lease is renewed (the owner
touches a file) the command runs; once nobody has touched the file for ``lease_s`` it ends the command with all that it
started. So a node agent that was killed finds its servers running when it comes back, and where it does not come back nothing
is left. The lease is counted on the keeper's own clock: a machine that slept, or whose clock was set, loses nothing.

It writes who it is, and whom it keeps, into a file before the command can do anything, and removes the file at the end. SIGTERM
ends the command at once, in order. Should the keeper itself be killed, Linux tells the command (SIGTERM on the parent's death),
and the agent ends what is left of its process group. The command's output is bounded: a log that has grown too large is moved
aside and begun anew; what was moved before is lost.

POSIX only. Imports nothing of Maestro, so that it starts in some 20 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

LOOK_EVERY_S = 0.25


def started_at(pid: int) -> str:
    """When a process began, in the system's own words: with its pid it names the process, also after a reboot.

    "" where there is no such process (any more).
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            fields = f.read().rpartition(")")[2].split()
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            boot = f.read().strip()
    except OSError:
        if os.path.isdir("/proc/self"):
            return ""
        said = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        state, _, at = said.stdout.strip().partition(" ")
        return "" if state.startswith("Z") else at.strip()
    return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def _keep(said: dict[str, object], command: list[str]) -> int:
    file, lease, log = str(said["file"]), str(said["lease"]), str(said["log"])
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _nothing)  # a handler, not SIG_IGN, which the command would inherit
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            process_group=0,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - a keeper has one thread
        )
    except OSError as e:
        sys.stderr.write(f"{command[0]}: {e}\n")
        return 127
    me = os.getpid()
    who = {"keeper": me, "keeper_started": started_at(me), "pid": child.pid, "pid_started": started_at(child.pid)}
    new = f"{file}.new"
    with open(new, "w", encoding="utf-8") as f:
        json.dump({**said, **who}, f)
    os.replace(new, file)
    sys.stdout.write(f"{child.pid}\n")
    sys.stdout.close()
    _watch(child, lease, float(str(said["lease_s"])), log, int(str(said["log_bytes"])), told)
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(float(str(said["grace_s"])))
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)  # the command, if it is still there, and what it left behind
    status = child.wait()
    with contextlib.suppress(OSError):
        os.unlink(file)
    return status if status >= 0 else 128 - status


def _nothing(_number: int, _frame: object) -> None:
    """Be woken, do nothing."""


def _end_with_parent() -> None:
    """Linux: have SIGTERM when the keeper dies (prctl PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _watch(
    child: subprocess.Popen[bytes], lease: str, lease_s: float, log: str, log_bytes: int, told: list[int]
) -> None:
    """Return when the command ended, or its end was asked for, or nobody renews the lease."""
    renewed, renewed_at_s = -1.0, time.monotonic()
    while child.poll() is None and not told:
        with contextlib.suppress(OSError):
            touched = os.stat(lease).st_mtime
            if touched != renewed:
                renewed, renewed_at_s = touched, time.monotonic()
        if time.monotonic() - renewed_at_s > lease_s:
            sys.stderr.write(f"nobody has asked for this server in {lease_s:g} s: it is ended\n")
            return
        with contextlib.suppress(OSError):
            if os.stat(log).st_size > log_bytes:
                shutil.copyfile(log, f"{log}.1")
                os.truncate(log, 0)  # it is written by appending, so that the next line is its first
        time.sleep(LOOK_EVERY_S)


if __name__ == "__main__":
    sys.exit(_keep(json.loads(sys.argv[1]), sys.argv[2:]))
