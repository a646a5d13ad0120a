"""The schemas of what a check found: `instarfs.render.check`, `instarfs.render.findings`."""

from __future__ import annotations

from instarfs.render.schemas.words import (
    Schema,
    array,
    either,
    flag,
    matching,
    maybe,
    moment,
    number,
    record,
    reference,
    tally,
    text,
    word,
)
from instarfs.repair.outcome import Status
from planner.check.report import EXIT_CODES
from planner.findings.kinds import OWNERS_LIMIT, FindingKind, Severity, Structure
from planner.repair.plan import RepairTier, RescueTier

KINDS = [kind.label for kind in FindingKind]
STRUCTURES = [structure.label for structure in Structure]

FILENAME = text("the image, as it was named")
EXIT_CODE: Schema = {
    "enum": [0, 1, 2, 3, 63],
    "description": "of the command, as instarfs check ends",
}
PLAN_ID = matching("the plan's id, which can be quoted", "[0-9a-f]{12}")
TIER = word("how far a repair may go", [tier.value for tier in (*RepairTier, *RescueTier)])


def verdict(meaning: str) -> Schema:
    """A word that says what an image is."""
    return word(meaning, EXIT_CODES)


def counters() -> dict[str, Schema]:
    """Those of `qemu-img check`, by key."""
    return {
        "check-errors": number("what could not be looked at"),
        "corruptions": number("what is, or may become, wrong"),
        "leaks": number("clusters that are counted as used and that nothing refers to"),
        "image-end-offset": number("behind the last cluster that is used, bytes"),
        "total-clusters": number("guest clusters of the disk"),
        "allocated-clusters": number("those of them that are in the file"),
        "fragmented-clusters": number("those that do not lie behind the one before them"),
        "compressed-clusters": number("those that are compressed"),
    }


def image_error() -> dict[str, Schema]:
    """What an image has in a field that makes no sense."""
    return {
        "field": text("the field, as QEMU's specification calls it"),
        "value": either("what was found there", {"type": "integer"}, {"type": "string"}),
    }


def left_findings() -> Schema:
    """What a repair leaves."""
    row = record(
        "findings of one kind",
        {
            "kind": word("the kind", KINDS),
            "count": number("how many", least=1),
            "reason": text("why they stay"),
        },
    )
    return array("what stays, and why", row)


def numbers_of_repair() -> dict[str, Schema]:
    """Found, planned, repaired, left; the same wherever they are shown."""
    return {
        "repair-incomplete": flag("whether less was done than asked for"),
        "tier": maybe(TIER),
        "plan-id": maybe(PLAN_ID),
        "found": number("findings before"),
        "planned": number("those that the plan mends"),
        "repaired": number("those that are mended"),
        "left": number("those that stay"),
        "left-findings": left_findings(),
        "suspects": array(
            "leaked clusters that look like something lost, the first of them",
            text("one of them, in a sentence"),
        ),
        "suspect-count": number("how many there are of those"),
        "undo-file": maybe(text("what it can be taken back with")),
        "reason": maybe(text("why not, or what else is worth knowing")),
    }


def interrupted_repair() -> Schema:
    """A repair that did not come to its end."""
    return record(
        "a repair that was interrupted and is taken back before another",
        {
            "message": text("what is known of it"),
            "undo-file": text("what it is taken back with"),
            "tier": maybe(TIER),
            "plan-id": maybe(PLAN_ID),
        },
    )


def _error(meaning: str) -> Schema:
    return record(meaning, {**image_error(), "message": text("the same as a sentence")})


def result() -> Schema:
    """Of a check; several images, a list."""
    unchecked = record(
        "an image that was not checked, among others",
        {
            "filename": FILENAME,
            "error": record("why", {"message": text("why it was not checked")}),
            "exit-code": EXIT_CODE,
        },
    )
    one = reference("image")
    listed = array("of several images", either("of one of them", one, unchecked))
    return {
        **either("what a check found, QEMU's keys among its own", one, listed),
        "$defs": {"image": _result_of_one()},
    }


