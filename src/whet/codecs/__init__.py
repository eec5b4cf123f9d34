"""Symbols to bytes and back, one codec a file."""
