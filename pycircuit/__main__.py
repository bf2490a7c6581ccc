"""`python -m pycircuit` is `pycircuit`."""

from pycircuit.cli import command

command()
