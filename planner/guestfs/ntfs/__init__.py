"""NTFS, a module a structure; `filesystem.recognise` is the front door.

By the documentation of the Linux-NTFS project and ntfs-3g's `layout.h`, whose names are kept. All
numbers are little-endian. Every file has a record in the table of them, the MFT, which is a file.
"""
