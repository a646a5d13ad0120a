"""One opened image: its file, who else has it, and how much memory it may take."""
