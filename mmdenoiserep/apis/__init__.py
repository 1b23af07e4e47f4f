"""The functions behind the tools. They take ordinary arguments and raise ``InputError`` for bad input."""
