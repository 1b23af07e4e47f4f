"""The console commands, and how every tool ends: ``launch`` turns what a user can mend into one sentence.

``denoiserep-train`` runs ``tools/train.py``, that of the checkout or of the installed package. This module stands
outside of the package, whose import brings torch: ``--help`` has to answer at once.
"""

import io
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = next(folder for folder in (HERE / 'mmdenoiserep/.mim/tools', HERE / 'tools') if folder.is_dir())
PACKAGES = {
    'mmseg': 'mmsegmentation',
    'cv2': 'opencv-python',
    'sklearn': 'scikit-learn',
    'pkg_resources': '"setuptools<81"',
}
"""What brings a module, where it has another name."""


def main() -> None:
    """Runs the tool that the command is named after, as a script."""
    name = Path(sys.argv[0]).stem.removeprefix('denoiserep-').replace('-', '_')
    path = next(iter(TOOLS.rglob(f'{name}.py')))
    # from its file: by name, Python's own package "test" may come first, and runpy would name another program in --help
    spec = spec_from_file_location('__main__', path)
    sys.modules['__main__'] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


def launch(run: Callable[[], None]) -> None:
    """Runs a tool; a missing module, input that is refused and an interrupt end the program with a sentence.

    Everything else keeps its traceback. The folder of the tools leaves the path, so that no module of the user is taken
    for a tool of the same name. A name that is no UTF-8 is printed with escapes.

    Args:
        run: The tool's ``main``.

    Raises:
        SystemExit: With the sentence, behind the name of the tool.
    """
    sys.path[:] = [entry for entry in sys.path if not entry or not Path(entry).resolve().is_relative_to(TOOLS)]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        run()
    except KeyboardInterrupt:
        raise SystemExit(_one_line('interrupted')) from None
    except Exception as error:
        if not (sentence := _describe(error)):
            raise
        raise SystemExit(_one_line(sentence)) from None


def _describe(error: Exception) -> str:
    """Returns the sentence of an error that a user can mend; empty if it is none."""
    core = sys.modules.get('mmdenoiserep.core')
    if core and isinstance(error, core.InputError):
        return str(error)
    name = (getattr(error, 'name', None) or '').partition('.')[0]
    if isinstance(error, ModuleNotFoundError) and name and not find_spec(name):
        # what is raised on purpose says who needs the module
        who = str(error) if not error.msg.startswith('No module named') else f'this tool needs {name}'
        package = PACKAGES.get(name, name)
        return f'{who}, which is not installed; make install brings the tested versions, or: pip install {package}'
    return ''


def _one_line(sentence: str) -> str:
    line = re.sub(r'\s*[\r\n]\s*', ' ', f'{Path(sys.argv[0]).stem}: {sentence.strip()}')
    if line.isprintable():
        return line
    from mmdenoiserep.core.utils.errors import printable

    return printable(line)
