"""Campaigns that damage images with file systems, and judge which files are said to be hit."""
