"""A mount under load: no wrong byte, nobody stuck, nothing that grows."""

from contextlib import ExitStack
from pathlib import Path

from tests.load.campaign import (
    GROWTH_BYTES,
    GROWTH_DESCRIPTORS,
    LONG_SECONDS,
    Load,
    Size,
    has_settled,
    open_many,
    prepare,
    summary,
)
from tests.load.truth import Truth
from tests.mount.mounts import INSTARFS, mounted

WARM_UP = 2.0


def test_nothing_goes_wrong_under_load(tmp_path: Path, load_seconds: float) -> None:
    image = tmp_path / "image.qcow2"
    prepare(image)
    command: list[str | Path] = [*INSTARFS, "mount", "-f", image, tmp_path / "mnt"]
    with mounted(command, image, tmp_path / "mnt") as mount, ExitStack() as handles:
        mount.unexpected = ("Traceback", "unexpected")
        truth = Truth.record(mount)
        open_many(mount, handles)
        warm_up = Load(mount, truth)
        warm_up.run(WARM_UP)
        assert not warm_up.wrong, warm_up.wrong[0]
        before = Size.of(mount)
        load = Load(mount, truth)
        load.run(load_seconds)
        assert not load.wrong, load.wrong[0]
        after = Size.of(mount)
        print(summary(load))
        assert load.quiet > 0
        assert after.memory - before.memory < GROWTH_BYTES
        assert after.descriptors - before.descriptors < GROWTH_DESCRIPTORS
        assert load_seconds < LONG_SECONDS or has_settled(load.sizes)
        assert mount.read("README.txt")
