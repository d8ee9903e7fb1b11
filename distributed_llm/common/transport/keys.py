"""Makes CURVE keys."""

import zmq
from zmq.utils import z85

from distributed_llm.common.keys import KeyPair, PublicKey, key_bytes, key_text


def new_key_pair() -> KeyPair:
    """Return a new pair, drawn by libsodium."""
    public, secret = zmq.curve_keypair()
    return KeyPair(PublicKey(key_text(z85.decode(public))), key_text(z85.decode(secret)))


def key_pair_of(secret: str) -> KeyPair:
    """Return the pair that a secret belongs to.

    Raises:
        ValueError: it is no key.
    """
    public = zmq.curve_public(z85.encode(key_bytes(secret)))
    return KeyPair(PublicKey(key_text(z85.decode(public))), secret)
