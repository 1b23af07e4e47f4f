"""The console commands: ``denoiserep-train`` runs ``tools/train.py``, that of the checkout or of the installed package.

This module stands outside of the package, whose import brings torch: ``--help`` has to answer at once.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = next(folder for folder in (HERE / 'mmdenoiserep/.mim/tools', HERE / 'tools') if folder.is_dir())


def main() -> None:
    """Runs the tool that the command is named after, as a script beside the modules that it shares with others."""
    name = Path(sys.argv[0]).stem.removeprefix('denoiserep-').replace('-', '_')
    sys.path.insert(0, str(TOOLS))
    # from its file: by name, Python's own package "test" may come first, and runpy would name another program in --help
    spec = spec_from_file_location('__main__', TOOLS / f'{name}.py')
    sys.modules['__main__'] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
