"""ext2, ext3 and ext4, a module a structure; `filesystem.recognise` is the front door.

By the kernel's `Documentation/filesystems/ext4`, whose names are kept. All numbers are
little-endian; blocks are the unit, but for what leaves this package, which is bytes.
"""
