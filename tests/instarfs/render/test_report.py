"""check/report.txt: what stands in it for each sort of image, and in which order."""

import random
import shlex
from collections.abc import Iterable
from dataclasses import replace

import pytest

from instarfs.errors import ImageReadFailed
from instarfs.image.surroundings import Room, Surroundings
from instarfs.render.aftermath import Aftermath, Mounted
from instarfs.render.check import LISTED, VERDICTS
from instarfs.render.report import (
    LISTED_BITMAPS,
    LISTED_RANGES,
    OUT_OF_DATE,
    report_txt,
)
from instarfs.repair.outcome import Pending
from planner.check.check import check_image
from planner.check.report import Report
from planner.errors import ImageError, RepairError
from planner.guest.chain import Member, Named, Role
from planner.qcow2.bitmaps import IN_USE, TYPE_DIRTY, Bitmap
from planner.qcow2.layout import Layout
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal, propose
from planner.triage.beside import Beside, look_beside
from planner.triage.triage import triage_leaks
from tests.advice import blocks_of, may_fail, repairs, undoes
from tests.images.builder import Image, ImageBuilder
from tests.images.corpus import RULES
from tests.images.damage import DAMAGES, TELLING
from tests.images.sample import sample

PATH, MOUNT = "/srv/my disk.qcow2", "/mnt/x"
MOUNTED = Mounted(MOUNT)
SECTIONS = [
    "What it means for the guest's disk",
    "What the leaked clusters look like",
    "What a repair would do",
    "What to do now",
    "leak (",
]


def damaged(*names: str) -> Image:
    image = sample().build()
    rng = random.Random(1)
    for name in names:
        DAMAGES[name](image, rng)
    return image


def proposal(image: Image, report: Report, tier: RepairTier) -> Proposal | RepairError:
    try:
        return propose(image.source, report, tier)
    except RepairError as error:
        return error


def text_of(image: Image, mounted: Mounted | None = MOUNTED) -> str:
    report = check_image(image.source)
    triage = triage_leaks(image.source, report)
    proposals = {tier: proposal(image, report, tier) for tier in RepairTier}
    clean = report.verdict == "clean"
    known = Aftermath(triage, {} if clean else proposals, mounted=mounted)
    return report_txt(report, PATH, known).decode()


def assert_in_order(text: str, parts: Iterable[str]) -> None:
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_the_verdict_comes_first_and_the_findings_last() -> None:
    text = text_of(damaged(*TELLING))
    assert text.startswith(f"{PATH}: corrupt\n\n{VERDICTS['corrupt']}")
    assert_in_order(text, SECTIONS)


def test_of_a_clean_image_nothing_more_is_said() -> None:
    text = text_of(damaged())
    assert text.startswith(f"{PATH}: clean\n")
    assert not [section for section in SECTIONS if section in text]


def test_a_file_that_is_cut_off_is_said_to_be_in_one_line() -> None:
    image = RULES["data_cut_by_the_end"]().image
    size = len(image.data)
    assert f"\nThe file is cut off: it ends at {size} and needs {size + 100}.\n" in text_of(image)
    assert "cut off: it ends" not in text_of(damaged(*TELLING))


def test_what_is_missing_is_named_with_its_place() -> None:
    text = text_of(damaged("lost-l2-table"))
    # No more than the clusters that it maps, all of which leak.
    assert "missing: up to 655360 bytes, which leaked clusters may hold: they read as zeros" in text
    assert f"safe: at least {(1 << 31) - 655360} of {1 << 31} bytes\n" in text
    assert VERDICTS["leaks"] not in text
    assert "L1 entries 1 to 3 are empty" in text
    assert "refused without the plan's id" in text


def test_what_a_lost_table_may_have_led_to_behind_the_end_is_told() -> None:
    image = damaged()
    image.set_refcount(image.host_clusters + 1, 1)
    assert "behind the end of the file" not in text_of(image)
    start = image.l2_table(0)
    image.data[start : start + image.cluster_size] = bytes(image.cluster_size)
    assert "\n  1 cluster is counted behind the end of the file: a table that is lost" in text_of(
        image
    )


def test_an_entry_that_may_lead_to_what_is_anothers_is_told() -> None:
    builder = ImageBuilder(size=1 << 20, cluster_bits=12)
    builder.write(0, b"first")
    builder.take_snapshot("one")
    builder.write(0, b"second")
    builder.take_snapshot("two")
    image = builder.build()
    image.set_word(image.l1_at(0), image.l2_table(0, 0))
    text = text_of(image)
    assert "lost: an entry may lead to what is another's, in the place of what it led to." in text
    assert text.count("something may be lost, and afterwards nothing would show it any more") == 2


