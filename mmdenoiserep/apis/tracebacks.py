"""Whose error it is: that of the user's own code, whose author needs the traceback, or one to tell in a sentence."""

import sysconfig
import traceback
from pathlib import Path

LIBRARIES = ('mmdenoiserep', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torch')
TOOLS = Path(__file__).parents[2] / 'tools'


def is_from_user(error: BaseException | None) -> bool:
    """Returns whether code of the user raised an error, or called what raised it: a module, model or step of their own.

    That is a file that is no config, and belongs neither to Python's own library nor to an installed package nor to
    this project.

    Args:
        error: What was caught; what it came from counts, too.
    """
    kinds = ('stdlib', 'platstdlib', 'purelib', 'platlib', 'scripts')
    installed = [Path(path).resolve() for path in {*map(sysconfig.get_path, kinds), TOOLS}]
    while error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            name, path = frame.f_globals.get('__name__', ''), Path(frame.f_code.co_filename)
            is_config = not frame.f_globals.get('__spec__') and name != '__main__'  # it is executed without a spec
            if is_config or name.partition('.')[0] in LIBRARIES or not path.is_file():
                continue
            if not any(map(path.resolve().is_relative_to, installed)):
                return True
        error = error.__cause__ or error.__context__
    return False
