"""Many images: which there are, processes that check them, and what is known of each."""
