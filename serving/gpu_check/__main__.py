"""Measure what moving weights and KV memory costs on this machine: ``python3 serving/gpu_check --json gpu.json``.

Needs Python 3.10 and, for all that a GPU does, PyTorch with CUDA. What cannot be measured is said line by line, with its cause.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import beside
import moves
import vmm
from findings import GB, Findings

SIZES = (1, 2, 4, 8, 16)


def the_torch() -> tuple[Any, str]:
    """PyTorch, or None and why not."""
    try:
        import torch
    except Exception as e:
        return None, f"PyTorch cannot be imported ({type(e).__name__}: {e})"
    return torch, ""


def device_of(torch: Any) -> dict[str, Any]:
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name,
        "count": torch.cuda.device_count(),
        "memory_mib": p.total_memory >> 20,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def measure(found: Findings, sizes: list[int], folder: Path | None, seconds: float) -> None:
    """All that this machine has."""
    torch, why = the_torch()
    cuda = torch is not None and torch.cuda.is_available()
    if torch is not None and not cuda:
        why = f"PyTorch {torch.__version__} sees no CUDA device"
    if cuda:
        found.device = device_of(torch)
    found.attempt("host -> host", lambda: moves.host_memory(found, sizes))
    found.attempt("disk -> host", lambda: moves.disk(found, sizes, folder))
    if cuda:
        found.attempt("host <-> HBM", lambda: moves.hbm(found, sizes, folder, torch))
    else:
        for what in (*moves.HBM_MOVES, "pinned host -> HBM, all GPUs together"):
            found.skip(what, why)
    found.attempt(vmm.WHAT, lambda: vmm.blocks(found, vmm.load()))
    if torch is None:
        found.skip(beside.WHAT, why)
        return
    if not cuda:
        found.skip(f"{beside.WHAT} on a GPU", f"{why}; below: the same on the CPU, to see that it runs")
    name = "cuda" if cuda else "cpu"
    found.attempt(beside.WHAT, lambda: beside.side_by_side(found, torch, name, seconds=seconds))


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sizes-gb", type=float, nargs="+", default=SIZES, help="Sizes of the moves, in GB.")
    parser.add_argument("--folder", type=Path, help="On the disk that holds weights. Default: the temporary folder.")
    parser.add_argument("--seconds", type=float, default=5.0, help="Of each run of two models side by side.")
    parser.add_argument("--json", type=Path, help="Write all that was found there.")
    parser.add_argument("--write-profile", action="store_true", help="Print what goes into simulator/profiles.")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        device, shape, seconds = args.worker
        beside.worker(the_torch()[0], device, shape, float(seconds))
        return
    found = Findings(say=lambda line: print(line, flush=True))
    measure(found, [int(s * GB) for s in args.sizes_gb], args.folder, args.seconds)
    print(f"\n{found.table()}\n")
    if args.write_profile:
        print(found.profile())
    if args.json:
        args.json.write_text(json.dumps(found.to_json(), indent=1) + "\n")
    print(f"{len(found.results)} measured, {len(found.not_measured)} not ({found.to_json()['label']})")


if __name__ == "__main__":
    sys.exit(main())
