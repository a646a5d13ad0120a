"""Nothing that is printed or shown changes by accident, for any image of the corpus.

Where a change is meant, `python -m tests.printed --write` takes it for right; what it is shows
`--keep DIR`, run before and after it, and `diff -r`.
"""

from tests.printed import ENDED, FAILED, digest, expected, images, printed
from tests.schemas import require_valid_file, require_valid_output

IMAGES = images()
SOME = 3
"""One of so many is looked at where no campaign is asked for."""


def test_every_image_of_the_corpus_is_known():
    assert IMAGES.keys() == expected().keys()


def test_what_is_printed_is_what_was_printed(cases: int):
    names = list(IMAGES)[:: SOME if cases < 1000 else 1]
    known, found = expected(), {}
    for name in names:
        shown = printed(IMAGES[name])
        found[name] = digest(shown)
        for what, text in shown.items():
            require_valid(what, text)
    assert not {name for name in names if found[name] != known[name]}


def require_valid(what: str, text: str) -> None:
    """What is JSON in it has the keys that its schema has, and no others."""
    if what.startswith("/"):
        require_valid_file(what, text)
    else:
        require_valid_output(what.split(), text.partition(ENDED)[0].partition(FAILED)[0].strip())
