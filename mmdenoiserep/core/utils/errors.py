"""Errors in the user's input, each reported in one sentence."""


def printable(text: str) -> str:
    """Returns a text with its control characters escaped: names in a file must not control the terminal."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode() for c in text)


class InputError(Exception):
    """Unusable input; the message is one sentence that names the file, key or layer and says what to do.

    The tools print the message without a traceback. Errors in the code of the user's model or data are not InputErrors.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class CheckpointError(InputError):
    """A file that can't be read, fused or written."""
