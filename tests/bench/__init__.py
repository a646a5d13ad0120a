"""What the check costs, beside its peers: ``make bench``. Nothing here asserts a time."""
