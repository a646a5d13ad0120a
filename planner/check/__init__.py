"""What is wrong with an image: the order of questions, the refcount walk, the rules of entries."""
