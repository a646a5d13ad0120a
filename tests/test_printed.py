"""Nothing that is printed or shown changes by accident, for any image of the corpus.

Where a change is meant, `python -m tests.printed --write` takes it for right; what it is shows
`--keep DIR`, run before and after it, and `diff -r`.
"""

from tests.printed import digest, expected, images

IMAGES = images()
SOME = 3
"""One of so many is looked at where no campaign is asked for."""


def test_every_image_of_the_corpus_is_known():
    assert IMAGES.keys() == expected().keys()


def test_what_is_printed_is_what_was_printed(cases: int):
    names = list(IMAGES)[:: SOME if cases < 1000 else 1]
    known = expected()
    assert not {name for name in names if digest(IMAGES[name]) != known[name]}
