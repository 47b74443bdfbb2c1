"""What Python runs by itself at the start of every process below `maestro run`, before the program.

It lets the ``sitecustomize`` that it hides have its turn, and waits for the program to import LangGraph or the OpenAI SDK. When
the first such import is done it says ``maestro.install()``, with the settings of the environment. Before that nothing of
Maestro's is imported, and in a process that uses neither never. Child processes inherit PYTHONPATH, and so this.

It may run on a Python that has no Maestro, or is too old for it: then one line says so and the program runs as without us.
"""

from __future__ import annotations

import os
import sys
import threading
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec

TYPE_CHECKING = False  # `typing` itself would cost every process some milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType
    from typing import Any

WATCHED = frozenset({"openai", "langgraph.graph", "langgraph.pregel", "langgraph.func", "langgraph.prebuilt"})
"""They import each other: what is done at the end is done when the outermost of them is ready."""


class Watch:
    """A finder that finds as the others do, and calls ``then`` once, when the first watched import is done."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then
        self._depth = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._follow(spec)
                    return spec
        return None

    def _follow(self, spec: ModuleSpec) -> None:
        loader: Any = spec.loader
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: ModuleType) -> None:
            if module.__name__ != spec.name:  # a loader of several modules
                execute(module)
                return
            self._depth.n = getattr(self._depth, "n", 0) + 1
            try:
                execute(module)
            finally:
                self._depth.n -= 1
            if not self._depth.n and self in sys.meta_path:
                sys.meta_path.remove(self)
                self._then()

        loader.exec_module = exec_module


def install() -> None:
    """Put Maestro on this process, or say in one line why not."""
    try:
        from maestro_langgraph import maestro

        maestro.install()
    except Exception as e:
        known = not isinstance(e, ImportError)
        why = " ".join(str(e).split()) if known else f"{sys.executable} cannot import Maestro ({e}); install it there"
        sys.stderr.write(f"maestro run: {why}: this process runs as without Maestro\n")


def hand_on() -> None:
    """Run the ``sitecustomize`` that would have run without us, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = sys.modules["sitecustomize"] = module_from_spec(spec)
        spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, Watch(install))  # pyright: ignore[reportArgumentType]
    hand_on()
