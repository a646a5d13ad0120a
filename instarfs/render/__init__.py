"""Values to JSON, text and TSV. Nothing here opens, computes or waits."""
