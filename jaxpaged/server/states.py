"""What the engine holds, over HTTP: the views of `jaxpaged inspect` and `jaxpaged debug`. None has a text or says whose it is.

Knows routes. Refuses to know what a view shows: see `jaxpaged.observe.snapshot`.
"""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI, Response

from jaxpaged.engine import Engine
from jaxpaged.host.checks import shown
from jaxpaged.observe.snapshot import VIEWS, snapshot
from jaxpaged.server.bodies import dump_json
from jaxpaged.server.errors import ApiError
from jaxpaged.server.looks import SharedLook
from jaxpaged.server.service import Service


def add_views(app: FastAPI, service: Service) -> None:
    """Routes that show what runs."""
    if not service.options.show_state:
        return
    looks = {view: SharedLook(service.llm, functools.partial(_take, view=view), dump_json) for view in VIEWS}

    @app.get("/state/{view}", response_model=None)
    async def state(view: str) -> Response:
        """The same as the engine's debug socket answers."""
        if view not in looks:
            raise ApiError(404, f"view: got {shown(view)}, expected one of {', '.join(VIEWS)}", param="view")
        return Response(await looks[view].get(), media_type="application/json")


def _take(engine: Engine, view: str) -> dict[str, Any]:
    return snapshot(engine.scheduler, view)
