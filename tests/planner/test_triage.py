"""What is lost among the leaks, and what is only waste."""

import random

from examples.make_image import DAMAGES, Image, sample
from planner.check import check_image
from planner.findings import Structure
from planner.triage import Suspect, triage_leaks


def damaged(*names: str) -> Image:
    image = sample().build()
    for name in names:
        DAMAGES[name](image, random.Random(1))
    return image


def suspects(image: Image) -> tuple[Suspect, ...]:
    return triage_leaks(image.source, check_image(image.source)).suspects


def test_the_table_behind_a_zeroed_l1_entry_is_a_suspect():
    image = sample().build()
    lost = image.l2_at(image.geometry.l2_entries) & -image.cluster_size
    image.set_word(image.l1_at(1), 0)
    (suspect,) = suspects(image)
    assert suspect.offset == lost
    assert not suspect.is_l1
    assert suspect.leaked_targets == suspect.targets > 0
    assert "a lost L2 table" in suspect.sentence


def test_the_l1_table_of_a_lost_snapshot_is_a_suspect():
    found = suspects(damaged("lost-snapshot"))
    assert any(suspect.is_l1 and "lost snapshot" in suspect.sentence for suspect in found)


def test_leaked_data_is_no_suspect():
    assert not suspects(damaged("leaked-clusters"))


def counted_once_more(image: Image) -> Image:
    """As if a snapshot that shared everything were lost."""
    refcounts = image.refcounts()
    for cluster in range(1, image.host_clusters):
        image.set_refcount(cluster, refcounts[cluster] + (refcounts[cluster] > 0))
    return image


def test_an_l2_table_that_lost_one_of_its_l1_entries_is_a_suspect():
    image = counted_once_more(sample().build())
    assert image.l2_at(0) in {suspect.offset for suspect in suspects(image)}


def test_of_what_is_in_use_only_l2_tables_are_suspects():
    image = counted_once_more(sample().build())
    regions = check_image(image.source).regions
    tables = set(regions.offset[regions.structure == Structure.L2_TABLE].tolist())
    assert {suspect.offset for suspect in suspects(image)} <= tables


def test_how_many_leaked_clusters_were_looked_at_is_said():
    image = damaged("leaked-clusters")
    report = check_image(image.source)
    triage = triage_leaks(image.source, report)
    assert triage.looked_at <= triage.leaked == report.counters.leaks
