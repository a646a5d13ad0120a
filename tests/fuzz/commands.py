"""What `tests.fuzz.costs` runs of the program: commands, mounts, and words for control files.

`tests/fuzz/test_commands.py` holds it against what the program has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

COMMANDS = (
    "--version",
    "info",
    "info --output=json",
    "info --backing-chain --follow=FOLDER",
    "info --image-opts driver=qcow2,file.driver=file,file.filename=IMAGE",
    "info -f qcow2 -U -t none --object=secret,id=key,data=secret",
    "check",
    "check --output=json",
    "check --data",
    "check -U --settle=0",
    "check -q IMAGE IMAGE",
    "check --image-opts driver=qcow2,file.filename=IMAGE",
    "check -f qcow2 -T none -p --object=secret,id=key,data=secret",
    "report",
    "report -p -U",
    "report --follow=FOLDER",
    "report --undo-file=UNDO",
    "files",
    "files -p -q -U",
    "files --follow=FOLDER",
    "files --snapshot=0",
    "rescue",
    "rescue --output=json -o OUT",
    "rescue --free",
    "rescue -p -U --undo-file=UNDO",
    "rescue --in-place --plan=PLAN",
    "then undo",
    "rescue --header=IMAGE --assume=cluster_bits=16",
    "rescue --state=STATE",
    "then rescue --state=STATE",
    "scan --jobs=1",
    "scan --jobs=1 --output=jsonl FOLDER",
    "scan --jobs=1 --state=STATE --metrics=FOLDER/of.prom FOLDER",
    "then scan --jobs=1 --state=STATE FOLDER",
    "then scan --report --state=STATE",
    "scan --jobs=1 --timeout=1m --max-memory=1G --max-read-rate=1G --max-duration=1h FOLDER",
    "scan --jobs=1 -q --shard=0/1 --outdated-after=1h --state=STATE FOLDER",
    "plan leaks",
    "plan all",
    "plan --output=json all",
    "plan split",
    "plan bitmaps",
    "plan snapshots",
    "plan -p -U --undo-file=UNDO all",
    "map",
    "map --output=json",
    "map --output=json --follow=FOLDER",
    "map --output=json -s 1M -l 1T",
    "map --output=json --image-opts driver=qcow2,file.filename=IMAGE",
    "map -f qcow2 -U --object=secret,id=key,data=secret",
    "export -q IMAGE OUT",
    "export -q --follow=FOLDER IMAGE OUT",
    "export -q --snapshot=0 IMAGE OUT",
    "export -q --preview=leaks IMAGE OUT",
    "export -q --preview=all IMAGE OUT",
    "export -q --preview=split IMAGE OUT",
    "export -q --preview=bitmaps IMAGE OUT",
    "export -q --preview=snapshots IMAGE OUT",
    "export -q --preview=rescue IMAGE OUT",
    "export -p -U --preview=rescue --header=IMAGE --assume=cluster_bits=16 IMAGE OUT",
    "check -r leaks",
    "then undo",
    "check -r all",
    "then undo",
    "check -r leaks --plan=PLAN",
    "then undo -q",
    "check -r all --plan=PLAN",
    "then report",
    "then mount IMAGE MNT",
    "then umount MNT",
    "then undo -p",
    "check -r split --plan=PLAN",
    "then undo",
    "check -r bitmaps --plan=PLAN",
    "then undo",
    "check -r snapshots --plan=PLAN",
    "then undo",
    "check -r all --plan=PLAN --undo-file=UNDO",
    "then undo --undo-file=UNDO",
    "check -r all --no-undo",
    "then trim",
    "trim -p --plan=PLAN",
    "trim -q --undo-file=UNDO",
    "undo --undo-file=UNDO",
    "mount IMAGE MNT",
    "then umount MNT",
    "mount --read-only --preview=rescue --header=IMAGE --assume=cluster_bits=16 IMAGE MNT",
    "then umount MNT",
    "schema",
    "schema check",
)
"""What is run, on an image each that nobody has touched, but where it begins with `then`. IMAGE
stands at the end where no operand is named. PLAN: the id of the plan that it is to carry out, as
`plan`, `rescue` or a refusal tells it, or zeros."""

WITHOUT_IMAGE = ("--version", "schema", "umount", "scan --report")

BESIDE_UNDO = ("undo", "check -r leaks", "trim")
"""What looks at an undo file that is there: one that is long, a hole, and says nothing."""

BRIEFLY = ("info --output=json", "check --data", "report", "files", "rescue", "map --output=json")

STREAMED = (
    "files",
    "info --output=json",
    "map",
    "plan --output=json",
    "rescue --output=json",
    "scan",
    "export",
)
"""What may print more than is read: nobody reads on then, and it is to end."""

MOUNTS = (
    "mount",
    "mount --no-undo",
    "mount --follow=FOLDER -o allow_other,ro",
    "mount --undo-file=UNDO",
    "mount --preview=leaks",
    "mount --preview=all",
    "mount --preview=split",
    "mount --preview=bitmaps",
    "mount --preview=snapshots",
    "mount --preview=rescue",
)
"""What every file is read of; `-f`, IMAGE and where to are added."""

TIER = "repair/tier"
WORDS = (
    (TIER, "leaks"),
    ("repair/undo", "undo"),
    (TIER, "all PLAN"),
    ("repair/undo", "undo"),
    (TIER, "split PLAN"),
    ("repair/undo", "undo"),
    (TIER, "bitmaps PLAN"),
    ("repair/undo", "undo"),
    (TIER, "snapshots PLAN"),
    ("repair/undo", "undo"),
    (TIER, "all PLAN"),
    ("repair/trim", "trim"),
)
"""What is written to the control files of a mount. PLAN: the id in `repair/plan/TIER.json`."""

AFTER_WORDS = ("repair/result.json", TIER, "repair/undo", "repair/progress", "check/result.json")
"""What is read after each of them; of an image that was repaired everything is."""

ASKED_FOR = {
    ".": (".daemon",),
    "explain/host": ("0", "65536", str(1 << 40), str((1 << 64) - 1)),
    "explain/guest": ("0", "65536", str(1 << 40), str((1 << 64) - 1)),
}
"""Names in folders of a mount that no listing shows."""

NOT_RUN = {
    ("scan", "--dask"): "needs a cluster; its workers check an image as those of `--jobs` do",
}
"""Options that are not run, and why: `-h` neither, which looks at nothing."""


def chains(commands: Sequence[str]) -> Iterator[list[str]]:
    """*commands*, each with those that are run on what it leaves, without the word `then`."""
    found: list[list[str]] = []
    for command in commands:
        if command.startswith("then "):
            found[-1].append(command.removeprefix("then "))
        else:
            found.append([command])
    yield from found


def asking(words: Sequence[str]) -> list[str]:
    """The command that tells which plan `--plan=PLAN` among *words* means."""
    if words[0] == "check":
        return ["plan", "--output=json", words[words.index("-r") + 1], "IMAGE"]
    return ["rescue", "--output=json", "IMAGE"] if words[0] == "rescue" else ["trim", "IMAGE"]
