"""The mount: what the tree looks like, what its files do, and how the kernel is answered."""
