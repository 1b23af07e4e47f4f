"""Converts checkpoints that others released, for the configs of this project and for all of its tools."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..core import InputError, read_checkpoint
from ..core.files.atomic import check_output
from ..core.files.checkpoint import write_atomically
from ..core.files.content import open_checkpoint


def convert_file(
    kind: str,
    source: str | Path,
    target: str | Path,
    *,
    key: str | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> tuple[int, tuple[str, ...]]:
    """Converts a checkpoint.

    Args:
        kind: Whose names the source has: ``'transreid'``, ``'vmamba'``, or ``'plain'`` for names that stay.
        source: The released file.
        target: File to write.
        key: Where the weights of a plain file lie, such as ``'teacher'``; a dot leads into a dict.
        overwrite: Whether the target may exist.
        allow_pickle: See :func:`mmdenoiserep.core.read_checkpoint`.

    Returns:
        The number of tensors; sentences about what was stripped or left out.

    Raises:
        InputError: The source can't be read or converted, or the target can't be written.
    """
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
