"""Where on a disk volumes are: partition tables, LVM2, and what a volume is if no file system.

`find.find_volumes` is the front door, a module a scheme.
"""
