"""What no plan may do, whoever drafted it: one plan for every sentence of the proof."""

import random
from dataclasses import replace

import pytest

from planner.check.check import check_image
from planner.errors import AmbiguousCorruption
from planner.findings.kinds import FindingKind
from planner.repair.draft import Draft
from planner.repair.overlay import Overlay
from planner.repair.plan import Plan, RepairTier, StageKind
from planner.repair.proof import require_proof
from planner.source import Bytes
from tests.images.builder import Image
from tests.images.corpus.rule import COPIED, SIZE, plain, with_snapshot

UNPROVEN = "planned and then not proven"


def plan_of(image: Image, *writes: tuple[int, bytes], size: int | None = None) -> Plan:
    draft = Draft(image.source)
    draft.size = size or draft.size
    for offset, data in writes:
        draft.write(StageKind.CORRECT, offset, data)
    return draft.plan(RepairTier.ALL)


def word(value: int) -> bytes:
    return value.to_bytes(8, "big")


def prove(image: Image, plan: Plan) -> None:
    source = Bytes(bytes(image.data))
    require_proof(source, plan, check_image(source), check_image(Overlay(source, plan)))


def refused(image: Image, plan: Plan) -> str:
    with pytest.raises(AmbiguousCorruption) as error:
        prove(image, plan)
    assert error.value.wayout
    return error.value.reason


def test_a_plan_that_mends_is_proven() -> None:
    image = plain()
    image.clear_bits(image.l1_at(0), COPIED)
    prove(image, plan_of(image, (image.l1_at(0), word(image.word(image.l1_at(0)) | COPIED))))


def test_no_counter_may_go_up() -> None:
    image = plain()
    image.data += bytes(SIZE)
    at = image.refblock(0) + 2 * (image.host_clusters - 1)
    reason = refused(image, plan_of(image, (at, b"\0\1")))
    assert UNPROVEN in reason
    assert "leaks would go from 0 to 1" in reason


def test_no_kind_may_get_more() -> None:
    """One flag is mended, another broken: the counters are what they were."""
    image = plain()
    image.clear_bits(image.l1_at(0), COPIED)
    mended = (image.l1_at(0), word(image.word(image.l1_at(0)) | COPIED))
    broken = (image.l2_at(1), word(image.word(image.l2_at(1)) & ~COPIED))
    assert "l2-copied would go from 0 to 1" in refused(image, plan_of(image, mended, broken))


def test_the_image_must_open() -> None:
    image = plain()
    assert "could not be opened" in refused(image, plan_of(image, (0, b"XXXX")))


@pytest.mark.parametrize(("offset", "name"), [(24, "size"), (80, "compatible_features")])
def test_the_header_stays(offset: int, name: str) -> None:
    image = plain()
    value = image.word(offset) - 512 if name == "size" else image.word(offset) ^ 1
    reason = refused(image, plan_of(image, (offset, word(value))))
    assert f"the header field {name} would change" in reason


def test_autoclear_bits_that_are_not_known_do_not_survive_a_write_and_known_ones_do() -> None:
    image = plain()
    image.clear_bits(image.l1_at(0), COPIED)
    mended = (image.l1_at(0), word(image.word(image.l1_at(0)) | COPIED))
    image.change_header(autoclear_features=1 << 63 | 1)
    field = "the header field autoclear_features would change"
    prove(image, plan_of(image, mended, (88, word(1))))
    prove(image, plan_of(image))
    assert field in refused(image, plan_of(image, mended))
    assert field in refused(image, plan_of(image, mended, (88, word(0))))


def test_with_bitmaps_only_the_bit_that_vouches_for_them_may_change() -> None:
    image = plain()
    image.clear_bits(image.l1_at(0), COPIED)
    mended = (image.l1_at(0), word(image.word(image.l1_at(0)) | COPIED))
    image.change_header(autoclear_features=1 << 63 | 1)

    def plan(*writes: tuple[int, bytes]) -> Plan:
        return replace(plan_of(image, mended, *writes), tier=RepairTier.BITMAPS)

    for bits in (0, 1):
        prove(image, plan((88, word(bits))))
    for writes in ([], [(88, word(1 << 63))], [(88, word(1 << 5))]):
        assert "the header field autoclear_features would change" in refused(image, plan(*writes))


