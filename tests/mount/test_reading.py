"""Everyday programs on a mount: they read it as they would any folder."""

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from instarfs.mount import mountpoint
from planner.check.wire import CheckResult
from tests.fuzz.commands import TIER, WORDS
from tests.fuzz.costs import walk
from tests.mount.mounts import MakeMount, Mount, daemon_of, instarfs, make_image, run, settle

FILES = [
    "README.txt",
    "check/corruptions",
    "check/files.tsv",
    "check/findings.jsonl",
    "check/leaks",
    "check/progress",
    "check/refcounts",
    "check/report.txt",
    "check/result.bin",
    "check/result.json",
    "disk.raw",
    "image.qcow2",
    "image/bitmaps.json",
    "image/chain.json",
    "image/header.json",
    "image/info.json",
    "image/map.json",
    "image/map.svg",
    "lost/triage.json",
    "repair/plan/all.json",
    "repair/plan/bitmaps.json",
    "repair/plan/leaks.json",
    "repair/plan/snapshots.json",
    "repair/plan/split.json",
    "repair/progress",
    "repair/result.json",
    "repair/tier",
    "repair/trim",
    "repair/undo",
    "tables/clusters.tsv",
    "tables/l1.tsv",
]

LOST = "lost/262144"
"""The run of leaked clusters of `leaky_image`."""


def test_the_tree_is_what_the_readme_says(shared: Mount) -> None:
    shared.read("check/result.json")
    found = run("find", shared.path, "-type", "f", "-printf", "%P\n").split()
    assert sorted(found) == sorted([*FILES, LOST])
    readme = shared.read("README.txt")
    assert str(shared.image) in readme
    for name in FILES[1:]:
        assert f"    {name} " in readme


def test_listing_computes_nothing(mount: MakeMount, image: Path) -> None:
    fresh = mount(image)
    listing = run("ls", "-laR", fresh.path)
    assert "result.json" in listing
    for name in ("check/result.json", "image/info.json"):
        assert (fresh / name).stat().st_size == 0
    assert fresh.read("check/progress") == "idle\n"
    content = fresh.read("check/result.json")
    assert (fresh / "check/result.json").stat().st_size == len(content)
    # The same check serves all; a file that was not rendered yet has no size yet.
    assert (fresh / "check/leaks").stat().st_size == 0


def test_attributes(shared: Mount) -> None:
    root = shared.path.stat()
    assert stat.S_IMODE(root.st_mode) == 0o700
    assert root.st_nlink == 2 + 7
    assert (root.st_uid, root.st_gid) == (os.getuid(), os.getgid())
    check = (shared / "check").stat()
    assert (stat.S_IMODE(check.st_mode), check.st_nlink) == (0o700, 2)
    assert stat.S_IMODE((shared / "check/leaks").stat().st_mode) == 0o600
    assert stat.S_IMODE((shared / "repair/tier").stat().st_mode) == 0o600
    for name in FILES:
        assert (shared / name).stat().st_mtime_ns == shared.image.stat().st_mtime_ns


def test_inode_numbers_are_distinct_and_stay(shared: Mount) -> None:
    def numbers() -> list[str]:
        return run("find", shared.path, "-printf", "%i %P\n").splitlines()

    first = numbers()
    assert len({line.split()[0] for line in first}) == len(first)
    assert numbers() == first


def test_the_result_is_that_of_qemu(shared: Mount) -> None:
    ours = json.loads(shared.read("check/result.json"))
    theirs = subprocess.run(
        ["qemu-img", "check", "--output=json", shared.image],
        check=False,
        capture_output=True,
        text=True,
    )
    for key, value in json.loads(theirs.stdout).items():
        assert ours[key] == (str(shared.image) if key == "filename" else value), key
    assert ours["leaks"] == 3
    assert ours["verdict"] == "leaks"
    assert theirs.returncode == 3
    assert ours["image-in-use"] is False


def test_every_view_tells_of_the_same_leaks(shared: Mount) -> None:
    rows = shared.read("check/leaks").splitlines()
    assert rows[0].startswith("#")
    assert sum(int(row.split("\t")[1]) for row in rows[1:]) == 3 << 16
    assert "leak" in shared.read("check/report.txt")
    findings = [json.loads(line) for line in shared.read("check/findings.jsonl").splitlines()]
    assert {finding["kind"] for finding in findings} == {"leak"}
    assert CheckResult.from_bytes((shared / "check/result.bin").read_bytes()).leaks == 3


def test_the_clusters_are_those_of_the_whole_file(shared: Mount) -> None:
    rows = [line.split("\t") for line in shared.read("tables/clusters.tsv").splitlines()[1:]]
    assert sum(int(length) for _, length, *_ in rows) == shared.image.stat().st_size
    assert [row[2:] for row in rows if row[2] == "leaked"] == [["leaked", "1", "0", "leak"]]
    assert {row[2] for row in rows} >= {"header", "L1 table", "refcount table", "refcount block"}


