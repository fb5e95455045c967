"""Only what lay in the folder at the start is served."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from server.static_folder import StaticFolder

SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "headers": []}


def status(folder: StaticFolder, name: str) -> int:
    try:
        return asyncio.run(folder.response(name, SCOPE)).status_code
    except HTTPException as error:
        return error.status_code


@pytest.fixture
def folder(tmp_path: Path) -> StaticFolder:
    served = tmp_path / "served"
    (served / "below").mkdir(parents=True)
    (served / "a.js").write_text("a")
    (served / "below" / "b.css").write_text("b")
    (tmp_path / "secret").write_text("secret")
    return StaticFolder(served)


def test_files_and_files_below(folder: StaticFolder) -> None:
    assert folder.names == {"a.js", "below/b.css"}
    assert {name: status(folder, name) for name in folder.names} == {"a.js": 200, "below/b.css": 200}


def test_nothing_else(folder: StaticFolder, tmp_path: Path) -> None:
    (tmp_path / "served" / "new.js").write_text("new")
    others = (
        "new.js",
        "",
        ".",
        "below",
        "below/",
        "../secret",
        "below/../a.js",
        "/a.js",
        "./a.js",
        str(tmp_path / "secret"),
    )
    assert {status(folder, name) for name in others} == {404}
