"""Leaked clusters as files: there once a check has run, the bytes of the image as they are."""

import errno
import json
from pathlib import Path

import pytest

from tests.mount.mounts import CLUSTER, MakeMount, Mount, leak, make_image, run, settle


@pytest.fixture
def lossy(tmp_path: Path) -> Path:
    """An image that lost the L2 table of 4 MiB of text; two clusters are leaked behind them."""
    image = make_image(tmp_path / "lossy.qcow2")
    for offset in (0, 4 << 20):
        run("qemu-io", "-c", f"write -P 0x61 {offset} 1M", image)
    with image.open("r+b") as file:
        file.seek(40)
        l1_table = int.from_bytes(file.read(8), "big")
        file.seek(l1_table)
        file.write(bytes(8))
    leak(image, 2)
    return image


def lost(mount: Mount) -> list[str]:
    return sorted(path.name for path in (mount / "lost").iterdir() if path.is_file())


def test_there_are_runs_only_once_a_check_has_run(mount: MakeMount, lossy: Path) -> None:
    fresh = mount(lossy)
    assert lost(fresh) == ["triage.json"]
    assert not (fresh / f"lost/{4 * CLUSTER}").exists()
    assert fresh.read("check/progress") == "idle\n"
    fresh.read("check/result.json")
    assert len(lost(fresh)) > 1


def test_a_run_has_the_bytes_of_the_image(mount: MakeMount, lossy: Path) -> None:
    it = mount(lossy)
    rows = [row.split("\t") for row in it.read("check/leaks").splitlines()[1:]]
    content = lossy.read_bytes()
    names = lost(it)
    names.remove("triage.json")
    assert sum((it / "lost" / name).stat().st_size for name in names) == sum(
        int(row[1]) for row in rows
    )
    for name in names:
        data = (it / "lost" / name).read_bytes()
        assert data == content[int(name) : int(name) + len(data)]
        assert len(data) == (it / "lost" / name).stat().st_size > 0
    assert any(b"a" * CLUSTER in (it / "lost" / name).read_bytes() for name in names)


def test_only_what_begins_a_run_is_a_name(mount: MakeMount, lossy: Path) -> None:
    it = mount(lossy)
    it.read("check/leaks")
    (name, *_) = (name for name in lost(it) if name != "triage.json")
    for other in (f"0{name}", hex(int(name)), str(int(name) + 1), "-1", "x", "9" * 40, "²"):
        with pytest.raises(FileNotFoundError):
            (it / "lost" / other).read_bytes()


def test_the_runs_go_with_the_check_that_found_them(mount: MakeMount, lossy: Path) -> None:
    it = mount(lossy)
    it.read("check/leaks")
    name = lost(it)[0]
    with (it / "lost" / name).open("rb") as file:
        (it / "repair/tier").write_text(
            f"leaks {json.loads(it.read('repair/plan/leaks.json'))['plan-id']}"
        )
        settle(lossy)
        it.read("check/leaks")
        assert lost(it) == ["triage.json"]
        # Freed clusters keep their bytes, and so does a file that was open.
        assert len(file.read(CLUSTER)) == CLUSTER


def test_triage_names_the_lost_table(mount: MakeMount, lossy: Path) -> None:
    value = json.loads(mount(lossy).read("lost/triage.json"))
    (table,) = value["tables"]
    assert table["looks-lost"]
    assert table["maps"] == {"looks-like": {"data": 32}, "starts-with": {"text": 32}}
    assert table["may-have-stood"] == [
        {
            "l1-entry": "empty",
            "snapshot": None,
            "l1-index": 0,
            "count": 1,
            "guest-offset": 0,
            "guest-length": 64 << 20,
        }
    ]
    assert value["suspect-count"] == 1
    assert value["leaked-clusters"] == value["leaked-clusters-looked-at"] == 35


def test_a_clean_image_has_nothing_lost(mount: MakeMount, image: Path) -> None:
    it = mount(image)
    assert json.loads(it.read("lost/triage.json"))["runs"] == []
    it.read("check/leaks")
    assert lost(it) == ["triage.json"]


def test_nothing_can_be_written_there(mount: MakeMount, lossy: Path) -> None:
    it = mount(lossy)
    it.read("check/leaks")
    with pytest.raises(OSError, match="Read-only") as refused:
        (it / "lost" / lost(it)[0]).write_bytes(b"x")
    assert refused.value.errno == errno.EROFS


def disks_below(mount: Mount) -> list[str]:
    """What is in lost/l2 and lost/snapshots, files alone."""
    found = run("find", mount / "lost/l2", mount / "lost/snapshots", "-type", "f").split()
    return sorted(str(Path(path).relative_to(mount.path)) for path in found)


def test_a_lost_table_is_read_through_as_the_part_of_the_disk_that_it_mapped(
    mount: MakeMount, lossy: Path
) -> None:
    it = mount(lossy)
    assert disks_below(it) == []
    it.read("check/result.json")
    assert disks_below(it) == []  # listing looks into nothing
    table = json.loads(it.read("lost/triage.json"))["tables"][0]["offset"]
    assert disks_below(it) == [f"lost/l2/{table}.raw"]
    file = it / f"lost/l2/{table}.raw"
    data = file.read_bytes()
    text = b"a" * (1 << 20)
    assert data == (text + bytes(3 << 20) + text).ljust(64 << 20, b"\0")
    status = file.stat()
    assert (status.st_size, status.st_blocks) == (64 << 20, (2 << 20) // 512)
    for other in (f"{table + CLUSTER}.raw", f"0{table}.raw", f"{table}", "0.raw", "x.raw"):
        assert not (it / "lost/l2" / other).exists()


def test_a_lost_snapshot_is_a_disk(mount: MakeMount, tmp_path: Path) -> None:
    image, raw = make_image(tmp_path / "image.qcow2"), tmp_path / "raw"
    run("qemu-io", "-c", "write -P 0x62 0 1M", image)
    run("qemu-img", "snapshot", "-c", "one", image)
    run("qemu-io", "-c", "write -P 0x63 0 1M", image)
    run("qemu-img", "convert", "-l", "one", "-O", "raw", image, raw)
    with image.open("r+b") as file:
        file.seek(60)
        file.write(bytes(4))  # nb_snapshots
    it = mount(image)
    it.read("check/report.txt")
    (disk,) = (name for name in disks_below(it) if name.startswith("lost/snapshots/"))
    assert (it / disk).read_bytes() == raw.read_bytes()
