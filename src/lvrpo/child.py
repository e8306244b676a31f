"""The command line of a child process that runs a module of lvrpo and imports no file of the current folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def module_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment; lvrpo is found where this process found it."""
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-P", "-m", module, *arguments]  # -P: nothing is imported from the current folder
    return command, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
