"""Words for people: counts, units, lists and layers, alike in every text. Pure.

Texts count layers from 1, and both ends of a range belong to it, so that neighbours never seem to
share a layer: "layers 1-2 of 6 on pc, 3-6 on mac". JSON and code have `start` and `stop` of
`LayerRange`.
"""

from collections.abc import Iterable, Sequence

from distributed_llm.common.types import LayerRange

_GROUPED_BELOW = 1_000_000
"""Numbers below this are written in full."""

_MINUTES_FROM_S = 120.0
"""Seconds from which minutes are easier to read, and 60 times as many for hours."""


def count_text(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: "1 thread", "2 threads", "1,024 tokens", "9.7 million tokens".

    Args:
        count: at least 0.
        noun: for one.
        plural: for any other number; `noun` with an s unless given.
    """
    number = f"{count:,}" if count < _GROUPED_BELOW else f"{count / 1e6:,.1f} million"
    return f"{number} {noun if count == 1 else plural or f'{noun}s'}"


def times_text(count: int) -> str:
    """Return how often: "once", "twice", "3 times"."""
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def size_text(count: int) -> str:
    """Return a number of bytes with a unit: "1 byte", "512 bytes", "1.5 GiB"."""
    if count < 1024:
        return count_text(count, "byte")
    value = float(count)
    for unit in ("KiB", "MiB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} GiB"


def duration_text(seconds: float) -> str:
    """Return a duration with a unit: "3.4 ms", "120 ms", "1.2 s", "5 min", "2 h"."""
    if seconds < 0.9995:
        digits = 1 if 0.0 < seconds < 0.00995 else 0
        return f"{1000 * seconds:.{digits}f} ms"
    if seconds < _MINUTES_FROM_S:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < _MINUTES_FROM_S else f"{minutes / 60:.0f} h"


def fetch_text(here_bytes: int, total_bytes: int, bytes_per_s: float, doing: str) -> str:
    """Return how far weights have come: "1.2 GiB of 4.2 GiB, 93.1 MB/s, 34.0 s left".

    Rates are in MB/s, in 1000s, as networks are sold.

    Args:
        total_bytes: in all; 0 if that is not known yet.
        bytes_per_s: at which they come now.
        doing: where they come from, or what is waited for; may be empty.
    """
    parts = ["nothing yet"]
    if total_bytes:
        parts = [f"{size_text(here_bytes)} of {size_text(total_bytes)}"]
    if bytes_per_s >= 1000.0:
        left_s = (total_bytes - here_bytes) / bytes_per_s
        parts += [f"{bytes_per_s / 1e6:.1f} MB/s", f"{duration_text(left_s)} left"]
    return ", ".join([*parts, *([doing] if doing else [])])


def no_coordinator_text(reached: bool) -> str:
    """Return why no coordinator was found at an address.

    Args:
        reached: whether a connection to it was opened.
    """
    if not reached:
        return "nothing listens there"
    return (
        "something listens there that does not answer; it is another program, or a coordinator "
        "that stands still"
    )


def rate_text(tokens_per_s: float) -> str:
    """Return a speed with as many digits as matter: "0.05 tokens/s", "3.7 tokens/s"."""
    return f"{_rate_number(tokens_per_s)} tokens/s"


def rates_text(with_it: float, without: float) -> str:
    """Return two speeds, with a machine and without it."""
    one, other = _rate_number(with_it), _rate_number(without)
    if one == other:
        return f"{one} tokens/s with it and without"
    return f"{one} tokens/s with it, {other} without"


def _rate_number(tokens_per_s: float) -> str:
    if tokens_per_s < 0.1:
        return f"{tokens_per_s:.2g}"
    return f"{tokens_per_s:.1f}" if tokens_per_s < 100 else f"{tokens_per_s:,.0f}"


def faster_text(gain: float) -> str:
    """Return a relative increase of speed: "12 % faster", "9.0 times as fast"."""
    return f"{100 * gain:.0f} % faster" if gain < 1.0 else f"{1.0 + gain:.1f} times as fast"


def list_text(items: Iterable[str]) -> str:
    """Return a list as a sentence has it: "a", "a and b", "a, b and c"."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def layers_text(layers: LayerRange, encoder_layers: int = 0) -> str:
    """Return "layer 3" or "layers 3-6"; of an encoder-decoder "encoder 3-6 and decoder 1"."""
    if encoder_layers:
        return stacks_text(layers, encoder_layers).replace(", ", " and ")
    return f"{'layer' if len(layers) == 1 else 'layers'} {layers}"


def stacks_text(layers: LayerRange, encoder_layers: int) -> str:
    """Return which layers these are of an encoder-decoder: "encoder 3-12, decoder 1-2".

    Args:
        layers: of both stacks, numbered as one list.
        encoder_layers: how many of all layers are the encoder's; 0: the model is a decoder alone,
            and the text is "3-14".
    """
    if not encoder_layers:
        return str(layers)
    texts = []
    if layers.start < encoder_layers:
        texts.append(f"encoder {LayerRange(layers.start, min(layers.stop, encoder_layers))}")
    if layers.stop > encoder_layers:
        first = max(0, layers.start - encoder_layers)
        texts.append(f"decoder {LayerRange(first, layers.stop - encoder_layers)}")
    return ", ".join(texts)


def layer_map_text(layer_map: Sequence[tuple[str, LayerRange]], encoder_layers: int = 0) -> str:
    """Return who has which layers: "layers 1-2 of 6 on pc, 3-6 on mac", "all 6 layers on pc".

    Args:
        layer_map: workers and their layers, of the whole model, in order.
        encoder_layers: as in `stacks_text`.
    """
    total = layer_map[-1][1].stop
    if len(layer_map) == 1:
        each = "its only layer" if total == 1 else f"all {total} layers"
        return f"{each} on {layer_map[0][0]}"
    if encoder_layers:
        return ", ".join(
            f"{layers_text(ls, encoder_layers)} on {worker}" for worker, ls in layer_map
        )
    (worker, layers), *others = layer_map
    first = f"{layers_text(layers)} of {total} on {worker}"
    return ", ".join([first, *(f"{layers} on {worker}" for worker, layers in others)])


def room_text(tokens: int, texts: int) -> str:
    """Return how much there is room for.

    Args:
        tokens: of context.
        texts: that may be under way at once, where it does not matter how long they are; or 0.
    """
    if texts:
        return f"{count_text(texts, 'text')} of any length at once"
    return f"{count_text(tokens, 'token')} of context"


def too_long_text(num_tokens: int, context_length: int) -> str:
    """Return that a prompt is too long for the model's context.

    Agents look for parts of it: LiteLLM for "this model's maximum context length is", LangChain for
    "exceeds the context window", Claude Code for "prompt is too long".
    """
    return (
        f"The prompt is too long: with {num_tokens} tokens it exceeds the context window, as this "
        f"model's maximum context length is {context_length} tokens. Shorten it."
    )
