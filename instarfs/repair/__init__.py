"""The one writer: a repair from its tier to its outcome, and the way back."""
