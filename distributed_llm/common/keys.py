"""CURVE keys, which say who is at either end of a connection. Pure.

A key is written as 43 characters of base64url, in messages, files and join lines alike: they stand
in URLs, YAML and shells without quotes.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass, field
from typing import Annotated, NewType

from msgspec import Meta

PublicKey = NewType("PublicKey", Annotated[str, Meta(pattern=r"^([A-Za-z0-9_-]{43})?\Z")])
"""A public key: the name of whoever holds its secret. Empty where there are no keys."""

NOBODY = PublicKey("")
"""The key of a peer on a connection without keys."""

_KEY_BYTES = 32


@dataclass(frozen=True)
class KeyPair:
    """A public key and its secret, which is never printed.

    Attributes:
        secret: 43 characters of base64url.
    """

    public: PublicKey
    secret: str = field(repr=False)


def key_bytes(text: str) -> bytes:
    """Return the 32 bytes of a key.

    Raises:
        ValueError: `text` is not what `key_text` writes.
    """
    try:
        key = base64.b64decode(text.encode("ascii") + b"=", altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        key = b""
    if len(key) != _KEY_BYTES or key_text(key) != text:
        raise ValueError("a key is 43 letters, digits, - and _")
    return key


def key_text(key: bytes) -> str:
    """Return a key of 32 bytes as 43 characters of base64url."""
    return base64.urlsafe_b64encode(key).decode().rstrip("=")


def token_id(key: PublicKey) -> str:
    """Return the name of a token for people, which is no secret.

    Args:
        key: the public half of the token.
    """
    return fingerprint(key)[:9]


def fingerprint(key: PublicKey) -> str:
    """Return a short name of a key for people to compare: 16 hexadecimal digits in fours.

    They are the beginning of its SHA-256. Nothing is decided by them.
    """
    digits = hashlib.sha256(key_bytes(key)).hexdigest()[:16]
    return "-".join(digits[i : i + 4] for i in range(0, len(digits), 4))
