"""Writes the map of files into docs/architecture.md: `python -m tests.files_table`.

The first line of a file's header is its duty in a line, so that it is written once. A test says when the page is old.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files: begin -->\n", "<!-- files: end -->\n"
PACKAGES = ("policies", "safety", "shadow", "service")


def duty(path: Path) -> str:
    """Return the first line of a file's header."""
    text = path.read_text()
    if path.suffix == ".lua":
        return text.partition("\n")[0].removeprefix("--").strip()
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def table(package: str) -> str:
    files = sorted(path for path in (ROOT / package).iterdir() if path.suffix in (".py", ".lua"))
    rows = [f"| `{path.name}` | {duty(path)} |" for path in files if path.name != "__init__.py"]
    return "\n".join([f"### {package}/", "", "| file | what it is |", "|---|---|", *rows, ""])


def page_with_tables(page: str) -> str:
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return head + BEGIN + "\n".join(map(table, PACKAGES)) + END + tail


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text()))
