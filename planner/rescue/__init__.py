"""What the metadata lost and evidence determines: hypotheses, each an overlay that is checked."""
