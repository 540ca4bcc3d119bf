"""The page at /: one static file that races plain decoding and Orthrus on the visitor's own prompt."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from starlette.responses import Response


async def page() -> Response:
    """The page. It loads nothing else, and browsers are told to let it load nothing else."""
    text, policy = _content()
    return Response(
        text,
        media_type="text/html",
        headers={
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )


@cache
def _content() -> tuple[str, str]:
    """The page, and the policy that lets its own script and style run and nothing else."""
    text = files("orthrus.server").joinpath("page.html").read_text(encoding="utf-8")
    return text, (
        "default-src 'none'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        f"script-src {_digest(text, 'script')}; style-src {_digest(text, 'style')}"
    )


def _digest(text: str, tag: str) -> str:
    """The only element of that kind, as a source of a content security policy."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
