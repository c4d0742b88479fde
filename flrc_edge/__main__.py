"""``python -m flrc_edge`` is the command line."""

from flrc_edge.cli import main

main()
