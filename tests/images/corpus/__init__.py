"""Damaged images, one for every rule of the check, each with the findings that it must give.

A module a chapter: ``ending`` (of the file), ``guest`` (L1 and L2), ``refcounts``, ``snapshots``,
``others`` (header, LUKS, bitmaps). What is common to them is in ``rule``.
"""

from tests.images.corpus import ending, guest, others, refcounts, snapshots
from tests.images.corpus.rule import RULES, Rule

__all__ = ["RULES", "Rule", "ending", "guest", "others", "refcounts", "snapshots"]
