"""Two models on one device: how much slower each gets when the other runs, on two streams and in two processes.

A model here is a stack of square layers applied to a batch: with few rows it reads weights (decoding), with many it
computes (prefill).
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from findings import Findings

SHAPES = {"decode": 16, "prefill": 2048}
"""Rows of the batch."""

WIDTH = {"cuda": 8192, "cpu": 256}
LAYERS = {"cuda": 16, "cpu": 4}
WHAT = "two models side by side"


class Model:
    """Weights of their own, and steps through them."""

    def __init__(self, torch: Any, device: str, rows: int) -> None:
        self.torch = torch
        if device == "cpu":
            torch.set_num_threads(1)
        self.device = device
        kind = torch.bfloat16 if device == "cuda" else torch.float32
        width = WIDTH[device]
        self.layers = [torch.randn(width, width, dtype=kind, device=device) / width**0.5 for _ in range(LAYERS[device])]
        self.x = torch.randn(rows, width, dtype=kind, device=device)
        self.weight_bytes = sum(w.numel() * w.element_size() for w in self.layers)

    def run(self, seconds: float) -> float:
        """Steps a second over so many seconds, on a stream of its own."""
        torch = self.torch
        stream = torch.cuda.Stream() if self.device == "cuda" else None
        steps, began_s = 0, time.perf_counter()
        with torch.inference_mode(), torch.cuda.stream(stream) if stream else torch.inference_mode():
            while time.perf_counter() - began_s < seconds:
                for _ in range(4):
                    y = self.x
                    for w in self.layers:
                        y = y @ w
                steps += 4
                if stream:
                    stream.synchronize()
        return steps / (time.perf_counter() - began_s)


def side_by_side(found: Findings, torch: Any, device: str, *, seconds: float) -> None:
    """Alone, on two streams (threads), in two processes; for decoding and for prefill."""
    where = "" if device == "cuda" else "CPU: "
    for shape, rows in SHAPES.items():
        models = [Model(torch, device, rows) for _ in range(2)]
        for m in models:
            m.run(min(1.0, seconds))
        alone = models[0].run(seconds)
        found.value(
            f"{where}{shape} alone", alone, "steps/s", note=f"{models[0].weight_bytes / 2**20:.0f} MiB of weights"
        )
        rates = [0.0, 0.0]

        def work(i: int, models: list[Model] = models, rates: list[float] = rates) -> None:
            rates[i] = models[i].run(seconds)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        _say(found, f"{where}{shape} beside another, two streams", alone, rates)
        del models
        what = f"{where}{shape} beside another, two processes"
        found.attempt(what, lambda w=what, s=shape, a=alone: _say(found, w, a, in_processes(device, s, seconds)))


def _say(found: Findings, what: str, alone: float, rates: list[float]) -> None:
    slower = 2 * alone / sum(rates)
    found.value(
        what, slower, "x slower each", note=f"{' + '.join(format(r, '.3g') for r in rates)} steps/s; turns are 2"
    )


def in_processes(device: str, shape: str, seconds: float) -> list[float]:
    """Steps a second of two processes that begin together."""
    argv = [sys.executable, str(Path(__file__).parent), "--worker", device, shape, str(seconds)]
    pipes = subprocess.PIPE
    workers = [subprocess.Popen(argv, stdin=pipes, stdout=pipes, stderr=pipes, text=True) for _ in range(2)]
    try:
        for w in workers:
            if w.stdout is None or w.stdout.readline() != "ready\n":
                error = w.communicate()[1].strip().splitlines()
                raise RuntimeError(error[-1] if error else "the second process ended")
        for w in workers:
            if w.stdin is not None:
                w.stdin.write("go\n")
                w.stdin.flush()
        return [float(w.communicate(timeout=60 + 10 * seconds)[0]) for w in workers]
    finally:
        for w in workers:
            w.kill()
            w.wait()


def worker(torch: Any, device: str, shape: str, seconds: float) -> None:
    """One of `in_processes`."""
    model = Model(torch, device, SHAPES[shape])
    model.run(min(1.0, seconds))
    print("ready", flush=True)
    sys.stdin.readline()
    print(model.run(seconds), flush=True)
