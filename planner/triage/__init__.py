"""What leaked clusters look like, what may be lost with them, what it means for the guest."""
