"""Errors that a user can mend: bad input, told in one sentence."""


def printable(text: str) -> str:
    """Returns a text with its control characters escaped: a terminal would obey those in the names of a file."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape', 'surrogatepass').decode() for c in text)


class InputError(Exception):
    """Input that can't be used; the message is one sentence that names the file, key or layer and says what to do.

    The tools print the sentence without a traceback. An error in the code of the user's model or data is no InputError.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class CheckpointError(InputError):
    """A file that can't be read, fused or written."""
