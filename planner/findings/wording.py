"""Numbers in sentences. Nothing else is worded here."""

from __future__ import annotations


def plural(number: int, one: str, more: str = "") -> str:
    """*number* of what is called *one*: "1 cluster", "2 clusters"; *more*: where no -s makes it."""
    return f"{number} {one if number == 1 else more or one + 's'}"
