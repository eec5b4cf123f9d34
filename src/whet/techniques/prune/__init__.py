"""Fewer weights, channels and layers."""
