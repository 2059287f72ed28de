"""The command line: ``gradleak demo``, ``attack``, ``report``, ``list``, ``reproduce``."""

from gradleak.cli.commands import main

__all__ = ["main"]
