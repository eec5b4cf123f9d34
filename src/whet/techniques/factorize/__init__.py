"""Products of smaller factors."""
