"""FAT12, FAT16, FAT32 and exFAT; `filesystem` is the front door.

By Microsoft's specifications of both. All numbers are little-endian. There are no inodes: a file is
known by the offset of its entry in a directory, the root by 0, where the boot sector is.
"""
