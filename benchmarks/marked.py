"""Tables in a page that is otherwise written by hand: a comment says where each begins and ends."""

import pathlib
from collections.abc import Mapping, Sequence

END = "<!-- until here -->\n"


def update(
    page: pathlib.Path, tables: Mapping[str, Sequence[str]], *, check: bool, stale: str
) -> int:
    """Writes tables into a page.

    Args:
      page: the file.
      tables: the line, with its end, that comes before a table -> the table's lines.
      check: writes nothing.
      stale: what is said where ``check`` finds the page to be another one.

    Returns:
      Exit code: 1 where ``check`` finds another page.
    """
    text = new = page.read_text(encoding="utf-8")
    for begin, table in tables.items():
        before, rest = new.split(begin)
        lines = "\n".join(table)
        new = f"{before}{begin}\n{lines}\n\n{END}{rest.split(END, 1)[1]}"
    if new == text:
        return 0
    if check:
        print(stale)
        return 1
    page.write_text(new, encoding="utf-8")
    return 0
