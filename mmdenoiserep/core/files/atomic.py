"""Writing a file all or nothing."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """Gives a new file in the folder of the target, which takes its name at the end, or is removed on any error.

    Until then it is hidden and ends with ``.part``; no other writer has the same. What a killed process leaves is one
    such file, and the target as it was.

    Args:
        target: File to write, with the permissions of any other new file; an older one, or a link, is replaced.

    Raises:
        OSError: The folder or disk does not take the file.
    """
    # a part of the name, for it may be as long as a name can be, and a character takes up to four bytes
    handle, temporary = tempfile.mkstemp(prefix=f'.{target.name[:32]}.', suffix='.part', dir=target.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
