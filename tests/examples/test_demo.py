"""examples/demo.sh tells its whole story, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_demo_repairs_and_takes_it_back(tmp_path: Path) -> None:
    # It uses the .venv beside it: here that is whatever runs the tests.
    (tmp_path / "examples").symlink_to(EXAMPLES)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [tmp_path / "examples/demo.sh"],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": path},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Structure needs cleaning") == 1
    told = iter(done.stdout.splitlines())
    for line in (
        "damaged.qcow2: corrupt",
        "looks like a lost L2 table",
        "$ echo leaks > mnt/repair/tier",
        '"status": "refused"',
        "$ echo all > mnt/repair/tier",
        "none leaks [all]",
        "damaged.qcow2: clean",
        "$ echo undo > mnt/repair/undo",
        "damaged.qcow2: corrupt",
        "$ instarfs umount mnt",
        "$ instarfs files hit.qcow2",
        "/home/alice/thesis.txt",
    ):
        assert any(line in each for each in told), line
    assert list(temporary.iterdir()) == []
