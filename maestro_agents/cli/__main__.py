"""``python -m maestro_agents.cli`` is ``maestro``."""

from __future__ import annotations

from maestro_agents.cli import main

main()
