"""Protect the page of `serve` from other web pages in the user's browser, and from requests that are too large."""

import json
from typing import Any
from urllib.parse import urlsplit


ADVICE = (
    "Open it as http://127.0.0.1 with its port. If it must be open to other computers, start it with --host 0.0.0.0."
)


class Guard:
    """ASGI middleware that refuses requests before the page gets them.

    Args:
        app: The page.
        hosts: Host names under which the page may be requested, and from whose pages requests may come. A web page
            whose name was made to point here (DNS rebinding) sends its own name, and is refused. None: all names are
            allowed, for a page that is open to others.
        most_bytes: Largest size of one request's body in bytes, with all its files.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...] | None, most_bytes: int):
        self.app, self.hosts, self.most_bytes = app, hosts, most_bytes

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        for header in (b"host", b"origin"):
            given = headers.get(header)
            if self.hosts is not None and given is not None and _name_in(given) not in self.hosts:
                await _refuse(scope, send, 403, f"This page does not answer {header.decode()} {given!r}. {ADVICE}")
                return
        if "/file=http" in scope["path"].lower():
            await _refuse(scope, send, 403, "This page gives out no files of other servers.")
            return
        length = headers.get(b"content-length", "0")
        if not length.isdigit() or int(length) > self.most_bytes:
            await _refuse(
                scope, send, 413, f"A request may have at most {self.most_bytes:,} bytes. Give fewer or smaller files."
            )
            return
        received = 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return {"type": "http.disconnect"} if received > self.most_bytes else message

        await self.app(scope, counted, send)


def take_uploads_alone(component: Any, error: Any) -> None:
    """Let a component of Gradio take files that were uploaded, and refuse addresses. Gradio would download what lies
    there, whatever its size. error: the class of Gradio's errors"""
    keep = component.async_move_resource_to_block_cache

    async def keep_upload(place: Any) -> Any:
        if str(place).lower().startswith(("http://", "https://")):
            raise error("Upload the image. This page takes no addresses.", print_exception=False)
        return await keep(place)

    component.async_move_resource_to_block_cache = keep_upload


def _name_in(given: str) -> str | None:
    """Return the host name in a Host or Origin header, without scheme and port."""
    try:
        return urlsplit(given if "//" in given else f"//{given}").hostname
    except ValueError:
        return None


async def _refuse(scope: dict[str, Any], send: Any, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": message}).encode()})
