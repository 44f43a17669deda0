"""Writes the table of the chart's values into docs/deploy.md: `python -m tests.deploy.values_table`.

The comment above a value in values.yaml is its meaning, so that it is written once. A test says when the page is old.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import yaml

from tests.deploy.chart import CHART, ROOT

PAGE = ROOT / "docs" / "deploy.md"
BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->\n"


def leaves(values: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield each value that is not a filled map, by its dotted path."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def meanings(text: str) -> dict[str, str]:
    """Return the comment right above each key, by the key's dotted path."""
    found: dict[str, str] = {}
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        key = re.match(r"^( *)([A-Za-z]\w*):", line)
        if line.lstrip().startswith("# "):
            comment.append(line.strip().removeprefix("# "))
            continue
        if key:
            path = [*path[: len(key[1]) // 2], key[2]]
            found[".".join(path)] = " ".join(comment)
        comment = []
    return found


def table() -> str:
    text = (CHART / "values.yaml").read_text()
    known = meanings(text)
    rows = [f"| `{path}` | `{json.dumps(value)}` | {known[path]} |" for path, value in leaves(yaml.safe_load(text))]
    return "\n".join(["| value | default | meaning |", "|---|---|---|", *rows, ""])


def page_with_table(page: str) -> str:
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return head + BEGIN + table() + END + tail


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))
