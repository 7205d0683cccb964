"""The commands behind `vidcompress.cli`: argument parsing and tables, nothing else."""

from vidcompress.commands import answer, describe, measure
from vidcompress.commands.shared import app

__all__ = ["answer", "app", "describe", "measure"]
