"""`python -m cnnjax`, the same as the command `cnnjax`."""

from cnnjax.cli import main

main()
