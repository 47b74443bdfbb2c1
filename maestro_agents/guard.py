"""A child process that ends when its owner does, kill -9 included.

Between the owner and the child stands a guard: this file, run as a script. It starts the command, prints its pid, and
waits for the first of: the command ended, the owner said stop, the owner is gone. The last shows in two ways, so that
neither a forked copy of the owner nor an inherited pipe hides it: the pipe from the owner is closed, or the guard's
parent is no longer the owner (looked at each second). Then it ends the command: SIGTERM, a grace period, and SIGKILL for
the whole process group, children of the command included. Should the guard itself be killed, Linux tells the command (SIGTERM
on the parent's death).

The guard leads a session of its own: Ctrl-C in the owner's terminal reaches the owner only, which then ends things in
its own order. POSIX only (Linux, macOS). Imports nothing of Maestro, so that it starts in some 20 ms.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

GRACE_S: Final = 5.0
"""How long a command may take to end after SIGTERM."""

_LOOK_EVERY_S: Final = 1.0


@dataclass(kw_only=True)
class Guarded:
    """A running command and its guard."""

    #: The command's own process.
    pid: int
    guard: subprocess.Popen[bytes]
    grace_s: float
    _owner_pid: int

    def alive(self) -> bool:
        """The command runs."""
        return self.guard.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Wait for the command's end and return its exit status; raise TimeoutError where it outlives the time."""
        try:
            return self.guard.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"process {self.pid} did not end within {timeout_s:g} s") from None

    def kill(self) -> None:
        """Kill -9 the command alone, as a crash would; its guard then clears what is left of its group."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.wait(self.grace_s + 5)

    def stop(self) -> None:
        """End the command and all it started. Idempotent; in a forked copy of the owner it does nothing."""
        if os.getpid() != self._owner_pid:
            return
        assert self.guard.stdin is not None  # opened by `spawn`
        with contextlib.suppress(OSError, ValueError):
            self.guard.stdin.write(b"stop\n")
            self.guard.stdin.close()
        try:
            self.guard.wait(self.grace_s + 5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.guard.pid, signal.SIGKILL)
            self.guard.wait(5)
        if self.guard.stdout is not None:
            self.guard.stdout.close()


def spawn(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    remove_on_orphan: Path | None = None,
    grace_s: float = GRACE_S,
) -> Guarded:
    """Start ``command`` under a guard, its output appended to ``log``.

    ``env`` replaces the environment where given. ``remove_on_orphan`` is a folder that nobody else would remove if the
    owner died. Raises FileNotFoundError where there is no such program.
    """
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"there is no program {command[0]!r}")
    arguments = [str(os.getpid()), str(grace_s), str(remove_on_orphan or ""), *command]
    with log.open("ab") as out:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            env=None if env is None else dict(env),
            start_new_session=True,
        )
    assert guard.stdout is not None  # a pipe was asked for
    line = guard.stdout.readline()
    if not line.strip():
        guard.wait(grace_s)
        raise FileNotFoundError(f"{command[0]} could not be started: see {log}")
    return Guarded(pid=int(line), guard=guard, grace_s=grace_s, _owner_pid=os.getpid())


def _guard(owner_pid: int, grace_s: float, remove_on_orphan: str, command: list[str]) -> int:
    told_to_stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: told_to_stop.append(number))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, _nothing)  # a handler, not SIG_IGN, which the command would inherit
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            process_group=0,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - a guard has one thread
        )
    except OSError as e:
        sys.stderr.write(f"{command[0]}: {e}\n")
        return 127
    sys.stdout.write(f"{child.pid}\n")
    sys.stdout.flush()
    orphaned = _watch(child, owner_pid, sys.stdin.buffer, told_to_stop)
    if child.poll() is None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)  # the command, if it is still there, and what it left behind
    status = child.wait()
    if orphaned and remove_on_orphan:
        shutil.rmtree(remove_on_orphan, ignore_errors=True)
    return status if status >= 0 else 128 - status


def _nothing(_number: int, _frame: object) -> None:
    """Be woken, do nothing."""


def _end_with_parent() -> None:
    """Linux: have SIGTERM when the guard dies (prctl PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _watch(child: subprocess.Popen[bytes], owner_pid: int, pipe: IO[bytes], told_to_stop: list[int]) -> bool:
    """Return when the command ended, or stop was said (False), or the owner is gone (True)."""
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w)
    while child.poll() is None and not told_to_stop:
        if os.getppid() != owner_pid:
            return True
        ready, _, _ = select.select([pipe, wake_r], [], [], _LOOK_EVERY_S)
        if wake_r in ready:
            os.read(wake_r, 64)
        if pipe in ready:
            return not os.read(pipe.fileno(), 64)
    return False


if __name__ == "__main__":
    sys.exit(_guard(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4:]))
