"""instarfs.errors: fields of an error, however they are given, and the sentence made of them."""

from __future__ import annotations

import pickle

import pytest

from instarfs.errors import ImageInUse, ImageNotQcow2, ImageReadFailed, ReadCancelled


@pytest.mark.parametrize(
    "error",
    [
        ImageInUse("a b", "write"),
        ImageInUse(path="a b", lock="write", wayout="stop it first"),
        pickle.loads(pickle.dumps(ImageInUse("a b", lock="write"))),  # noqa: S301 - our own
    ],
    ids=["by place", "by name", "from another process"],
)
def test_fields_are_those_of_the_class_and_fill_in_its_sentence(error: ImageInUse) -> None:
    assert (error.path, error.lock, error.wayout) == ("a b", "write", "stop it first")
    assert str(error).startswith("a b: Failed to get write lock")
    assert str(error).endswith("; stop it first")


def test_fields_are_inherited() -> None:
    assert str(ImageNotQcow2("p", "why")) == "p: why"
    assert str(ImageReadFailed("p", 7, "why")).startswith("p: reading at offset 7 failed: why;")


@pytest.mark.parametrize(
    ("kind", "values", "named"),
    [
        (ReadCancelled, ["too many"], {}),
        (ImageInUse, ["too few"], {}),
        (ImageInUse, ["path", "lock"], {"misspelt": ""}),
    ],
)
def test_other_fields_are_refused(kind, values, named) -> None:
    with pytest.raises(TypeError, match=kind.__name__):
        kind(*values, **named)
