"""The events file (``MAESTRO_EVENTS``): what ended in this process, one JSON line each, for whoever wants to count.

A line is an `Observation` (``"kind": "stage"``) or a `RunEnd` (``"kind": "run"``) as it is encoded for the observation log:
names, ids and numbers; a field that is missing has its default. Several processes may share a file.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from pathlib import Path
from typing import Final

from maestro_agents.core import Observation, RunEnd

log = logging.getLogger("maestro")

PENDING_LIMIT: Final = 10_000
"""Lines that may wait for a disk that does not keep up; the oldest go first."""

BATCH: Final = 1_000
"""Lines of one write."""


class EventFile:
    """Lines on their way to a file. Every batch is one append of whole lines; the file may be moved away meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self._lines: deque[str] = deque(maxlen=PENDING_LIMIT)
        self._told = False
        self._torn = False

    def add(self, entry: Observation | RunEnd) -> None:
        """Note an entry, to be written later. From any thread."""
        kind = "run" if isinstance(entry, RunEnd) else "stage"
        self._lines.append(f'{{"kind":"{kind}",{entry.encode()[1:]}\n')

    def write(self) -> None:
        """Append what was noted. What cannot be written is dropped, and said once. From any thread."""
        while self._lines:
            batch = self._batch()
            try:
                self._append(batch)
            except OSError as e:
                if not self._told:
                    self._told = True
                    log.warning(
                        "nothing is recorded in %s: %s. Correct MAESTRO_EVENTS; your calls are not affected.",
                        self.path,
                        e.strerror or e,
                    )

    def _batch(self) -> bytes:
        lines: list[str] = []
        with contextlib.suppress(IndexError):
            while len(lines) < BATCH:
                lines.append(self._lines.popleft())
        return "".join(lines).encode()

    def _append(self, batch: bytes) -> None:
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(file, (b"\n" if self._torn else b"") + batch)
            self._torn = written < len(batch) + self._torn
        finally:
            os.close(file)
        if self._torn:
            raise OSError("the disk is full")