def test_a_repair_that_frees_what_nothing_else_would_speak_for_is_no_step_to_paste() -> None:
    builder = ImageBuilder(size=1 << 20, cluster_bits=12)
    builder.write(0, b"first" * 2000)
    builder.take_snapshot("one")
    builder.write(1, b"second")
    image = builder.build()
    image.set_word(image.l2_at(1), image.word(image.l2_at(1, 0)))
    text = text_of(image)
    refused = text[text.index("  all: plan") :].splitlines()[1]
    assert "it would free clusters that may be what is left of something lost" in refused
    steps, only_if = text.split("Only if what looks lost may go:")
    assert "Save the leaked clusters before any are freed" in steps
    assert "Mend what the rest of the image determines, and free what leaks" in only_if


def test_a_lost_snapshot_is_named() -> None:
    text = text_of(damaged("lost-snapshot"))
    assert "missing: a snapshot that the image no longer counts" in text
    assert "'before upgrade', ID 1, taken 2023-11-14 22:13:20 UTC" in text


def test_leaked_data_is_no_alarm() -> None:
    text = text_of(damaged("leaked-clusters"))
    assert "nothing among them looks like a lost table" in text
    assert "missing" not in text
    assert SECTIONS[0] not in text


def test_guest_ranges_are_given_and_long_lists_cut() -> None:
    image = damaged()
    clusters = image.mapped(0)[::2]
    for cluster in clusters:
        past = (image.host_clusters + 9) * image.cluster_size
        image.set_word(image.l2_at(cluster), past)
    text = text_of(image)
    size = image.cluster_size
    assert f"lost: {len(clusters) * size} bytes in {len(clusters)} ranges" in text
    assert text.count(f"    {size} bytes at guest offset ") == LISTED_RANGES
    assert "... by finding: check/findings.jsonl" in text


def test_a_refusal_says_why() -> None:
    text = text_of(damaged("snapshot-l1-misaligned"))
    assert "leaks: refused (because of: snapshot-l1-misaligned): " in text


def test_commands_can_be_pasted() -> None:
    text = text_of(damaged(*TELLING))
    plans = [line.split()[-1] for line in text.splitlines() if "repair/plan" in line]
    assert plans == [f"{MOUNT}/repair/plan/all.json"]
    assert "Then `leaks`, with its new id, frees the leaked clusters, if what looks lost" in text
    (copy,) = (line for line in text.splitlines() if line.strip().startswith("cp --sparse"))
    assert shlex.split(copy)[2:] == [PATH, f"{PATH}.copy"]
    assert f"echo undo > {MOUNT}/repair/undo" in text
    assert (
        f"find {MOUNT}/lost -maxdepth 1 -type f -exec cp --sparse=always -t '{PATH}.lost' " in text
    )


def test_what_takes_a_repair_back_is_not_among_what_repairs() -> None:
    first, *others = blocks_of(text_of(damaged(*TELLING)))
    assert repairs(first)
    assert not undoes(first)
    assert [block.title.partition(",")[0] for block in others] == [
        "To take that repair back",
        "What a rescue brings back",
        "Or copy out what can be read",
    ]


def test_what_looks_lost_is_not_freed_by_whoever_pastes_what_is_to_be_done_now() -> None:
    image = damaged()
    size = image.cluster_size
    table = image.l2_at(0) // size * size
    image.data[table : table + size] = bytes(size)
    first, second, third, *_ = blocks_of(text_of(image, None))
    assert "-maxdepth 1 -type f -exec cp " in "".join(first.commands)
    assert not repairs(first)
    assert second.title == "Only if what looks lost may go:"
    assert "check -r leaks --plan " in second.commands[-1]
    assert undoes(third)


def test_an_export_that_cannot_fail_is_not_said_to() -> None:
    for rule, may_end_with_1 in (("refcount_low", False), ("l2_data_misaligned", True)):
        *_, export = blocks_of(text_of(RULES[rule]().image))
        assert "instarfs export " in export.commands[0]
        assert may_fail(export) == may_end_with_1


