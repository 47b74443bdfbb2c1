"""The measured tables of README and docs are what the files say that the commands wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="docs lie in a checkout only")
def test_no_table_was_written_by_hand() -> None:
    """Writing them again changes nothing."""
    script = ROOT / "docs" / "results" / "tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
