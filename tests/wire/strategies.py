"""Every message with its tensor frames, drawn by Hypothesis, and one plain example of each.

Both are read off the definitions in `messages`: a new message is covered as soon as it exists.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from distributed_llm.common import codec
from distributed_llm.common.codec import Decoder
from distributed_llm.common.messages import (
    AnyMessage,
    Message,
    ToClient,
    ToCoordinator,
    ToNextWorker,
    ToPreviousWorker,
    ToWorker,
)
from distributed_llm.common.tensors import ITEM_BYTES, TensorSpec
from distributed_llm.common.types import LayerRange

DECODERS: Mapping[Decoder[Message], Any] = {
    codec.to_coordinator: ToCoordinator,
    codec.to_worker: ToWorker,
    codec.to_client: ToClient,
    codec.to_next_worker: ToNextWorker,
    codec.to_previous_worker: ToPreviousWorker,
}
CASES: list[tuple[Decoder[Message], type[Message]]] = [
    (decoder, kind) for decoder, union in DECODERS.items() for kind in get_args(union) or (union,)
]
_NAMES = {decoder: name for name, decoder in vars(codec).items() if isinstance(decoder, Decoder)}
CASE_IDS = [f"{_NAMES[decoder]}-{kind.__name__}" for decoder, kind in CASES]

_MAX_TEXT = 43
_MAX_ITEMS = 4


# ------------------------------------------------------------------ drawn


@st.composite
def specs(draw: st.DrawFn) -> TensorSpec:
    """Small tensors of every dtype, of one to four dimensions."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    return TensorSpec(draw(st.sampled_from(sorted(ITEM_BYTES))), tuple(shape))


@st.composite
def layer_ranges(draw: st.DrawFn) -> LayerRange:
    start = draw(st.integers(0, 65535))
    return LayerRange(start, draw(st.integers(start + 1, 65536)))


_OWN: Mapping[type, Callable[[], st.SearchStrategy[Any]]] = {
    TensorSpec: specs,
    LayerRange: layer_ranges,
}


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values that a field of this type may hold."""
    match kind:
        case inspect.NoneType():
            return st.none()
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType():
            return st.integers(*_int_bounds(kind))
        case inspect.FloatType(gt=gt, ge=ge, le=le):
            low = gt if gt is not None else ge
            return st.floats(
                low, le, exclude_min=gt is not None, allow_nan=False, allow_infinity=False
            )
        case inspect.StrType():
            return _texts(kind)
        case inspect.BytesType(max_length=most):
            return st.binary(max_size=_MAX_TEXT if most is None else min(_MAX_TEXT, most))
        case inspect.LiteralType(values=choices):
            return st.sampled_from(list(choices))
        case inspect.EnumType(cls=cls):
            return st.sampled_from(list(cls))
        case inspect.UnionType(types=types):
            return st.one_of([values(one) for one in types])
        case inspect.VarTupleType():
            return _lists(kind).map(tuple)
        case inspect.TupleType(item_types=types):
            return st.tuples(*[values(one) for one in types])
        case inspect.ListType():
            return _lists(kind)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values(key), values(value), max_size=_MAX_ITEMS)
        case inspect.StructType(cls=cls) if cls in _OWN:
            return _OWN[cls]()
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: values(field.type) for field in fields})
    raise NotImplementedError(f"no strategy for {kind}")


def _int_bounds(kind: inspect.IntType) -> tuple[int, int]:
    low = kind.ge if kind.ge is not None else kind.gt + 1 if kind.gt is not None else None
    high = kind.le if kind.le is not None else kind.lt - 1 if kind.lt is not None else None
    assert low is not None, "every integer on the wire is bounded"
    assert high is not None, "every integer on the wire is bounded"
    return low, high


def _texts(kind: inspect.StrType) -> st.SearchStrategy[str]:
    high = min(_MAX_TEXT, kind.max_length if kind.max_length is not None else _MAX_TEXT)
    if kind.pattern is not None:
        return st.from_regex(kind.pattern).filter(lambda text: len(text) <= high)
    return st.text(min_size=kind.min_length or 0, max_size=high)


def _lists(kind: inspect.VarTupleType | inspect.ListType) -> st.SearchStrategy[list[Any]]:
    high = _MAX_ITEMS if kind.max_length is None else min(_MAX_ITEMS, kind.max_length)
    return st.lists(values(kind.item_type), min_size=kind.min_length or 0, max_size=high)


@st.composite
def messages(draw: st.DrawFn, kind: type[Message]) -> tuple[AnyMessage, tuple[bytes, ...]]:
    """A message of this type, and its tensor frames."""
    message = draw(values(inspect.type_info(kind)))
    sizes = [spec.nbytes for spec in getattr(message, "tensors", ())]
    return message, tuple(draw(st.binary(min_size=size, max_size=size)) for size in sizes)


# ------------------------------------------------------------------ plain examples


def example(kind: Any) -> Any:
    """One value of this type with every field present and every optional one set."""
    return _example(inspect.type_info(kind))


def example_frames(message: Any) -> tuple[bytes, ...]:
    """The tensor frames of an example."""
    return tuple(bytes(spec.nbytes) for spec in getattr(message, "tensors", ()))


def _example(kind: inspect.Type) -> Any:
    match kind:
        case inspect.NoneType():
            return None
        case inspect.BoolType():
            return True
        case inspect.IntType():
            low, high = _int_bounds(kind)
            return max(low, min(high, 300))
        case inspect.FloatType(ge=ge, le=le):
            return max(ge or 0.0, 0.5 if le is None else min(0.5, le))
        case inspect.StrType(pattern=pattern):
            fits = pattern is None or re.search(pattern, "a1")
            return "a1" if fits else "A" * 43  # a key
        case inspect.BytesType():
            return b"a1"
        case inspect.LiteralType(values=choices):
            return choices[0]
        case inspect.EnumType(cls=cls):
            return next(iter(cls))
        case inspect.UnionType(types=types):
            return _example(next(one for one in types if not isinstance(one, inspect.NoneType)))
        case inspect.VarTupleType(item_type=item):
            return (_example(item),)
        case inspect.TupleType(item_types=types):
            return tuple(_example(one) for one in types)
        case inspect.ListType(item_type=item):
            return [_example(item)]
        case inspect.DictType(key_type=key, value_type=value):
            return {_example(key): _example(value)}
        case inspect.StructType(cls=cls) if cls is TensorSpec:
            return TensorSpec("float32", (2, 3))
        case inspect.StructType(cls=cls) if cls is LayerRange:
            return LayerRange(3, 7)
        case inspect.StructType(cls=cls, fields=fields):
            return cls(**{field.name: _example(field.type) for field in fields})
    raise NotImplementedError(f"no example for {kind}")


def plain(message: Any) -> Any:
    """The plain values that the header of `message` says, as the msgpack package reads them."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))
