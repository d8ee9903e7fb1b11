"""Parsing of sizes, bandwidths, speeds, durations, layers and addresses as people write them."""

import ipaddress
import re
from collections.abc import Callable

from pydantic import ByteSize, TypeAdapter

from distributed_llm.common.types import LayerRange

_SIZE = re.compile(r"[0-9]+(\.[0-9]+)?\s*([kmgtp]i?)?b?", re.IGNORECASE)
_RATE = re.compile(r"(.+?)\s*/\s*s", re.IGNORECASE)
_BITS = re.compile(r"[KMGTP]i?b$|bits?$")  # "gb" is taken for careless bytes
_FLOPS = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgtp]?)flops(?:/s)?", re.IGNORECASE)
_DURATION = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d|)")
_LAYERS = re.compile(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?")
_SECONDS_PER = {"ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")
_BYTE_SIZE = TypeAdapter(ByteSize)


def parse_size(value: object) -> int | None:
    """Return a number of bytes; None for an empty text.

    Args:
        value: bytes, or a number with a unit: 6GiB and 512MiB count in 1024s, 6GB and 6G in 1000s.

    Raises:
        ValueError: `value` is no size.
    """
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _SIZE.fullmatch(value.strip()):
        return int(_BYTE_SIZE.validate_python(value))
    raise ValueError("not a size; write a number and a unit, such as 6GiB or 512MiB")


def parse_rate(value: str) -> float:
    """Return bytes per second, above 0.

    Args:
        value: a size per second: 40GB/s, 512MiB/s. Bits are refused: 40Gb/s, 40Gbit/s.

    Raises:
        ValueError: `value` is no bandwidth, or in bits.
    """
    match = _RATE.fullmatch(value.strip())
    if match and _BITS.search(match[1]):
        raise ValueError(
            "not a bandwidth; that is in bits: write bytes per second with a capital B, an eighth "
            "of it, such as 5GB/s for 40Gb/s"
        )
    size = parse_size(match[1]) if match and _SIZE.fullmatch(match[1]) else None
    if not size:
        raise ValueError("not a bandwidth; write a size per second, such as 40GB/s")
    return float(size)


def parse_flops(value: str) -> float:
    """Return floating point operations per second, above 0.

    Args:
        value: a number with a unit: 1.5TFLOPS, 800 GFLOPS.

    Raises:
        ValueError: `value` is no speed.
    """
    match = _FLOPS.fullmatch(value.strip())
    if match is None or not float(match[1]):
        raise ValueError(
            "not a speed; write floating point operations per second, such as 1.5TFLOPS"
        )
    return float(match[1]) * _PREFIXES[match[2].lower()]


def parse_duration(value: object) -> float:
    """Return seconds.

    Args:
        value: seconds, or a number with a unit: 500ms, 30s, 5m, 1h, 7d.

    Raises:
        ValueError: `value` is no duration.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError("too large") from None
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("not a duration; write seconds, or a unit as in 500ms, 30s, 5m")
    return float(match[1]) * _SECONDS_PER[match[2]]


def parse_layers(value: str) -> LayerRange:
    """Return a range of layers.

    Args:
        value: layers counted from 1, both ends included: "1-8" are the first eight, "9" is the
            ninth.

    Raises:
        ValueError: `value` is no range of layers.
    """
    match = _LAYERS.fullmatch(value)
    if match:
        first, last = int(match[1]), int(match[2] or match[1])
        if 1 <= first <= last <= 65536:
            return LayerRange(first - 1, last)
    raise ValueError(
        f"{value!r:.60} is not a range of layers; write 1-8 for the first eight, 9 for the ninth"
    )


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "HOST:PORT"; the host of "[::1]:5555" is "::1".

    Raises:
        ValueError: `address` does not have this form, or its port is above 65535.
    """
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not re.fullmatch(r"[0-9]{1,5}", port):
        raise ValueError("not an address; write HOST:PORT, such as 192.168.1.100:5555")
    if int(port) > 65535:
        raise ValueError(f"port {port} does not exist; ports go up to 65535")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        _check_ip(ipaddress.IPv6Address, host, "[2001:db8::7]:5555")
    elif re.fullmatch(r"[0-9.]+", host):
        _check_ip(ipaddress.IPv4Address, host, "192.168.1.100:5555")
    elif not _HOST.fullmatch(host) or len(host) > 253:
        raise ValueError(
            f"{host!r:.60} is not a host; write a name or an address, an IPv6 address in brackets"
        )
    return host, int(port)


def _check_ip(kind: Callable[[str], object], host: str, such_as: str) -> None:
    try:
        kind(host)
    except ValueError:  # says what the parser met
        raise ValueError(
            f"{host!r:.60} is no IP address; write HOST:PORT, such as {such_as}"
        ) from None
