"""What is on the guest's disk: partitions, volumes, file systems, and whose bytes a range holds.

Read-only, by the file systems' own specifications, and tolerant: what cannot be read is a hole that
loses itself and nothing else. `protocol` is what every file system offers, `reading` what it reads
from.
"""
