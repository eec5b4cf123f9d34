"""`python -m whet` is the command line."""

from whet.cli import main

main()
