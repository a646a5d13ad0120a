"""How much is listed of what there may be millions of."""

from __future__ import annotations

LISTED_RUNS = 1000
"""Leaked runs that are listed, in ``lost/`` and in its JSON; any other can be opened by name."""
