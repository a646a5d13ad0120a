"""What to do now, as blocks that can be pasted into bash, each as a whole.

What stands between the commands is a comment. Each command succeeds as it stands, one after the
other, also under `set -e`; where one may not, the text says so before it. Nothing that exists is
overwritten. What takes a repair back, or is done instead of one, is a block of its own. All from
values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from instarfs.image.surroundings import COPY, FOLDER, LOST, RAW, Room
from instarfs.render.aftermath import Aftermath, Mounted
from instarfs.render.limits import LISTED_RUNS
from instarfs.text import shell_path
from planner.check.reopened import is_mended_when_opened
from planner.check.report import EXIT_CODES, Report
from planner.qcow2.header import CRYPT_NONE
from planner.repair.plan import RepairTier
from planner.repair.tiers import Proposal
from planner.triage.impact import Harm, guest_impact
from planner.triage.triage import Triage, adjacent

_NOT_BESIDE = {
    Room.DEVICE: "What lies beside a device is in memory",
    Room.READ_ONLY: "No file can be made beside the image",
    Room.FULL: "There is no space for a copy beside the image",
}


def what_to_do(report: Report, path: str, known: Aftermath) -> list[list[str]]:
    """Blocks of lines; none where there is nothing to do, or nobody knows.

    *path*: the image's, absolute.
    """
    place = _Place(path, known, is_calm=is_mended_by_qemu(report, known))
    if report.error is not None:
        return _without_header(place)
    if report.live is not None and EXIT_CODES[report.verdict] in (1, 2) and not known.gone:
        return _when_stopped(place, report)
    if known.gone or report.torn or not (known.proposals or place.is_interrupted):
        return []
    steps = [*_keep_a_copy(place), *_undo_interrupted(place), *_save_lost(place)]
    blocks: list[list[str]] = []
    proposal = _advised(place)
    if proposal is not None:
        repair, only_if = list(_repair(place, proposal)), _only_if(proposal)
        if only_if:
            # Not for somebody who pastes all that is to be done now.
            blocks.append([only_if, *repair])
        else:
            steps += repair
        if place.keeps_undo:
            blocks.append(_block("To take that repair back, byte for byte:", _undo(place)))
    if report.cut_off:
        whole = (
            "If this file is a copy that ended early, make it again: the rest may still be there."
        )
        steps = [*_step(whole), *steps]
    blocks += _bring_back_tables(place, report)
    if report.counters.corruptions or report.counters.check_errors:
        blocks += _copy_out(place, report)
    return [["What to do now:", *steps], *blocks]


def _when_stopped(place: _Place, report: Report) -> list[list[str]]:
    """Of an image that a program writes: nothing can be done beside it."""
    again = "Look again when its writes have calmed down, or longer:"
    commands = [f"instarfs check -U --settle 60 {place.image}"]
    if report.verdict != "unsettled":
        again = (
            "Shut down what writes to it: each write may make it worse. Then see what can be done:"
        )
        commands = [f"instarfs report {place.image}"]
    return [["What to do now:", *_step(again, *commands)]]


def _without_header(place: _Place) -> list[list[str]]:
    """Of an image of which nothing is known: nothing is lost by a copy."""
    if place.known.gone:
        return []
    older = (
        "What its header should say is not known here. A backup or an older copy of this image has"
        " one that may fit."
    )
    tables = "What its tables say of the header (exit code 1 where they do not say enough):"
    if place.is_interrupted:
        return [["What to do now:", *_keep_a_copy(place), *_undo_interrupted(place)]]
    return [
        ["What to do now:", *_keep_a_copy(place), *_step(older)],
        _block(tables, f"instarfs rescue -- {place.image}"),
    ]


def bring_back(path: str, known: Aftermath) -> list[str]:
    """What can be done with an image that has no name any more; none where it has one."""
    place, gone = _Place(path, known, is_calm=False), known.gone
    if gone is None or known.mounted is None:
        return []
    if not gone.is_deleted:
        what = (
            "The file of this image was renamed or moved. It can be read here all the same, and not"
            " repaired: put it back, or mount it under the name that it has now."
        )
        return [what]
    what = (
        "The file of this image was deleted. What is open here is all that is left of it, and gone"
        " for good when it is unmounted. Before that:"
    )
    copy = place.new(COPY)
    return [
        what,
        # Not in its place at once: the mount shows whatever stands there, be it whole or not.
        *_step(
            "Bring the file back, as root or as who mounted it:",
            f"cp --sparse=always {gone.descriptor} {copy} && mv -n {copy} {place.image}",
        ),
        *_step(
            "Or copy out what can be read:",
            f"instarfs export {gone.descriptor} {place.new(RAW)}",
        ),
    ]


@dataclass(frozen=True, slots=True)
class _Place:
    """What the commands are about: words of them."""

    path: str
    known: Aftermath
    is_calm: bool
    """Nothing comes to harm when somebody writes to the image."""

    @property
    def image(self) -> str:
        return shell_path(self.path)

    @property
    def is_interrupted(self) -> bool:
        """Whether a repair was, and can be taken back."""
        return self.known.pending is not None and self.known.pending.tier is not None

    @property
    def is_beside(self) -> bool:
        """Whether new files are made beside the image."""
        return self.known.surroundings.room is Room.BESIDE

    @property
    def controls(self) -> Mounted | None:
        """Where the image is mounted and can be repaired."""
        mounted, around = self.known.mounted, self.known.surroundings
        if mounted is None or not mounted.has_controls or not around.is_writable:
            return None
        # A repair that keeps an undo file is refused where there can be none.
        return mounted if around.keeps_undo or not mounted.keeps_undo else None

    @property
    def repaired(self) -> str:
        """What is to be repaired: an image that cannot be written to is repaired as a copy."""
        return self.image if self.known.surroundings.is_writable else self.new(COPY)

    @property
    def undo_option(self) -> str:
        """What says where the undo file is, with a blank before it; empty where it is beside."""
        around = self.known.surroundings
        if self.controls is not None or around.keeps_undo or not around.is_writable:
            return ""
        return f" --undo-file {shell_path(around.undo_elsewhere)}"

    @property
    def keeps_undo(self) -> bool:
        """Whether a repair can be taken back."""
        return self.controls is None or self.controls.keeps_undo

    def new(self, suffix: str) -> str:
        """A file that is not there yet, as far as somebody looked."""
        return shell_path(self.known.surroundings.path(self.path, suffix))


def _in(mounted: Mounted, name: str) -> str:
    """A file of a mount, as a word."""
    return shell_path(f"{mounted.directory}/{name}")


def _step(what: str, *commands: str) -> list[str]:
    return [f"  # {what}", *(f"      {command}" for command in commands)]


def _block(what: str, *commands: str) -> list[str]:
    return [what, *(f"      {command}" for command in commands)]


def _keep_a_copy(place: _Place) -> Iterator[str]:
    around, backup = place.known.surroundings, ""
    if not place.is_beside:
        backup = " --backup=numbered"
        yield from _step(
            f"{_NOT_BESIDE[around.room]}: go to a folder with room for it before you go on. What"
            " has a name there that is used below keeps its bytes, under another name."
        )
    keep = (
        "Keep a copy of the image"
        if place.is_calm
        else "Let nobody write to the image. Keep a copy of it"
    )
    if around.is_taken(place.path, COPY):
        keep += "; the one that is there already may be of before a repair, and stays"
    yield from _step(f"{keep}:", f"cp --sparse=always{backup} {place.image} {place.new(COPY)}")


def is_mended_by_qemu(report: Report, known: Aftermath) -> bool:
    """Whether the image may be left to QEMU, which frees what is leaked without a look at it."""
    return is_mended_when_opened(report) and not known.pending and not _buries_something(known)


def _buries_something(known: Aftermath) -> bool:
    """Whether something lost may be among what a repair frees, or nobody could look."""
    if not isinstance(known.triage, Triage) or known.triage.is_evidence:
        return True
    proposals = known.proposals.values()
    return any(isinstance(each, Proposal) and each.needs_quote for each in proposals)


def _undo_interrupted(place: _Place) -> Iterator[str]:
    if place.is_interrupted:
        yield from _step(
            "Take back the repair that was interrupted, then look again:", _undo(place)
        )


def _undo(place: _Place) -> str:
    if place.controls is not None:
        return f"echo undo > {_in(place.controls, 'repair/undo')}"
    return f"instarfs undo{place.undo_option} {place.repaired}"


def _copy_lost(place: _Place, mounted: Mounted) -> list[str]:
    """The runs and what they look like: not the disks below, which are as long as disks are."""
    beside = place.is_beside
    copy = "cp --sparse=always" + ("" if beside else " --backup=numbered") + " -t"
    target = place.new(LOST)
    return [
        f"mkdir {'' if beside else '-p '}{target}",
        f"find {_in(mounted, 'lost')} -maxdepth 1 -type f -exec {copy} {target} {{}} +",
    ]


def _save_lost(place: _Place) -> Iterator[str]:
    """Wherever something lost may be among what a repair could free."""
    triage, mounted = place.known.triage, place.known.mounted
    if not isinstance(triage, Triage) or not _buries_something(place.known):
        return
    what = "Save the leaked clusters before any are freed"
    runs = len(adjacent(triage.clusters)[0])
    if runs > LISTED_RUNS:
        what += f" (the first {LISTED_RUNS} of {runs} runs: the copy of the image has them all)"
    if mounted is not None:
        yield from _step(f"{what}:", *_copy_lost(place, mounted))
        return
    if not place.known.surroundings.can_mount:
        yield from _step("The copy holds the leaked clusters, too; in a mount they are files.")
        return
    mounted = Mounted(place.known.surroundings.path(place.path, FOLDER))
    word = shell_path(mounted.directory)
    yield from _step(
        f"{what}, from a mount, in which they are files once the check has run:",
        f"mkdir {word}",
        f"instarfs mount --read-only {place.image} {word}",
        f"cat {_in(mounted, 'check/result.json')}",
        *_copy_lost(place, mounted),
        f"instarfs umount {word}",
        f"rmdir {word}",
    )


def _plans(place: _Place) -> dict[RepairTier, Proposal]:
    return {
        tier: proposal
        for tier, proposal in place.known.proposals.items()
        if isinstance(proposal, Proposal) and not proposal.plan.changes_nothing
    }


_CHOICES = {
    RepairTier.SPLIT: "Only if each owner of a shared cluster is to have one of its own, so that"
    " nothing shows any more which of them reads wrong bytes:",
    RepairTier.BITMAPS: "Only if the bitmaps that the plan names may go:",
    RepairTier.SNAPSHOTS: "Only if the snapshot table is to be what the plan says:",
}


def _only_if(proposal: Proposal) -> str:
    """What somebody has to want who has a plan carried out; empty where nothing speaks against."""
    if proposal.gives_up or (proposal.tier is RepairTier.LEAKS and proposal.needs_quote):
        return "Only if what looks lost may go:"
    return _CHOICES.get(proposal.tier, "")


def _chosen(place: _Place) -> list[Proposal]:
    """Repairs that only a person can know to be right."""
    return [plan for tier, plan in _plans(place).items() if tier.is_chosen]


def _advised(place: _Place) -> Proposal | None:
    """One repair: after it the plan of any other would be another."""
    plans = _plans(place)
    leaks, everything = (plans.get(tier) for tier in (RepairTier.LEAKS, RepairTier.ALL))
    if leaks is None or everything is None:
        return everything or leaks or next(iter(_chosen(place)), None)
    # Where it mends as much, `all` would write more.
    is_gentle = not leaks.needs_quote and everything.left_count >= leaks.left_count
    return leaks if is_gentle else everything


def _repair(place: _Place, proposal: Proposal) -> Iterator[str]:
    if not place.known.surroundings.is_writable:
        yield from _step("The image cannot be written to. Its copy can, and has the same plans.")
    yield from _step(
        f"{_purpose(proposal)}: read every change, and have exactly that done, or nothing:",
        *_commands(place, proposal),
    )
    if not place.keeps_undo:
        yield from _step("That cannot be taken back: the copy is the only way back.")
    then, leaks = "A plan holds for the image as it is: after a repair look again", None
    if proposal.tier is RepairTier.ALL and proposal.after.counters.leaks:
        leaks = _plans(place).get(RepairTier.LEAKS)
    if leaks is not None:
        then += f". Then `{RepairTier.LEAKS}`, with its new id, frees the leaked clusters"
        then += ", if what looks lost may go" if leaks.needs_quote else ""
    if chosen := [] if proposal.tier.is_chosen else _chosen(place):
        then += f". Then `{chosen[0].tier}`, with its new id, if its plan is what you want"
    yield from _step(f"{then}.")


def _purpose(proposal: Proposal) -> str:
    what = "Mend what the rest of the image determines"
    if proposal.tier.is_chosen:
        what = "That is for a person to choose"
    elif proposal.tier is RepairTier.LEAKS:
        what = "Free the leaked clusters"
        what += "" if proposal.needs_quote else ", and no more"
    elif proposal.gives_up:
        what += ", and free what leaks"
    elif proposal.needs_quote:
        what += ", which does not bring back what may be lost, and frees none of it"
    return what


def _commands(place: _Place, proposal: Proposal) -> tuple[str, str]:
    """To read a plan, and to have it carried out."""
    tier, number = proposal.tier, proposal.plan.id
    if place.controls is not None:
        look = f"cat {_in(place.controls, f'repair/plan/{tier}.json')}"
        return look, f'echo "{tier} {number}" > {_in(place.controls, "repair/tier")}'
    repair = f"instarfs check -r {tier} --plan {number}{place.undo_option} {place.repaired}"
    return f"instarfs plan {tier} {place.repaired}", repair


def _bring_back_tables(place: _Place, report: Report) -> Iterator[list[str]]:
    """Where L2 tables are lost: what may be had back before anything of them is freed."""
    triage = place.known.triage
    if not isinstance(triage, Triage) or not triage.lost_tables:
        return
    most = triage.mapped * report.geometry.cluster_size
    yield _block(
        f"What a rescue brings back, of up to {most} bytes that lost L2 tables map (exit code 1"
        " where nothing proves where they belong):",
        f"instarfs rescue -- {place.image}",
    )


def _copy_out(place: _Place, report: Report) -> Iterator[list[str]]:
    """Not of an encrypted disk, of which no byte could be read."""
    header = report.layout.header if report.layout else None
    if header is None or header.crypt_method != CRYPT_NONE:
        return
    is_elsewhere = any(member.refusal for member in place.known.beside.members)
    notes = []
    if is_elsewhere or not _reads_whole(report):
        notes.append("exit code 1 where not all of it can be read: its .map lists what")
    if not place.is_beside:
        notes.append("exit code 1 where a file of that name is there: it stays")
    if is_elsewhere:
        notes.append("--follow DIR: with what lies in other files, where they are below DIR")
    what = "Or copy out what can be read, and leave the image as it is"
    yield _block(
        f"{what} ({'; '.join(notes)}):" if notes else f"{what}:",
        f"instarfs export {place.image} {place.new(RAW)}",
    )


def _reads_whole(report: Report) -> bool:
    """Whether every byte of the disk can be read, be it the right one or not."""
    is_packed = report.holds_compressed and not report.compressed_looked_at
    if is_packed or not report.complete:
        return False
    ranges = guest_impact(report).ranges
    return not len(ranges[Harm.LOST]) and not len(ranges[Harm.SUSPECT])
