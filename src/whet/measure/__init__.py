"""Readings: what a network costs and how good it is, with how that was measured."""
