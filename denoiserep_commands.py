"""The console commands: ``denoiserep-train`` runs ``tools/train.py``, that of the checkout or of the installed package.

This module stands outside of the package, whose import brings torch: ``--help`` has to answer at once.
"""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = next(folder for folder in (HERE / 'mmdenoiserep/.mim/tools', HERE / 'tools') if folder.is_dir())


def main() -> None:
    """Runs the tool that the command is named after, as a script beside the modules that it shares with others."""
    name = Path(sys.argv[0]).stem.removeprefix('denoiserep-').replace('-', '_')
    sys.path.insert(0, str(TOOLS))
    runpy.run_path(
        str(TOOLS / f'{name}.py'), run_name='__main__'
    )  # by name, Python's own package "test" may come first
