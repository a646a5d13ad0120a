"""btrfs on one device, its data and metadata `single` or `DUP`; `filesystem` is the front door.

By the kernel's `include/uapi/linux/btrfs_tree.h`. All numbers are little-endian. Everything is in
trees, whose nodes say which they are and where they belong; trees go by *logical* addresses, and
chunks say where on the device those are, once or, as copies, twice.
"""
