"""The JSON Schema of `safety.yaml`, for editors. Pure.

Strategy: msgspec derives it from the structs of `rules.py`; docstrings, which explain fields as `name: text`, become
their descriptions. `docs/safety.schema.json` is this, and a test holds it so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from safety.rules import Base, Rules

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Describe a `safety.yaml` in JSON Schema 2020-12."""
    schema = msgspec.json.schema(Rules)
    for name, definition in schema["$defs"].items():
        own, about = _explained(definition["description"], definition["properties"])
        _, shared = _explained(Base.__doc__ or "", definition["properties"])
        inherited = shared if name != Rules.__name__ else {}
        definition["description"] = own
        for field, text in {**inherited, **about}.items():
            definition["properties"][field]["description"] = text
    # `discriminator` is OpenAPI's word; without it each kind is told by its constant.
    schema["$defs"][Rules.__name__]["properties"]["rules"]["items"].pop("discriminator")
    return {"$schema": DIALECT, "title": "safety.yaml", **schema}


def _explained(docstring: str, fields: Mapping[str, object]) -> tuple[str, dict[str, str]]:
    """Split a docstring into what it says of the whole, and of single fields."""
    text = " ".join(docstring.split())
    whole, *rest = re.split(rf"\b({'|'.join(map(re.escape, fields))}): ", text)
    return whole.strip(), {field: about.strip() for field, about in zip(rest[::2], rest[1::2], strict=True)}
