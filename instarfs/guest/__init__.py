"""The guest's bytes: of its disk, of its snapshots, and of its saved machine states."""
