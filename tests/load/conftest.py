"""How long a mount is under load."""

import pytest


@pytest.fixture
def load_seconds(cases: int) -> float:
    """Four seconds, or one for each 60 cases: `--cases 36000` is 10 minutes."""
    return max(4.0, cases / 60)
