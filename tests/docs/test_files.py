"""docs/files.md names every column of every artifact, and no other."""

from __future__ import annotations

import re

import pytest
from places import ROOT

from dice_py.storage import schemas

PAGE = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
TABLES = dict(re.findall(r"<!-- (\w+) -->\n((?:\|.*\n)+)", PAGE))
NOT_ARTIFACTS = {"PROMPTS_READ", "PAIRS", "SCORES", "TRAINING_LABELS"}
"""Schemas whose columns are those of others, or that no file has."""


def names(table: str) -> list[str]:
    """The columns that the rows of a table name."""
    return [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]


@pytest.mark.parametrize("schema", TABLES)
def test_a_table_has_the_columns_of_its_schema(schema: str) -> None:
    assert sorted(names(TABLES[schema])) == sorted(getattr(schemas, schema).names())


def test_every_schema_has_a_table() -> None:
    known = {name for name, value in vars(schemas).items() if isinstance(value, schemas.pl.Schema)}
    assert known - NOT_ARTIFACTS == set(TABLES)


def test_columns_outside_of_the_tables_are_named_too() -> None:
    for name in (*schemas.START_LOGPS, *schemas.SHARED_LOGPS, *(field.name for field in schemas.TOKEN_CREDIT.fields)):
        assert f"`{name}`" in PAGE