def test_the_snapshots_stay() -> None:
    image = with_snapshot()
    snapshot = image.snapshots[0]
    date_at, vm_state_at = snapshot.offset + 16, snapshot.offset + 40
    id_at = vm_state_at + len(snapshot.extra_data)
    for at in (date_at, date_at + 4, vm_state_at, id_at, id_at + len(snapshot.id_str)):
        assert "list of snapshots" in refused(image, plan_of(image, (at, b"X")))


def test_nothing_is_written_where_a_guest_has_its_data() -> None:
    image = plain()
    plan = plan_of(image, (image.host_offset(1), b"no more"))
    assert "where no metadata is" in refused(image, plan)


def test_nothing_is_written_where_nothing_is_known_to_be() -> None:
    image = plain()
    image.data += bytes(SIZE)
    plan = plan_of(image, ((image.host_clusters - 1) * SIZE, b"evidence?"))
    assert "where no metadata is" in refused(image, plan)


def test_the_file_does_not_grow_over_what_is_in_use() -> None:
    image = plain()
    end = len(image.data)
    image.set_word(image.l2_at(1), end - 512 | COPIED)
    plan = plan_of(image, (end, b"new"), size=end + SIZE)
    assert "where something is in use" in refused(image, plan)


def test_nothing_is_written_to_a_cluster_with_two_owners() -> None:
    image = plain()
    image.set_word(image.l2_at(1), image.l2_table(0) | COPIED)
    entry = image.l2_at(2)
    sound = word(image.word(entry))
    image.set_bits(entry, 1 << 60)
    assert "a cluster with two owners" in refused(image, plan_of(image, (entry, sound)))


def test_what_is_mapped_stays_mapped() -> None:
    """Two guest clusters change places: every counter stays, and both read the other's bytes."""
    image = plain()
    one, other = image.l2_at(1), image.l2_at(2)
    plan = plan_of(image, (one, word(image.word(other))), (other, word(image.word(one))))
    assert "an entry would map something else" in refused(image, plan)


def test_an_l1_entry_stays_where_it_points() -> None:
    image = plain()
    one, other = image.l1_at(0), image.l1_at(1)
    plan = plan_of(image, (one, word(image.word(other))), (other, word(image.word(one))))
    assert "an entry would map something else" in refused(image, plan)


def test_where_damage_hides_behind_refcounts_the_image_is_named_and_not_the_program() -> None:
    image = plain()
    image.set_word(image.reftable_at(0), image.refblock(0) + 512)
    image.set_word(image.l2_at(1), image.l2_table(0) | COPIED)
    before = check_image(image.source).counts()
    assert {FindingKind.REFCOUNT_UNREADABLE, FindingKind.MULTIPLE_OWNERS} <= before.keys()
    reason = refused(image, plan_of(image, (image.reftable_at(0), word(image.refblock(0) - 512))))
    assert UNPROVEN not in reason
    assert "behind refcounts that cannot be looked up lies more damage" in reason


def test_nor_is_it_where_damage_hides_that_a_table_was_overwritten_with() -> None:
    """In a table of garbage nothing is edited, and of its flags nothing is known before."""
    image = plain()
    image.set_word(image.reftable_at(0), image.refblock(0) + 512)
    garbage = random.Random(3).randbytes(512)
    image.data[image.l2_table(0) + 1024 : image.l2_table(0) + 1536] = garbage
    before = check_image(image.source).counts()
    assert {FindingKind.REFCOUNT_UNREADABLE, FindingKind.TABLE_OVERWRITTEN} <= before.keys()
    reason = refused(image, plan_of(image, (image.reftable_at(0), word(image.refblock(0) - 512))))
    assert UNPROVEN not in reason
    assert "behind refcounts that cannot be looked up lies more damage" in reason
