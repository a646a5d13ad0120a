"""XFS, versions 4 and 5, a module a structure; `filesystem.recognise` is the front door.

By the "XFS Algorithms & Data Structures" and the kernel's `xfs_format.h`, whose names are kept. All
numbers are big-endian. A block is known by its allocation group and its number there, by both in
one number (*fsblock*), or by its place from the first of the file system on (*linear*), which is
what this package calculates with.
"""
