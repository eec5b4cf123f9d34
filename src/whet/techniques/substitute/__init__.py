"""Trained layers give way to cheaper ones that compute nearly the same."""
