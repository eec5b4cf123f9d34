"""Runtimes, one a file: lower a network, run and time its files in a process of their own."""
