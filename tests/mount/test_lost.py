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
    return sorted(path.name for path in (mount / "lost").iterdir())


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
