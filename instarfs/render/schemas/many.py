"""The schemas of a scan and of a rescue: `instarfs.render.scan`, `instarfs.render.rescue`."""

from __future__ import annotations

from instarfs.render.schemas.check import (
    EXIT_CODE,
    FILENAME,
    PLAN_ID,
    counters,
    interrupted_repair,
    verdict,
)
from instarfs.render.schemas.image import header_numbers
from instarfs.render.schemas.words import (
    Schema,
    array,
    either,
    flag,
    fraction,
    matching,
    maybe,
    moment,
    number,
    record,
    tally,
    text,
    word,
    words,
)
from instarfs.scan.values import VERDICTS
from planner.rescue.placing.votes import Evidence

_VERDICT = word("what is known of the image", VERDICTS)


def scan() -> Schema:
    """A line: an image, what was skipped, a change, or the scan as a whole."""
    return either("one of these", _image(), _skipped(), _changed(), _whole())


def _path() -> tuple[dict[str, Schema], dict[str, Schema]]:
    """Its keys: always, and sometimes."""
    exact = matching("the path, where it is no UTF-8", "[A-Za-z0-9+/]+=*")
    return {"path": text("where it is")}, {"path-base64": exact}


def _image() -> Schema:
    always, sometimes = _path()
    return record(
        "what is known of an image",
        {
            **always,
            "verdict": _VERDICT,
            "exit-code": EXIT_CODE,
            **counters(),
            "as-of": moment("the moment that the verdict is of"),
            "in-use": flag("whether a program had it open for writing"),
            "confirmed": number("findings that were looked at again, and held"),
            "in-motion": number("words and findings that changed meanwhile"),
            "seconds": fraction("what the check took"),
            "bytes-read": number("what the check read"),
            "device": number("of the file"),
            "inode": number("of the file"),
            "size": number("of the file, bytes"),
            "mtime-ns": number("of the file, nanoseconds since 1970", least=-(1 << 63)),
            "header-sha256": matching("of its first 512 bytes", "([0-9a-f]{64})?"),
        },
        {
            **sometimes,
            "unchanged": flag("whether it was not read again"),
            "error": text("why it has no other verdict"),
            "interrupted": text("that a repair of it was interrupted, and how to take that back"),
        },
    )


def _skipped() -> Schema:
    always, sometimes = _path()
    return record(
        "what was not looked at",
        {
            **always,
            "skipped": text("why"),
            "is-failure": flag("whether there may be images that nobody saw"),
        },
        sometimes,
    )


def _changed() -> Schema:
    always, sometimes = _path()
    change = record("from what to what", {"before": _VERDICT, "verdict": _CHANGED_TO})
    return record("a verdict that is another than before", {**always, "changed": change}, sometimes)


_CHANGED_TO = word("now; gone: it is not there any more", [*VERDICTS, "gone"])


def _whole() -> Schema:
    run = record(
        "what it came to",
        {
            "images": number("that are known"),
            "verdicts": tally("images by verdict", VERDICTS),
            "began": moment("when"),
            "ended": maybe(moment("when; null: it goes on, or was killed")),
            "checked": number("images that were looked at"),
            "unchanged": number("images that were not read again"),
            "skipped": number("files that are no images, or could not be looked at"),
            "bytes-read": number("of images"),
            "complete": flag("whether every image has a verdict that is up to date"),
            "exit-code": EXIT_CODE,
        },
    )
    return record("the last line", {"scan": run})


def _placement() -> Schema:
    return record(
        "a table, and where it belongs",
        {
            "offset": number("of the table in the file, in bytes"),
            "l1-index": maybe(number("the entry that is to lead there, the likeliest")),
            "evidence": words("what says so", Evidence),
            "votes-for": number("pieces of evidence"),
            "votes-against": number("those for other entries"),
            "placed": flag("whether that is proven"),
            "candidates": array("entries that it may belong to, the first", number("one")),
            "candidate-count": number("all of these"),
        },
    )


def rescue() -> Schema:
    """What was found, and the plan that puts it back."""
    features = ("incompatible_features", "compatible_features", "autoclear_features")
    fields = {**header_numbers(), **{name: number("bits") for name in ("magic", *features)}}
    errors = {
        key: schema
        for key, schema in counters().items()
        if key in ("check-errors", "corruptions", "leaks")
    }
    rival = record("what the check finds under the next best", errors)
    return record(
        "what an image lost, and the header under which it is read again",
        {
            "filename": FILENAME,
            "status": word("whether it changes anything", ["planned", "nothing-to-do"]),
            "plan-id": PLAN_ID,
            "header": record("its fields, by the names of the specification", fields),
            "changed": array(
                "fields that are otherwise now, or that header extensions end",
                word("one", [*fields, "additional", "extensions"]),
            ),
            "verdict": verdict("under it"),
            **errors,
            "next-best": maybe(rival),
            "size-evidence": maybe(text("what tells the size of the disk")),
            "size-is-exact": flag("whether the disk cannot have been larger"),
            "placements": array("L2 tables that no entry leads to", _placement()),
            "unreadable": array("L1 indices that such a table may belong to", number("one")),
            "note": maybe(text("why not all that may say where they belong was read")),
            "snapshots": array(
                "snapshots that the snapshot table had lost",
                record(
                    "one",
                    {
                        "id": text("its ID"),
                        "name": text("its name"),
                        "date-sec": number("when it was taken, seconds since 1970; 0: not known"),
                        "l1-table-offset": number("of its L1 table, in the image file, bytes"),
                    },
                ),
            ),
            "left-out": array(
                "what stopped QEMU and is not in the image any more", text("a sentence")
            ),
            "refused": maybe(text("why QEMU does not open the image as it would be")),
            "written-to": maybe(text("the rebuilt image")),
        },
        {"interrupted-repair": interrupted_repair()},
    )
