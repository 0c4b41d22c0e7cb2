"""Secrets in URIs, kept out of every message: user information, and what a query says, such as keys and tokens."""

from __future__ import annotations

import re
from urllib.parse import unquote

_MASK = "***"
_URI = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"]+")
_HARMLESS = re.compile(r"(region|scheme|endpoint_override|allow_bucket_creation|allow_bucket_deletion)=[\w.:/-]*")
_SHORTEST = 4
"""Characters of a secret that is looked for in texts: anything shorter stands in too many words."""


def masked(uri: str) -> str:
    """A path or URI as messages show it."""
    return _split(uri)[0]


def masked_in(text: str, uri: str = "") -> str:
    """A text, such as another library's error, that may quote URIs, or secrets of ``uri``."""
    for secret in sorted(_split(uri)[1], key=len, reverse=True):
        text = text.replace(secret, _MASK) if len(secret) >= _SHORTEST else text
    return _URI.sub(lambda found: masked(found[0]), text)


def _split(uri: str) -> tuple[str, set[str]]:
    """A URI without its secrets, and these, as they are written and as they are meant."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri, set()
    user = rest.rpartition("@")[0]
    # A password with "/" or "?" in it, which should have been quoted, reaches beyond what a parser takes for the host.
    if ":" not in user:
        user = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")[0]
    secrets = {user, *user.split(":", 1)}
    place, question, query = rest[len(user) + 1 if user else 0 :].partition("?")
    # Of all that may be the query: an "@" in it may have been taken for the end of a password.
    for item in filter(None, re.split("[&;]", rest.partition("?")[2])):
        name, equals, value = item.partition("=")
        if not _HARMLESS.fullmatch(item):
            secrets.add(value if equals else name)
    shown = [_shown(item) for item in re.split("[&;]", query) if item]
    secrets |= {unquote(secret) for secret in secrets}
    return f"{scheme}://{f'{_MASK}@' if user else ''}{place}{question}{'&'.join(shown)}", secrets - {""}


def _shown(item: str) -> str:
    name, equals, _ = item.partition("=")
    return item if _HARMLESS.fullmatch(item) else f"{name}={_MASK}" if equals else _MASK
