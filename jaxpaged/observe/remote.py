"""The views of an engine behind a server, over HTTP: what its debug socket answers on its own machine.

Knows addresses and keys. Follows no redirection: a key goes to the server that was named, and to no other.
"""

from __future__ import annotations

import http.client
import json
import urllib.parse
from typing import Any

from jaxpaged.observe.records import RecordingError

_MAX_ANSWER = 2**28  # bytes
_KEY_IS_WRONG = "the server takes no request without one of its keys (--api-key-file), and does not know this one"
_NO_KEY = "the server takes no request without one of its keys (--api-key-file)"


def ask_server(url: str, view: str, *, key: str | None = None, timeout_s: float = 30.0) -> dict[str, Any]:
    """A view of the engine behind a server.

    Args:
      url: of the server, as `jaxpaged serve` prints it; a path before its routes is kept.
      key: one of the server's, for a server that has keys.

    Raises:
      RecordingError: no server answers there, or the answer is no view.
    """
    parts = urllib.parse.urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    try:
        if parts.scheme not in kinds or not parts.hostname:
            raise ValueError
        connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=timeout_s)
    except ValueError:
        raise RecordingError(f"url: got {url[:200]!r}, expected one such as http://127.0.0.1:8000") from None
    try:
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        connection.request("GET", f"{parts.path.rstrip('/')}/state/{view}", headers=headers)
        response = connection.getresponse()
        text = response.read(_MAX_ANSWER)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RecordingError(f"{url}: no server answers there ({reason})") from None
    finally:
        connection.close()
    if response.status == 401:
        raise RecordingError(f"{url}: {_NO_KEY if key is None else _KEY_IS_WRONG}")
    try:
        found = json.loads(text)
        if response.status == 200 and found["view"] == view:
            return found
        problem = found["error"]["message"]
    except (ValueError, TypeError, KeyError):
        problem = f"got no view with status {response.status}: it may be no server of jaxpaged"
    if response.status == 404:
        problem = "the server has no such route: it does not show its state (show_state)"
    raise RecordingError(f"{url}: {problem}")