def test_without_a_mount_the_commands_are_those_of_the_command_line() -> None:
    text = text_of(damaged(*TELLING), mounted=None)
    commands = [line for line in text.splitlines() if line.strip().startswith("instarfs ")]
    assert [shlex.split(line)[1] for line in commands] == [
        "mount", "umount", "plan", "check", "undo", "rescue", "export",
    ]  # fmt: skip
    assert shlex.split(commands[0])[-2:] == [PATH, f"{PATH}.mnt"]
    assert all(shlex.split(line)[-1] == PATH for line in commands[2:-1])
    assert shlex.split(commands[-1])[-2:] == [PATH, f"{PATH}.raw"]
    assert MOUNT not in text


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_can_be_told(name: str) -> None:
    text = text_of(damaged(name))
    assert text.endswith("\n")
    assert "\n\n\n" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def advice(surroundings: Surroundings, mounted: Mounted | None = MOUNTED) -> str:
    image = damaged("leaked-clusters")
    report = check_image(image.source)
    proposals = {tier: proposal(image, report, tier) for tier in RepairTier}
    known = Aftermath(proposals=proposals, mounted=mounted, surroundings=surroundings)
    return report_txt(report, PATH, known).decode()


def test_no_copy_is_advised_in_the_place_of_another() -> None:
    assert "there already" not in advice(Surroundings())
    text = advice(Surroundings(taken=frozenset({"my disk.qcow2.copy"})))
    assert "the one that is there already may be of before a repair, and stays:\n" in text
    assert f"      cp --sparse=always '{PATH}' '{PATH}.copy-2'\n" in text


@pytest.mark.parametrize("room", [Room.DEVICE, Room.READ_ONLY, Room.FULL])
def test_where_nothing_can_be_kept_beside_the_image_it_is_kept_elsewhere(room: Room) -> None:
    text = advice(Surroundings(room))
    assert "go to a folder with room for it before you go on" in text
    assert f"cp --sparse=always --backup=numbered '{PATH}' './my disk.qcow2.copy'\n" in text
    assert f"{PATH}.copy" not in text


def test_an_image_that_cannot_be_written_to_is_repaired_as_a_copy() -> None:
    text = advice(Surroundings(Room.READ_ONLY, keeps_undo=False, is_writable=False))
    assert "The image cannot be written to. Its copy can, and has the same plans.\n" in text
    (repair,) = (line for line in text.splitlines() if "check -r" in line)
    assert shlex.split(repair)[-1] == "./my disk.qcow2.copy"
    assert "repair/tier" not in text


def test_the_gentler_tier_is_advised_where_it_mends_as_much() -> None:
    text = advice(Surroundings(), None)
    (repair,) = (line for line in text.splitlines() if "check -r" in line)
    assert shlex.split(repair)[2:4] == ["-r", "leaks"]


# ---- what the check did without ----


def beside(known: Beside) -> str:
    report = check_image(damaged().source)
    return report_txt(report, PATH, Aftermath(beside=known)).decode()


def test_how_much_is_in_files_that_are_not_there() -> None:
    named = Named(Role.BACKING, b"../gone\x1b.qcow2", b"qcow2")
    found = Member(0, named, "/srv/gone", None), Member(1, named, None, "there is no such file")
    text = beside(Beside(members=found, in_backing_file=4096))
    assert "What of the disk lies in other files, and is lost with them:\n" in text
    name = r"'../gone\x1b.qcow2'"
    assert f"  4096 of {1 << 31} bytes: in the backing file {name}, which is there\n" in text
    assert f"  what those do not hold: in the backing file {name}, which was not opened: " in text


def test_what_lies_in_a_data_file_is_not_called_safe() -> None:
    builder = ImageBuilder(size=1 << 24, data_file=b"data.raw")
    builder.write(0, bytes(range(256)) * 512)
    source = builder.build().source
    named = Named(Role.DATA, b"data.raw", b"raw")
    found = look_beside(source, Layout.read(source), (Member(0, named, None, "it is not there"),))
    text = report_txt(check_image(source), PATH, Aftermath(beside=found)).decode()
    assert f"  safe: {(1 << 24) - 131072} of {1 << 24} bytes, as far as" in text
    assert f"  131072 of {1 << 24} bytes: in the data file 'data.raw', which was not opened" in text


