"""Routes of the page. The document says nothing of this server and needs no key; all that it shows does.

Knows routes. Refuses to know what is shown.
"""

from __future__ import annotations

from fastapi import FastAPI, Response

from jaxpaged.server.service import Service
from jaxpaged.server.ui.live import Live
from jaxpaged.server.ui.page import build_page


def add_page(app: FastAPI, service: Service) -> None:
    """The page at /ui, and what it asks for."""
    if not service.options.show_state:
        return
    document, headers = build_page()
    live = Live(service)

    @app.api_route("/ui", methods=["GET", "HEAD"], response_model=None, include_in_schema=False)
    async def page() -> Response:
        """The same for everybody: a browser has no key when it asks for it."""
        return Response(document, headers=headers, media_type="text/html")

    @app.get("/ui/state", response_model=None)
    async def state(since: str = "") -> Response:
        """What the page shows: the next look at the engine, less what a page has that has seen the map `since`."""
        return Response(await live.answer(since), media_type="application/json", headers={"Cache-Control": "no-store"})
