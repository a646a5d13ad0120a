"""What the check costs, beside its peers: run it with ``make bench``. Nothing here asserts a time."""
