"""Plain text tables for reports."""

from collections.abc import Iterable, Sequence


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns rows of strings as aligned columns below a header; columns of numbers are aligned right."""
    table = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    numeric = [all(_is_number(row[i]) for row in table[1:]) for i in range(len(header))]
    lines = [
        '  '.join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in table
    ]
    lines.insert(1, '  '.join('-' * width for width in widths))
    return '\n'.join(lines)


def _is_number(text: str) -> bool:
    try:
        float(text.replace(',', '').rstrip('%'))
    except ValueError:
        return text in ('', '-')
    return True
