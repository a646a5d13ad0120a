"""What our work costs beside its peers: ``make bench``. Nothing here asserts a time.

`race` lets contestants take turns and measures them; `samples` makes the images; each other module
declares its races in a tuple `RACES`, which `__main__` joins. To add a row, add a `Race` to one of
them, or a `Row` to a race that has the contestants already.
"""
