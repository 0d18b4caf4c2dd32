"""The JSON Schema of the configuration file, for editors.

`python -m megalm.config.json_schema` writes schema.json beside this file.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from .schema import Config

FILE = Path(__file__).with_name("schema.json")


class _Untitled(GenerateJsonSchema):
    """A title for each field repeats its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """The schema as a dict: the model's, and `$schema` as a key of the file."""
    schema = Config.model_json_schema(by_alias=True, schema_generator=_Untitled)
    schema["properties"] = {"$schema": {"type": "string", "description": "Where this schema is, for editors; ignored."},
                            **schema["properties"]}
    # The two allow... keys are understood by editors that check JSON by themselves; load() accepts both.
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "megalm configuration",
            "allowComments": True, "allowTrailingCommas": True}


def text() -> str:
    """The file's content."""
    return json.dumps(json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
