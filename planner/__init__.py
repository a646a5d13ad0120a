"""The pure half of instarfs: bytes in, values out.

Everything that decides lives here: the on-disk format, the census, the check and its report.
Nothing here opens a file, takes a lock, writes a byte or knows of the mounted filesystem.
"""
