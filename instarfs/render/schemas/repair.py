"""The schemas of repairs and of what leaked: `instarfs.render.repair`, `instarfs.render.triage`."""

from __future__ import annotations

from instarfs.render.schemas.check import (
    FILENAME,
    KINDS,
    PLAN_ID,
    STRUCTURES,
    TIER,
    counters,
    interrupted_repair,
    left_findings,
    numbers_of_repair,
    owner,
    verdict,
)
from instarfs.render.schemas.image import snapshot_of_list
from instarfs.render.schemas.words import (
    Schema,
    array,
    either,
    flag,
    matching,
    maybe,
    number,
    record,
    tally,
    text,
    word,
    words,
)
from instarfs.repair.outcome import Status
from planner.check.classify import Look
from planner.repair.plan import StageKind
from planner.triage.l1_holes import PlaceKind
from planner.triage.losses import CauseKind

_LOOKS = [look.label for look in Look]
_STAGES = [stage.name.lower() for stage in StageKind]


def plan() -> Schema:
    """A dry run, or why there is none."""
    return either("what a repair would do", _proposal(), _refusal())


def _proposal() -> Schema:
    stage = record(
        "what is written before the next flush",
        {
            "name": word("which", _STAGES),
            "meaning": text("what it does"),
            "sectors": number("sectors that it writes"),
            "changed-bytes": number("bytes in them that change"),
        },
    )
    return record(
        "a plan, and what proved it",
        {
            "filename": FILENAME,
            "tier": TIER,
            "status": word("whether it changes anything", ["planned", "nothing-to-do"]),
            "plan-id": PLAN_ID,
            "found": number("findings"),
            "planned": number("those that it mends"),
            "left": number("those that it leaves"),
            "complete": flag("whether it mends all that the tier is for"),
            "plan-id-must-be-quoted": flag("whether it is refused without its id"),
            "plan-id-must-be-quoted-because": array("why", text("a reason")),
            "suspects": array(
                "leaked clusters that look like something lost", text("one of them, in a sentence")
            ),
            **_shared_clusters(),
            **_numbers_of_triage(),
            "leaks-in-words": array("what the leaked clusters look like", text("a sentence")),
            "left-findings": left_findings(),
            "predicted": record("the counters that a check will give", counters()),
            "predicted-verdict": verdict("and its verdict"),
            "file-size-before": number("bytes"),
            "file-size-after": number("bytes"),
            "stages": array("in their order", stage),
            "edit-count": number("changes"),
            "edits": array("each of them", _edit()),
        },
    )


def _shared_clusters() -> dict[str, Schema]:
    place = maybe(number("where its bytes are then, in the image file; null: nowhere"))
    cluster = record(
        "a cluster, and who had it; at least one of them reads wrong bytes",
        {
            "offset": number("in the image file, bytes"),
            "owners": array("the first of them", owner({"offset-after": place})),
        },
    )
    return {
        "shared-clusters": array("those that have one owner then, the first of them", cluster),
        "shared-cluster-count": number("how many there are"),
    }


def _edit() -> Schema:
    content = "([0-9a-f]{2})*(\\.\\.\\.)?"
    return record(
        "neighbouring entries that are changed for one reason",
        {
            "stage": word("when", _STAGES),
            "structure": word("of what", STRUCTURES),
            "offset": number("in the image file, bytes"),
            "length": number("bytes"),
            "count": number("entries"),
            "finding": word("why", KINDS),
            "before": matching("the bytes before, the first of them", content),
            "after": matching("the bytes after, the first of them", content),
        },
    )


def _refusal() -> Schema:
    return record(
        "why there is no plan",
        {
            "filename": FILENAME,
            "tier": TIER,
            "status": word("always the same", ["refused"]),
            "refusal": _REFUSAL,
            "finding": maybe(word("the kind of finding that is in the way", KINDS)),
            "reason": text("why"),
            "way-out": maybe(text("what can be done")),
        },
    )


_REFUSAL = matching("the kind of refusal", "[A-Z_]+")


