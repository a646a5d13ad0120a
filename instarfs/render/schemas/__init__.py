"""What every JSON that this program writes looks like, as JSON Schemas that close every object.

A key that is not here is not written: tests hold what is written against them. They are Python, so
that what several of them share is said once, and words of closed lists come from those lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from instarfs.render.schemas import check, image, many, repair
from instarfs.render.schemas.words import Schema

_DIALECT = "https://json-schema.org/draft/2020-12/schema"

_MAKERS: Mapping[str, tuple[str, Callable[[], Schema]]] = MappingProxyType(
    {
        "bitmaps": ("image/bitmaps.json", image.bitmaps),
        "chain": ("image/chain.json", image.chain),
        "check": ("check/result.json, and instarfs check --output=json", check.result),
        "finding": ("a line of check/findings.jsonl", check.finding),
        "header": ("image/header.json", image.header),
        "info": ("image/info.json, and instarfs info --output=json", image.info),
        "map": ("image/map.json, and instarfs map --output=json", image.guest_map),
        "plan": ("repair/plan/TIER.json, and instarfs plan --output=json", repair.plan),
        "repair": (
            "repair/result.json, and instarfs rescue --in-place --output=json",
            repair.outcome,
        ),
        "rescue": ("rescue/plan.json, and instarfs rescue --output=json", many.rescue),
        "scan": ("a line of instarfs scan --output=jsonl", many.scan),
        "snapshot": ("snapshots/N/info.json", image.snapshot),
        "triage": ("lost/triage.json", repair.triage),
    }
)

SUBJECTS: Mapping[str, str] = MappingProxyType({name: of for name, (of, _) in _MAKERS.items()})
"""Of what each schema is, by its name."""


def schema(name: str) -> Schema:
    """The JSON Schema of that name. Raises KeyError."""
    subject, make = _MAKERS[name]
    return {"$schema": _DIALECT, "$id": f"urn:instarfs:{name}", "title": subject, **make()}
