"""What a stage will cost. `features` runs where the prompt is; everything else sees numbers only."""

from __future__ import annotations