def outcome() -> Schema:
    """What the last word that was written into a control file did."""
    one = {
        "errno": maybe(matching("what the write failed with", "E[A-Z0-9]+")),
        "refusal": maybe(_REFUSAL),
        "finding": maybe(word("the kind of finding that was in the way", KINDS)),
        **numbers_of_repair(),
        "leaks-fixed": number("by how much leaks were lowered"),
        "corruptions-fixed": number("by how much corruptions were lowered"),
        "interrupted-repair-taken-back": flag("whether one was taken back first"),
        "undoable": number("repairs that can be taken back now, one by one"),
        "no-longer-undoable": number("repairs that cannot: it was written to after them"),
        "trimmed-bytes": number("disk space that was given back"),
        "verdict": maybe(verdict("of the check after it")),
        "counters": maybe(record("of the check after it", counters())),
    }
    told = {"filename": FILENAME, "status": word("how it ended", list(Status))}
    nothing = {"filename": FILENAME, "status": word("nothing yet", ["none", "interrupted"])}
    pending = {"interrupted-repair": interrupted_repair()}
    return either(
        "what the last word did",
        record("what became of it", told | one, pending | _shared_clusters()),
        record("no word was written since it was mounted", nothing, pending),
    )


def triage() -> Schema:
    """What the leaked clusters look like."""
    run = record(
        "neighbouring leaked clusters",
        {
            "file": matching("their bytes, in the mounted tree", "lost/[0-9]+"),
            "offset": number("in the image file, bytes"),
            "length": number("bytes"),
            **_looks(),
            "mapped-by": array("offsets of former tables that lead there", number("bytes")),
        },
    )
    return record(
        "what the leaked clusters look like",
        {
            "filename": FILENAME,
            "torn": flag("whether the image was written to meanwhile"),
            **_numbers_of_triage(),
            "leaked-bytes": number("all of them"),
            "in-words": array("the same for a reader", text("a sentence")),
            "tables": array("those that look like tables, the first of them", _table()),
            "run-count": number("runs of leaked clusters"),
            "runs": array("the first of them", run),
        },
    )


def _looks() -> dict[str, Schema]:
    return {
        "looks-like": tally("clusters by what they look like", _LOOKS),
        "starts-with": tally("data clusters by what their first bytes are known for"),
    }


def _numbers_of_triage() -> dict[str, Schema]:
    return {
        "leaked-clusters": number("how many there are"),
        "leaked-clusters-looked-at": number("how many of them were looked at"),
        **_looks(),
        "suspect-count": number("tables among them that look lost"),
        "leaked-clusters-with-data": number("those that hold data"),
        "may-have-come-from": words("where that data may have been", list(CauseKind)),
        "missing-bytes-at-most": number("of the guest's disk, in them"),
        "clusters-without-refcounts": number("that look free and hold data"),
        "lost-snapshots": array(
            "that the snapshot table names and the header does not count", _lost_snapshot()
        ),
    }


def _lost_snapshot() -> Schema:
    of_list = snapshot_of_list()
    return record(
        "a snapshot that is lost",
        {
            **{key: of_list[key] for key in ("id", "name", "date-sec", "vm-state-size")},
            "l1-table-offset": number("of its L1 table, in the image file, bytes"),
            "l1-entries": number("of its L1 table"),
        },
    )


def _table() -> Schema:
    place = record(
        "neighbouring L1 entries where it may have stood",
        {
            "l1-entry": word("what is there now", list(PlaceKind)),
            "snapshot": maybe(number("whose L1 table it is; null: the active one")),
            "l1-index": number("the first"),
            "count": number("how many"),
            "guest-offset": number("of what they map, bytes"),
            "guest-length": number("of what they map, bytes"),
        },
    )
    return record(
        "a former table",
        {
            "offset": number("in the image file, bytes"),
            "looks-like": word("what it was", [Look.L1_TABLE.label, Look.L2_TABLE.label]),
            "looks-lost": flag("whether freeing it could bury something"),
            "message": text("the same as a sentence"),
            "entries": number("words of it that are not zero"),
            "plausible-entries": number("those that could be entries"),
            "targets": number("clusters that they lead to"),
            "leaked-targets": number("those of them that are leaked, too"),
            "maps": record("what those clusters look like", _looks()),
            "may-have-stood": array("where, the first of them", place),
            "may-have-stood-count": number("L1 entries in all"),
            "snapshot": maybe(_lost_snapshot()),
        },
    )
