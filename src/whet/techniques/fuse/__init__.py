"""Fewer operations for the same function."""
