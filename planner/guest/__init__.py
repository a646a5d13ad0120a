"""What the guest reads: mapping, extents, and the chain of files that it reads from."""