def test_image_files(shared: Mount) -> None:
    theirs = json.loads(run("qemu-img", "info", "--output=json", shared.image))
    ours = json.loads(shared.read("image/info.json"))
    assert ours["virtual-size"] == theirs["virtual-size"] == 64 << 20
    assert json.loads(shared.read("image/header.json"))["header"]["version"] == 3


def test_df_and_the_mount_table(shared: Mount) -> None:
    line = run("df", "--output=source,fstype,itotal,target", shared.path).splitlines()[1]
    assert line.split(maxsplit=1)[0] == str(shared.image).split()[0]
    assert "fuse.instarfs" in line
    size = int(run("df", "-B1", "--output=size", shared.path).splitlines()[1])
    assert size >= shared.image.stat().st_size
    assert size - shared.image.stat().st_size < 4096


def test_searching(shared: Mount) -> None:
    assert run("grep", "-rl", '"verdict"', shared.path).split() == [
        str(shared / "check/result.json")
    ]


def test_reading_a_part(shared: Mount) -> None:
    path = shared / "check/report.txt"
    content = path.read_bytes()
    assert run("dd", f"if={path}", "bs=3", "skip=2", "count=2", "status=none") == (
        content[6:12].decode()
    )
    assert run("tail", "-c", "10", path) == content[-10:].decode()
    assert run("tail", "-n", "1", path) == content.decode().splitlines(keepends=True)[-1]
    assert run("head", "-c", "10", path) == content[:10].decode()
    assert run("wc", "-c", path).split()[0] == str(len(content))
    with path.open("rb") as file:
        assert os.pread(file.fileno(), 7, 5) == content[5:12]
        assert file.seek(0, os.SEEK_END) == len(content)


def test_a_json_parser_on_the_file_itself(shared: Mount) -> None:
    assert '"leaks": 3' in run(sys.executable, "-m", "json.tool", shared / "check/result.json")


def test_tail_follows_without_complaint(shared: Mount) -> None:
    path = shared / "check/report.txt"
    with subprocess.Popen(["tail", "-n", "+1", "-f", path], stdout=subprocess.PIPE) as tail:
        assert tail.stdout is not None
        content = path.read_bytes()
        assert tail.stdout.read(len(content)) == content
        assert tail.poll() is None
        tail.terminate()


def test_a_thousand_handles(shared: Mount) -> None:
    handles = [(shared / "check/result.json").open("rb") for _ in range(1000)]
    contents = {handle.read() for handle in handles}
    for handle in handles:
        handle.close()
    assert contents == {(shared / "check/result.json").read_bytes()}


def test_extended_attributes(shared: Mount) -> None:
    assert os.listxattr(shared / "check/leaks") == []
    with pytest.raises(OSError, match="not supported"):
        os.getxattr(shared / "check/leaks", "security.capability")
    assert daemon_of(shared.path) == shared.process.pid


def test_the_process_behind_a_mount_is_an_attribute_until_somebody_asks_for_another(
    mount: MakeMount, image: Path
) -> None:
    """Then the kernel asks for none any more: `ls -l` would have it ask for three of each file."""
    made = mount(image)
    named = os.getxattr(made.path, mountpoint.DAEMON_ATTRIBUTE)
    subprocess.run(["ls", "-l", made / "image"], check=True, capture_output=True)
    with pytest.raises(OSError, match="not supported"):
        os.getxattr(made.path, mountpoint.DAEMON_ATTRIBUTE)
    assert mountpoint.DAEMON_FILE not in [each.name for each in made.path.iterdir()]
    assert (made / mountpoint.DAEMON_FILE).read_bytes() == named
    found = mountpoint._find_mount(str(made.path))
    assert found is not None
    with mountpoint._daemon_of(str(made.path), found) as daemon:
        assert daemon is not None


