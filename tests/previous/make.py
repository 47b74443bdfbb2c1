"""Make the slim wheel of the release before, which `tests/test_upgrade.py` runs beside this one.

    python tests/previous/make.py dist/maestro_agents-0.1.0-py3-none-any.whl

It keeps what an app, a scheduler and a node's reports need (client, gate, queue with its Lua, scheduler, fleet file) and drops the
rest: trained model, simulator, samples, benches, other commands, engines. The same wheel gives the same bytes. When a release is
out, its wheel takes the place of the one that lies here.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path
from typing import Final

KEPT: Final = re.compile(
    r"maestro_agents/(?!cli/|simulator/|_samples/)[^.]*\.(py|lua)"
    r"|maestro_agents/cli/(__init__|__main__|serve)\.py"
    r"|maestro_langgraph/.*\.py"
    r"|maestro_serving/(__init__|vllm)\.py"
    r"|.*\.dist-info/METADATA"
)
LIMIT_BYTES: Final = 500_000


def slim(wheel: Path, folder: Path) -> Path:
    """Write the slim copy of a wheel into a folder. Raises ValueError where it is larger than a repository should carry."""
    name, version, _ = wheel.name.split("-", 2)
    made = folder / f"{name}-{version}-slim.whl"
    with zipfile.ZipFile(wheel) as full, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for entry in sorted(full.namelist()):
            if KEPT.fullmatch(entry):
                out.writestr(zipfile.ZipInfo(entry), full.read(entry), zipfile.ZIP_DEFLATED)
    if made.stat().st_size > LIMIT_BYTES:
        raise ValueError(f"{made} has {made.stat().st_size} bytes: {LIMIT_BYTES} at most")
    return made


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(slim(Path(sys.argv[1]), Path(__file__).resolve().parent))
