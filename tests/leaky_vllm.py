"""A stand-in for the ``vllm`` program whose memory grows: the emulator, and a thread that keeps what it takes.

``LEAK_BYTES_PER_S`` in its environment says how fast. Options of vLLM that it does not know are ignored.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading

from maestro_agents.cli import main as maestro


def leak(bytes_per_s: int) -> None:
    kept: list[bytes] = []
    pause = threading.Event()
    while not pause.wait(0.02):
        kept.append(b"x" * (bytes_per_s // 50))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    args, _ = parser.parse_known_args()
    threading.Thread(target=leak, args=(int(os.environ["LEAK_BYTES_PER_S"]),), daemon=True).start()
    sys.argv = ["maestro", "emulate", "--model", args.served_model_name, "--host", args.host, "--port", str(args.port)]
    maestro()


if __name__ == "__main__":
    main()
