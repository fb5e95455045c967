"""The files of a folder, as pages that load and ask nothing elsewhere."""

from __future__ import annotations

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class StaticFolder:
    """The files that lie in a folder and below it now, by their path in it. What comes later is not served."""

    def __init__(self, folder: Path) -> None:
        self.names = frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        self._files = StaticFiles(directory=folder)

    async def response(self, name: str, scope: Scope) -> Response:
        """The file, or 304 to a browser that has it. Raises the 404 of any other name."""
        if name not in self.names:
            raise HTTPException(404)
        response = await self._files.get_response(name, scope)
        response.headers.update(_HEADERS)
        return response
