"""The techniques, one a file, strangers to each other."""