@pytest.mark.parametrize(
    "command",
    [
        ["touch", "new"],
        ["touch", "check/leaks"],
        ["mkdir", "new"],
        ["rmdir", "image"],
        ["rm", "-f", "check/leaks"],
        ["mv", "check/leaks", "check/other"],
        ["ln", "check/leaks", "other"],
        ["ln", "-s", "check/leaks", "other"],
        ["chmod", "777", "check"],
        ["truncate", "-s", "0", "check/leaks"],
        ["dd", "if=/dev/null", "of=check/leaks"],
        ["mkfifo", "fifo"],
    ],
    ids=" ".join,
)
def test_nothing_can_be_changed(shared: Mount, command: list[str]) -> None:
    done = subprocess.run(
        command,
        cwd=shared.path,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr


def test_reading_changes_nothing(mount: MakeMount, image: Path) -> None:
    before = (image.stat().st_mtime_ns, image.stat().st_ctime_ns, image.read_bytes())
    fresh = mount(image)
    run("grep", "-r", "x", fresh.path)
    fresh.stop()
    assert before == (image.stat().st_mtime_ns, image.stat().st_ctime_ns, image.read_bytes())


def test_a_damaged_image_mounts_and_says_what_is_wrong(mount: MakeMount, image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(20)
        file.write((63).to_bytes(4, "big"))  # cluster_bits
    damaged = mount(image)
    assert "cluster_bits" in json.loads(damaged.read("image/info.json"))["error"]
    assert json.loads(damaged.read("image/header.json"))["field"] == "cluster_bits"
    assert "cluster_bits" in damaged.read("check/result.json")
    assert "cluster_bits" in damaged.read("check/report.txt")
    assert "cluster_bits" in damaged.read("image/map.json")
    for name in set(FILES) - {"disk.raw"}:
        (damaged / name).read_bytes()
    with pytest.raises(OSError, match="Structure needs cleaning"):
        (damaged / "disk.raw").read_bytes()


def test_a_name_that_options_and_mount_tables_spell_otherwise(
    mount: MakeMount, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "ä, b\\c d\n.qcow2")
    odd = mount(image)
    assert json.loads(odd.read("check/result.json"))["filename"] == str(image)
    assert "\\n.qcow2" in odd.read("README.txt")
    done = instarfs("umount", odd.path)
    assert (done.returncode, done.stderr) == (0, "")


def test_others_are_let_in_only_when_asked(mount: MakeMount, image: Path, tmp_path: Path) -> None:
    assert "allow_other" not in run("findmnt", "-no", "OPTIONS", mount(image).path)
    options = ("-o", "allow_other,nosuid,_netdev")
    directory = tmp_path / "mnt"
    directory.mkdir()
    tried = instarfs("mount", *options, image, directory)
    if os.geteuid() != 0 and tried.returncode != 0:
        # /etc/fuse.conf does not allow it to users; fusermount3 says so, in the one line.
        assert "user_allow_other" in tried.stderr
        assert len(tried.stderr.splitlines()) == 1
        return
    assert instarfs("umount", directory).returncode == 0
    open_to_all = mount(image, *options)
    assert "allow_other" in run("findmnt", "-no", "OPTIONS", open_to_all.path)
    assert stat.S_IMODE((open_to_all / "check").stat().st_mode) == 0o755
    assert stat.S_IMODE((open_to_all / "check/leaks").stat().st_mode) == 0o644
    assert stat.S_IMODE((open_to_all / "repair/tier").stat().st_mode) == 0o600


def test_read_only(mount: MakeMount, image: Path) -> None:
    fixed = mount(image, "--read-only")
    assert run("findmnt", "-no", "OPTIONS", fixed.path).startswith("ro,")
    with pytest.raises(OSError, match="Read-only file system"):
        (fixed / "repair/tier").open("w")
    assert fixed.read("check/leaks").startswith("#")


def without_its_last_snapshot(path: Path) -> Path:
    """An image with a snapshot, and tables of another, which its table has lost."""
    make_image(path)
    for name in ("one", "two"):
        run("qemu-io", "-c", "write -P 0x62 0 1M", path)
        run("qemu-img", "snapshot", "-c", name, path)
    run("qemu-io", "-c", "write -P 0x63 0 1M", path)
    with path.open("r+b") as file:
        file.seek(60)
        file.write((1).to_bytes(4, "big"))  # nb_snapshots
    settle(path)
    return path


def test_what_measures_a_mount_reads_every_file_of_it(mount: MakeMount, tmp_path: Path) -> None:
    image, read = without_its_last_snapshot(tmp_path / "image.qcow2"), set()
    mounts = [mount(image), mount(image, "--preview", "rescue")]
    for it in mounts:
        for path in walk(it.path):
            with path.open("rb") as file:
                file.read(1 << 16)
            read.add(str(path.relative_to(it.path)))
    assert mountpoint.DAEMON_FILE in read
    for it in mounts:
        for name in re.findall(r"^    (\w\S*)  ", it.read("README.txt"), re.MULTILINE):
            what = re.escape(name).replace("OFFSET", "[0-9]+").replace("N", "[0-9]+")
            what += "disk.raw" if name.endswith("/") else ""
            assert any(re.fullmatch(what, path) for path in read), name


def test_what_measures_a_mount_writes_to_every_control_file(shared: Mount) -> None:
    controls = set()
    for path in walk(shared.path):
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_WRONLY))
            controls.add(str(path.relative_to(shared.path)))
    assert TIER in controls
    assert controls == {name for name, _ in WORDS}
