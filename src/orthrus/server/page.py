"""The page at /: a race of plain decoding and Orthrus on the visitor's own prompt, and a chat with live statistics.

The page is one static file. The first request joins it from its parts.
"""

import base64
import hashlib
import html
from functools import cache
from importlib.resources import files

from fastapi import Request
from starlette.responses import Response

from orthrus.base.provenance import cpu_model
from orthrus.server.errors import ApiError
from orthrus.server.service import Service

SCRIPTS = ("page.js", "page_race.js", "page_chat.js")
_ABOUT = '<p class="soft" id="about">'


async def page(request: Request) -> Response:
    """The page. It loads nothing else, and its security policy forbids it to."""
    text, policy = _content()
    return Response(
        text.replace(_ABOUT, _ABOUT + html.escape(_about(request.app.state.service))),
        media_type="text/html",
        headers={
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )


def _about(service: Service) -> str:
    """Model, dtype and device. Empty while the model is loading, and if the server needs a key: the page needs none."""
    if service.config.api_keys:
        return ""
    try:
        live = service.live
    except ApiError:
        return ""
    about = live.orthrus.describe()
    device = cpu_model() if about["device"] == "cpu" else about["device"]
    return f"{live.name}, {about['dtype']}, {device}"


@cache
def _content() -> tuple[str, str]:
    """The page, and the policy that lets its own script and style run and nothing else."""
    style, script = _read("page.css"), "".join(_read(name) for name in SCRIPTS)
    text = (
        _read("page.html").replace("<style>", f"<style>\n{style}").replace("<script>", f"<script>\n{script}")
    )
    return text, (
        "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        f"img-src data:; script-src {_digest(script)}; style-src {_digest(style)}"
    )


def _read(name: str) -> str:
    return files("orthrus.server").joinpath(name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    """The source expression of an element's content for a content security policy."""
    digest = hashlib.sha256(f"\n{content}".encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