def test_each_table_that_is_gone_is_named_with_what_lies_there() -> None:
    tables = LISTED + 3
    builder = ImageBuilder(size=tables << 21, cluster_bits=12)
    for index in range(tables):
        builder.write(index * 512, b"data" * 1024)
    image = builder.build()
    for index in range(tables):
        content = b"all is well, said the log; and so on and on and on\n" * 90
        if index < LISTED:
            content = b"\0\1" * 2048
        start = image.l2_table(index)
        image.data[start : start + 4096] = content[:4096]
    text = report_txt(check_image(image.source), PATH).decode()
    for index in range(tables):
        holds = "a refcount block" if index < LISTED else "text"
        named = f"the L2 table of L1 entry {index}, at host offset {image.l2_table(index)}"
        assert f"  - {named}, holds {holds}\n" in text


def test_bitmaps_that_no_backup_can_rely_on() -> None:
    bitmap = Bitmap(0, 0, 1, IN_USE, TYPE_DIRTY, 16, 0, b"backup\n")
    text = beside(Beside(unsaved=(bitmap,) * (LISTED_BITMAPS + 2)))
    assert "must begin anew, with the whole disk:\n  'backup\\n' (granularity 65536)\n" in text
    assert "  ... and 2 more: image/bitmaps.json\n" in text
    report = replace(check_image(damaged().source), in_use=True)
    known = Aftermath(beside=Beside(unsaved=(bitmap,)))
    assert "backup" not in report_txt(report, PATH, known).decode()


def test_a_dirty_image_that_qemu_mends_is_not_called_damaged() -> None:
    text = text_of(damaged("dirty-bit", "low-refcount", "missing-refcount"))
    assert text.startswith(f"{PATH}: corrupt\n\n{OUT_OF_DATE}\n")
    assert "  # Keep a copy of the image:\n" in text
    assert "Do not write" not in text
    assert "nobody write" not in text
    # What QEMU frees as well is looked at first.
    text = text_of(damaged("dirty-bit", "lost-l2-table"))
    assert text.startswith(f"{PATH}: leaks\n\nSomething may be lost: ")
    assert "Let nobody write to the image" in text


def test_files_of_a_mount_are_said_to_be_so_where_there_is_none() -> None:
    image = damaged()
    for cluster in image.mapped(0)[::2]:
        image.set_word(image.l2_at(cluster), (image.host_clusters + 9) * image.cluster_size)
    said = "Files that are named here, as check/findings.jsonl, are in a mount of the image.\n"
    assert text_of(image, None).endswith(said)
    assert said not in text_of(image)
    assert said not in text_of(damaged("leaked-clusters"), None)


# ---- what could not be found out ----


def test_an_image_that_is_written_to_gets_no_advice_but_that() -> None:
    report = check_image(damaged("leaked-clusters").source)
    torn = Report(layout=report.layout, counters=report.counters, in_use=True)
    proposals = {tier: RepairError("the image changed") for tier in RepairTier}
    text = report_txt(torn, PATH, Aftermath(proposals=proposals)).decode()
    assert "check again when it has ended" in text
    assert "What to do now" not in text


def test_of_a_header_that_cannot_be_read_only_that_is_said_and_a_copy_kept() -> None:
    report = Report(layout=None, error=ImageError("cluster_bits", 63, "at most 21"))
    assert report_txt(report, PATH).decode() == (
        f"{PATH}: unreadable\n\n{VERDICTS['unreadable']}\n\ncluster_bits is 63: at most 21\n\n"
        "What to do now:\n"
        "  # Let nobody write to the image. Keep a copy of it:\n"
        f"      cp --sparse=always '{PATH}' '{PATH}.copy'\n"
        "  # What its header should say is not known here. A backup or an older copy of this image"
        " has one that may fit.\n"
        "\nWhat its tables say of the header (exit code 1 where they do not say enough):\n"
        f"      instarfs rescue -- '{PATH}'\n"
    )


def test_leaked_clusters_that_cannot_be_read_do_not_hide_the_rest() -> None:
    report = check_image(damaged("leaked-clusters").source)
    error = ImageReadFailed(PATH, 4096, "Input/output error")
    known = Aftermath(error, dict.fromkeys(RepairTier, error))
    text = report_txt(report, PATH, known).decode()
    assert "could not be looked into:\n  /srv/my disk.qcow2: reading at offset 4096" in text
    assert "leaks: cannot be planned: " in text
    assert "leak (11)" in text


def test_an_interrupted_repair_is_named_at_the_top() -> None:
    report = check_image(damaged().source)
    pending = Pending("a repair was interrupted\n", "undo")
    text = report_txt(report, PATH, Aftermath(pending=pending)).decode()
    assert "Not finished: a repair was interrupted\\n." in text