def _result_of_one() -> Schema:
    # qemu-img leaves out what is 0, and so do the commands.
    always = {key: schema for key, schema in counters().items() if key == "check-errors"}
    sometimes = {key: schema for key, schema in counters().items() if key not in always}
    cut_off = record(
        "a file that is too short",
        {"ends-at": number("where it ends, bytes"), "needs": number("where it should, bytes")},
    )
    return record(
        "what a check found",
        {
            "filename": FILENAME,
            "format": word("always the same", ["qcow2"]),
            **always,
            "verdict": verdict("what the image is"),
            "exit-code": EXIT_CODE,
            "dirty": flag("the header's dirty bit: it was not closed properly"),
            "corrupt": flag("the header's corrupt bit: QEMU has marked it"),
            "image-in-use": flag("whether a program had it open for writing"),
            "changed-during-check": flag("whether it was written to meanwhile"),
            "complete": flag("whether every table could be read"),
            "refcount-rebuild-needed": flag("whether a repair would make refcounts anew"),
            "cut-off": maybe(cut_off),
            "compressed-looked-at": flag("whether compressed clusters were unpacked"),
            "counts": tally("findings by kind", KINDS),
        },
        {
            **sometimes,
            **_live(),
            "corruptions-fixed": number("by how much a repair lowered corruptions"),
            "leaks-fixed": number("by how much a repair lowered leaks"),
            "error": _error("why the image cannot be read at all"),
            "luks-error": _error("what is wrong with its LUKS header"),
            "stopped": array(
                "tables that could not be read", _error("one of them, and what stood there")
            ),
            "repair-status": word("how the repair ended", list(Status)),
            **numbers_of_repair(),
            "interrupted-repair": interrupted_repair(),
            "image-gone": word("of a mount: its file has no name any more", ["deleted", "moved"]),
            "preview": record(
                "of a preview: what is laid over the image", {"tier": TIER, "plan-id": PLAN_ID}
            ),
        },
    )


def _live() -> dict[str, Schema]:
    """Of an image that was written to."""
    return {
        "as-of": maybe(moment("the moment that the verdict is of, if there was one")),
        "in-use": flag("whether a program had it open for writing at the end"),
        "confirmed": number("findings that were looked at again, and held"),
        "in-motion": number("words and findings that changed between the last two looks"),
    }


def _places() -> dict[str, Schema]:
    """Where a word is."""
    return {
        "snapshot": maybe(number("which snapshot's tables it is in; null: the active ones")),
        "l1-index": number("the L1 entry"),
        "l2-index": number("the L2 entry"),
        "index": number("the entry of another table"),
        "guest-offset": number("on the guest's disk, bytes"),
    }


def owner(more: dict[str, Schema] | None = None) -> Schema:
    """Who uses a cluster; *more*: what else is said of it."""
    always = {
        "structure": word("what it is", STRUCTURES),
        "class": word("whether the guest's bytes are in it", ["guest", "metadata"]),
    }
    return record("a user of the cluster", always | (more or {}), _places())


def finding() -> Schema:
    """A line a finding."""
    value = either(
        "what was found there; a table's word as 0x and 16 digits",
        {"type": "integer", "minimum": 0},
        {"type": "string"},
    )
    places = _places()
    of_cluster = array("who uses the cluster, the first of them", owner())
    owners = {**of_cluster, "maxItems": OWNERS_LIMIT}
    return record(
        "a finding; what does not apply is left out",
        {
            "kind": word("what is wrong", KINDS),
            "severity": word("what it counts as", [severity.label for severity in Severity]),
            "structure": word("where it is", STRUCTURES),
            "host-offset": number("in the image file, bytes"),
            "length": number("bytes"),
            "count": number("how many there are of it", least=1),
            "found": value,
            "repaired-by": maybe({**TIER, "description": "the tier that mends it, or decides it"}),
            "message": text("the same as a sentence"),
        },
        {
            **places,
            "guest-length": number("on the guest's disk, bytes"),
            "expected": {**value, "description": "what should be there"},
            "left-because": text("why no tier mends it"),
            "owners": owners,
        },
    )
