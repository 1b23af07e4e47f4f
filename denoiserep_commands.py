"""The console commands, and ``launch``, which runs every tool and prints errors that users can fix as one sentence.

``denoiserep-train`` runs ``tools/train.py`` of the checkout or of the installed package. This module is outside of the
package because importing the package imports torch, and ``--help`` has to be fast.
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
"""The package that provides a module, if its name differs."""
INSTALLED = {
    *PACKAGES,
    *('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'numpy', 'tqdm', 'scipy', 'h5py'),
    *('matplotlib', 'albumentations', 'onnx', 'onnxruntime', 'onnxscript', 'tensorboard', 'pycocotools'),
}
"""Modules that ``make install`` brings and tools need."""


def main() -> None:
    """Runs the tool with the name of the command, as a script."""
    name = Path(sys.argv[0]).stem.removeprefix('denoiserep-').replace('-', '_')
    path = next(iter(TOOLS.rglob(f'{name}.py')))
    # by path: the name "test" may find Python's own package, and runpy would print another program name in --help
    spec = spec_from_file_location('__main__', path)
    sys.modules['__main__'] = module = module_from_spec(spec)
    spec.loader.exec_module(module)


def launch(run: Callable[[], None]) -> None:
    """Runs a tool; an InputError, a missing module or an interrupt ends the program with one sentence.

    All other errors keep their traceback. Removes the folder of the tools from ``sys.path``, so a tool can't hide a
    user's module of the same name. Prints file names that are not UTF-8 with escapes.

    Args:
        run: ``main`` of the tool.

    Raises:
        SystemExit: With the name of the tool and the sentence.
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
    """Returns the sentence for an error that users can fix; empty for other errors."""
    core = sys.modules.get('mmdenoiserep.core')
    if core and isinstance(error, core.InputError):
        return str(error)
    name = (getattr(error, 'name', None) or '').partition('.')[0]
    if isinstance(error, ModuleNotFoundError) and name and not find_spec(name):
        # an error raised on purpose says what needs the module
        who = str(error) if not error.msg.startswith('No module named') else f'this tool needs {name}'
        package = PACKAGES.get(name, name)
        if name not in INSTALLED:  # perhaps a module of the user, or a slip
            return f'{who}, which is neither installed nor on PYTHONPATH'
        return f'{who}, which is not installed; make install brings the tested versions, or: pip install {package}'
    return ''


def _one_line(sentence: str) -> str:
    line = re.sub(r'\s*[\r\n]\s*', ' ', f'{Path(sys.argv[0]).stem}: {sentence.strip()}')
    if line.isprintable():
        return line
    from mmdenoiserep.core.utils.errors import printable

    return printable(line)
