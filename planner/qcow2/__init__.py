"""The qcow2 on-disk format, one module a structure.

The layout is that of QEMU's docs/interop/qcow2.txt, and so are the names. Decoding takes any bytes
of the right length; judging them is the business of `planner.check.check`.
"""
