"""Aged disks whose tables are lost: how many of them a rescue puts back, and whether right."""
