"""Where lost L2 tables belong: what blocks of the guest's disk say, and what of it counts."""
