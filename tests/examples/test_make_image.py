"""The sample images: what they hold, what each damage gives, and the program that writes them."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from examples.make_image import main
from planner.check.check import check_image
from planner.findings.kinds import FindingKind
from planner.qcow2.header import CRYPT_LUKS
from tests.images.builder import Image, ImageBuilder, zlib_compress, zstd_compress
from tests.images.damage import DAMAGES, TELLING, CannotDamageError
from tests.images.luks_headers import luks_bytes
from tests.images.sample import sample

ROOT = Path(__file__).resolve().parents[2]
SOUND = bytes(sample().build().data)


def damaged(*names: str, seed: int = 1) -> Image:
    image, rng = Image(bytearray(SOUND)), random.Random(seed)
    for name in names:
        DAMAGES[name](image, rng)
    return image


def kinds_of(image: Image) -> set[FindingKind]:
    report = check_image(image.source)
    return set(report.counts()) if report.error is None else set()


def test_sample_is_sound_and_has_a_bit_of_everything() -> None:
    report = check_image(Image(bytearray(SOUND)).source)
    assert list(report.rows()) == []
    assert report.verdict == "clean"
    assert len(report.snapshots) == 1
    assert report.counters.compressed_clusters > 0
    assert report.counters.allocated_clusters * 65536 > 2 << 20


GIVES = {
    "leaked-clusters": {FindingKind.LEAK},
    "lost-l2-table": {FindingKind.LEAK},
    "low-refcount": {FindingKind.REFCOUNT_LOW, FindingKind.L2_COPIED},
    "missing-refcount": {FindingKind.REFCOUNT_MISSING, FindingKind.L2_COPIED},
    "wrong-copied": {FindingKind.L2_COPIED},
    "shared-cluster": {
        FindingKind.MULTIPLE_OWNERS,
        FindingKind.REFCOUNT_LOW,
        FindingKind.LEAK,
    },
    "guest-on-metadata": {
        FindingKind.MULTIPLE_OWNERS,
        FindingKind.REFCOUNT_LOW,
        FindingKind.LEAK,
    },
    "data-past-end": {FindingKind.PAST_END, FindingKind.L2_COPIED, FindingKind.LEAK},
    "data-misaligned": {FindingKind.DATA_MISALIGNED},
    "reserved-l1-bits": {FindingKind.L1_ENTRY_RESERVED},
    "reserved-l2-bits": {FindingKind.L2_ENTRY_RESERVED},
    "lost-snapshot": {FindingKind.LEAK},
    "snapshot-l1-misaligned": {FindingKind.SNAPSHOT_L1_MISALIGNED},
    "bad-bitmap-entry": {FindingKind.BITMAP_ENTRY_INVALID, FindingKind.CHECK_STOPPED},
    "stale-bitmaps": {FindingKind.STALE_BITMAPS, FindingKind.LEAK},
    "lost-refblock": {FindingKind.REFCOUNT_MISSING},
    "corrupt-bit": {FindingKind.CORRUPT_BIT},
    "dirty-bit": {FindingKind.DIRTY_BIT},
    "cut-short": {FindingKind.PAST_END},
}


def test_every_damage_is_known_here() -> None:
    assert GIVES.keys() == DAMAGES.keys()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_gives_its_findings(name, seed) -> None:
    assert GIVES[name] <= kinds_of(damaged(name, seed=seed))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_says_what_it_is_and_what_it_did(name) -> None:
    assert DAMAGES[name].__doc__
    assert DAMAGES[name](Image(bytearray(SOUND)), random.Random(1))


def test_the_telling_damages_make_a_report_worth_reading() -> None:
    report = check_image(damaged(*TELLING).source)
    rows = list(report.rows())
    assert {row.kind for row in rows} == {
        FindingKind.LEAK,
        FindingKind.REFCOUNT_LOW,
        FindingKind.L2_COPIED,
        FindingKind.MULTIPLE_OWNERS,
    }
    assert len([row for row in rows if row.kind is FindingKind.LEAK]) > 3
    assert report.verdict == "corrupt"


@pytest.mark.parametrize("name", ["lost-snapshot", "bad-bitmap-entry", "wrong-copied"])
def test_damage_that_cannot_befall_an_image_is_refused(name) -> None:
    builder = ImageBuilder(size=1 << 30)
    builder.write(0, b"x")
    image = builder.build()
    before = bytes(image.data)
    with pytest.raises(CannotDamageError):
        DAMAGES[name](image, random.Random(1))
    assert bytes(image.data) == before


# The builder


def test_builder_refuses_what_no_image_can_hold() -> None:
    with pytest.raises(ValueError, match="past the end of the disk"):
        ImageBuilder(size=1 << 20).write(16, b"x")
    with pytest.raises(ValueError, match="does not fit one cluster"):
        ImageBuilder(cluster_bits=9, size=1 << 20, backing_file=b"b" * 500).build()


def test_builder_refuses_compressed_data_that_needs_more_sectors_than_its_entry_can_say() -> None:
    builder, noise = ImageBuilder(cluster_bits=9, size=1 << 20), random.Random(1).randbytes(512)
    for _ in range(103):  # 517 bytes each: the next begins at the end of a sector.
        builder.write_compressed(0, noise)
    with pytest.raises(ValueError, match="does not compress"):
        builder.write_compressed(0, noise)


def test_builder_refuses_more_references_than_the_width_holds() -> None:
    builder = ImageBuilder(refcount_order=0, size=1 << 20)
    builder.write(0, b"x")
    builder.take_snapshot("shares it")
    with pytest.raises(ValueError, match="more references"):
        builder.build()


def test_cluster_written_twice_is_kept_only_where_a_snapshot_holds_it() -> None:
    builder = ImageBuilder(size=1 << 20)
    builder.write(0, b"first")
    builder.write(0, b"second")
    builder.take_snapshot("holds the second")
    builder.write(0, b"third")
    image = builder.build()
    assert image.data[image.host_offset(0) :].startswith(b"third")
    held = image.word(image.l2_at(0, snapshot=0))
    assert image.data[held:].startswith(b"second")
    assert bytes(image.data).count(b"first") == 1
    assert image.refcount(bytes(image.data).index(b"first") // image.cluster_size) == 0


def test_luks_header_is_counted_where_its_extension_says() -> None:
    image = ImageBuilder(crypt_method=CRYPT_LUKS, luks_header=luks_bytes()).build()
    assert check_image(image.source).verdict == "clean"


@pytest.mark.parametrize("compress", [zlib_compress, zstd_compress])
def test_compression_makes_runs_small(compress) -> None:
    assert len(compress(bytes(65536))) < 200


# The program


def test_list_names_every_damage(capsys) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(DAMAGES)


def test_default_image_has_the_telling_damages(tmp_path, capsys) -> None:
    path = tmp_path / "out.qcow2"
    assert main([str(path)]) == 0
    assert path.read_bytes() == bytes(damaged(*TELLING).data)
    out = capsys.readouterr().out
    assert all(name in out for name in TELLING)


def test_no_damage_on_request(tmp_path) -> None:
    path = tmp_path / "out.qcow2"
    assert main([str(path), "--damage", "none"]) == 0
    assert path.read_bytes() == SOUND


def test_seed_changes_the_image_and_nothing_else_does(tmp_path) -> None:
    written = []
    for number, seed in enumerate(["7", "7", "8"]):
        path = tmp_path / f"{number}.qcow2"
        assert main([str(path), "--seed", seed, "--damage", "dirty-bit"]) == 0
        written.append(path.read_bytes())
    assert written[0] == written[1] != written[2]


@pytest.mark.parametrize("size", ["4K", "64K", "2M"])
def test_other_cluster_sizes(tmp_path, size) -> None:
    path = tmp_path / "out.qcow2"
    assert main([str(path), "--cluster-size", size, "--size", "2T", "--damage", "none"]) == 0
    assert check_image(Image(bytearray(path.read_bytes())).source).verdict == "clean"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "16M"], "the disk needs two L2 tables: 1073741824 bytes"),
        (["--damage", "lost-snapshot", "--damage", "snapshot-l1-misaligned"], "has no snapshot"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_writes_nothing(
    tmp_path, capsys, arguments, message
) -> None:
    path = tmp_path / "out.qcow2"
    assert main([str(path), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["out", "--damage", "no-such"],
        ["out", "--size", "many"],
        ["out", "--cluster-size", "3K"],
    ],
)
def test_wrong_usage(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_file_that_cannot_be_written_is_one_line(tmp_path, capsys) -> None:
    assert main([str(tmp_path / "missing" / "out.qcow2")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_program_runs_on_its_own(tmp_path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(ROOT / "examples" / "make_image.py"), "out.qcow2"]
    result = subprocess.run(
        program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "out.qcow2").read_bytes() == bytes(damaged(*TELLING).data)
