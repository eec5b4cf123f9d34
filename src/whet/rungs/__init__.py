"""Rungs: what stands between the protocol and a technique, so that it is its mathematics."""
