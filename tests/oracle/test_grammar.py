"""`check`, `info` and `map` take the words that `qemu-img` takes, and end as it does."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from instarfs.cli.main import main
from tests.images.builder import Image, ImageBuilder
from tests.images.damage import DAMAGES
from tests.instarfs.repair.test_run import healthy
from tests.schemas import require_valid_output

VERBS = ("check", "info", "map")
AN_OBJECT = "secret,id=s0,data=sesame"

COMMON = (
    "-f qcow2 a.qcow2",
    "-fqcow2 a.qcow2",
    "-Ufqcow2 a.qcow2",
    "--format=qcow2 --output=json a.qcow2",
    "--format qcow2 --output json --force-share a.qcow2",
    "a.qcow2 -f qcow2",
    "-f qcow2 -- a.qcow2",
    "-f raw -f qcow2 a.qcow2",
    "-f raw missing",
    "-f qed a.qcow2",
    "-f nonsense a.qcow2",
    "-f qcow2 other",
    "--image-opts driver=qcow2,file.driver=file,file.filename=a.qcow2",
    "--image-opts file.filename=a.qcow2",
    "--image-opts file.filename=a.qcow2,",
    "--image-opts driver=qcow2,file.filename=c,,d,,.qcow2",
    "--image-opts driver=qcow2,file.filename=b,file.filename=a.qcow2",
    "--image-opts driver=qcow2,file.filename=a.qcow2,cache-size=1M,lazy-refcounts=on",
    "--image-opts driver=qcow2,file.filename=a.qcow2,read-only=on,file.locking=auto",
    "--image-opts driver=qcow2,file.filename=a.qcow2,force-share=on",
    "--image-opts driver=qcow2,file.filename=a.qcow2,force-share=perhaps",
    f"--image-opts --object {AN_OBJECT} driver=qcow2,file.filename=a.qcow2,encrypt.key-secret=s0",
    "--image-opts driver=qcow2,file.filename=missing",
    "--image-opts driver=qcow2,file.filename=other",
    "--image-opts driver=qcow2,file.filename=a.qcow2,bogus=on",
    "--image-opts driver=qcow2,filename=a.qcow2",
    "--image-opts driver=nonsense,file.filename=a.qcow2",
    "--image-opts file.driver=nonsense,file.filename=a.qcow2",
    "--image-opts a.qcow2",
    "--image-opts -f qcow2 file.filename=a.qcow2",
    f"--object {AN_OBJECT} a.qcow2",
    f"--object qom-type={AN_OBJECT} a.qcow2",
    "--object secret,data=sesame a.qcow2",
    "--object bogus,id=s0 a.qcow2",
    "--output=xml a.qcow2",
    "--bogus a.qcow2",
    "-z a.qcow2",
    "-f",
    "",
)
OF_CHECK = (
    *(f"-T {mode} a.qcow2" for mode in ("none", "off", "writeback", "writethrough")),
    *(f"-T {mode} a.qcow2" for mode in ("directsync", "unsafe", "bogus")),
    "-Tnone -q a.qcow2",
    "-f raw a.qcow2",
    "-f raw --output=json a.qcow2",
    "-f raw -r all a.qcow2",
    "--image-opts driver=raw,file.filename=a.qcow2",
    "other",
    "--repair=leaks a.qcow2",
    "-r all -f qcow2 -T none a.qcow2",
    "-r leaks --image-opts driver=qcow2,file.filename=a.qcow2",
    "-r leaks -U a.qcow2",
    "-r bogus a.qcow2",
    "-r all other",
    "-r all -f qcow2 other",
)
CASES = [(verb, words) for verb in VERBS for words in COMMON]
CASES += [("check", words) for words in OF_CHECK]
CASES += [("info", "--backing-chain a.qcow2"), ("info", "-f qcow2 --backing-chain a.qcow2")]
CASES += [("info", "-T none a.qcow2"), ("map", "-T none a.qcow2"), ("map", "a.qcow2 a.qcow2")]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def instarfs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["instarfs", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        out, err = capfd.readouterr()
        require_valid_output(arguments, out)
        return int(exited.value.code or 0), out, err

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    image = bytes(ImageBuilder().build().data)
    for name in ("a.qcow2", "c,d,.qcow2"):
        (tmp_path / name).write_bytes(image)
    (tmp_path / "other").write_bytes(b"not an image at all".ljust(1 << 16))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert (tmp_path / "a.qcow2").read_bytes() == image


@pytest.mark.parametrize(("verb", "words"), CASES, ids=lambda word: word or "nothing")
def test_exit_codes(verb: str, words: str, folder: Path, instarfs: Run) -> None:
    code, out, err = instarfs(verb, *words.split())
    theirs = subprocess.run(["qemu-img", verb, *words.split()], check=False, capture_output=True)
    assert code == theirs.returncode, (err, theirs.stderr)
    if code:
        assert (out, err.count("\n")) == ("", 1)
    else:
        assert bool(out) == bool(theirs.stdout)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("'bogus'", "--image-opts file.filename=a.qcow2,bogus=on"),
        ("'backing'", "--image-opts file.filename=a.qcow2,backing=b"),
        ("'data-file.filename'", "--image-opts file.filename=a.qcow2,data-file.filename=b"),
        ("file.driver='nbd'", "--image-opts file.filename=a.qcow2,file.driver=nbd"),
        ("file.locking='off'", "--image-opts file.filename=a.qcow2,file.locking=off"),
        ("'word'", "--image-opts file.filename=a.qcow2,word,bogus=on"),
        ("'=on'", "--image-opts file.filename=a.qcow2,=on"),
        ("file.filename=IMAGE", "--image-opts driver=qcow2"),
        ("--image-opts", "--image-opts --format=qcow2 file.filename=a.qcow2"),
        ("'iothread'", "--object iothread,id=s0 a.qcow2"),
        ("id", "--object secret,data=sesame a.qcow2"),
        ("'word'", "--object secret,id=s0,word a.qcow2"),
        ("--object", "--object { a.qcow2"),
        ("--object", "--object [] a.qcow2"),
        ("format qed", "-f qed a.qcow2"),
        ("'--bogus'", "--bogus a.qcow2"),
        ("'xml'", "--output xml a.qcow2"),
        ("-T", "-T bogus a.qcow2"),
        ("'json:'", 'json:{"driver":"qcow2","file":{"driver":"file","filename":"a.qcow2"}}'),
        ("'nbd:'", "nbd://localhost:10809"),
        ("'nbd+unix:'", "nbd+unix:///?socket=s"),
    ],
)
def test_what_is_not_understood_is_named(
    verb: str, word: str, words: str, folder: Path, instarfs: Run
) -> None:
    code, out, err = instarfs(verb, *words.split())
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert word in err
    assert "sesame" not in err


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_may_be_called_like_a_protocol(verb: str, folder: Path, instarfs: Run) -> None:
    (folder / "nbd:a.qcow2").symlink_to("a.qcow2")
    assert instarfs(verb, "nbd:a.qcow2")[0] == 0


@pytest.mark.parametrize(
    "definition", ['{"qom-type":"secret","id":"s","data":"sesame"}', '{"qom-type":"iothread"}']
)
def test_an_object_as_json(definition: str, folder: Path, instarfs: Run) -> None:
    words = ("check", "--object", definition, "a.qcow2")
    theirs = subprocess.run(["qemu-img", *words], check=False, capture_output=True)
    assert instarfs(*words)[0] == theirs.returncode


# ---- the keys of JSON ----

KEYS = {
    "filename",
    "format",
    "check-errors",
    "image-end-offset",
    "corruptions",
    "leaks",
    "corruptions-fixed",
    "leaks-fixed",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
}


# Of a bitmap entry that makes no sense QEMU says nothing but that the check failed.
JUDGED = sorted(DAMAGES.keys() - {"bad-bitmap-entry"})


def _damaged(names: tuple[str, ...]) -> bytes:
    made, rng = Image(bytearray(healthy())), random.Random(1)
    for name in names:
        DAMAGES[name](made, rng)
    return bytes(made.data)


@pytest.mark.parametrize(
    "content",
    [
        bytes(ImageBuilder().build().data),
        bytes(ImageBuilder(size=0).build().data),
        *(_damaged((name,)) for name in JUDGED),
        _damaged(("leaked-clusters", "wrong-copied")),
    ],
    ids=["new", "empty", *JUDGED, "two"],
)
def test_check_prints_the_keys_of_qemu_img(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instarfs: Run
) -> None:
    """Those that it leaves out are left out: callers ask whether ``leaks`` is there."""
    monkeypatch.chdir(tmp_path)
    Path("x.qcow2").write_bytes(content)
    ours = json.loads(instarfs("check", "--output=json", "x.qcow2")[1])
    command = ["qemu-img", "check", "--output=json", "x.qcow2"]
    theirs = json.loads(subprocess.run(command, check=False, capture_output=True).stdout)
    assert theirs.keys() <= KEYS
    assert {key: value for key, value in ours.items() if key in KEYS} == theirs
