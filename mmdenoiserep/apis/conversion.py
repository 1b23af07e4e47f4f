"""Converts released checkpoints to the parameter names of the libraries."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..core import InputError, read_checkpoint
from ..core.files.atomic import check_output
from ..core.files.checkpoint import write_atomically
from ..core.files.content import open_checkpoint
from .arguments import one_of


def convert_file(
    kind: str,
    source: str | Path,
    target: str | Path,
    *,
    key: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> tuple[int, tuple[str, ...]]:
    """Converts a released checkpoint.

    Args:
        kind: Format of the source: ``'transreid'``, ``'vmamba'``, or ``'plain'``, which keeps the names.
        source: The released file.
        target: File to write.
        key: Key of the weights in a plain file, such as ``'teacher'``; dots separate the keys of nested dicts.
        overwrite: Whether the target may exist.
        allow_pickle: See :func:`mmdenoiserep.core.read_checkpoint`.

    Returns:
        The number of tensors; a sentence for each change to names or content.

    Raises:
        InputError: The source can't be read or converted, or the target can't be written.

    Examples:
        >>> weights = torch.nn.Linear(4, 2).state_dict()
        >>> torch.save(dict(teacher=weights, student=weights), 'released.pth')
        >>> convert_file('plain', 'released.pth', 'converted.pth', key='teacher')[0]
        2
    """
    one_of(('transreid', 'vmamba', 'plain'), kind=kind)
    if key and kind != 'plain':
        raise InputError(f'a file of the kind {kind} takes no key, got {key!r}')
    source, target = Path(source), Path(target)
    check_output(target, overwrite, source=source)
    if kind == 'plain':
        content = open_checkpoint(source, allow_pickle, key)
        write_atomically(dict(meta=content.meta, state_dict=content.weights), target)
        return len(content.weights), content.notes
    convert = _converter(kind)
    try:
        state = convert(read_checkpoint(source, allow_pickle))
    except ValueError as error:
        raise InputError(f'{source} cannot be converted: {error}') from None
    write_atomically(dict(meta={}, state_dict=state), target)
    return len(state), ()


def _converter(kind: str) -> Callable[[dict], dict[str, Tensor]]:
    if kind == 'vmamba':
        from ..models.vmamba import convert_vmamba

        return convert_vmamba
    from ..models.transreid import convert_transreid

    return convert_transreid
