"""The vocabulary of damage: kinds of findings, and findings in columns."""
