"""What an error of transformers shows of the values of a config.json that it cannot use.

Such errors are of any type, and speak of transformers' own code. But they name values, or come from
a line that reads some.
"""

import inspect
import linecache
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from distributed_llm.common.config_defaults import config_defaults
from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.layer_types import LISTS_OF_TYPES
from distributed_llm.common.model_sizes import is_size

_WRONG_FIELD = re.compile(r"[Ff]ield '(\w+)'")
_WORD = re.compile(r"[A-Za-z_]\w*")
_KEPT = re.compile(r"self\.(\w+) = config\.(\w+)$", re.MULTILINE)
_HOME = str(Path(transformers.__file__).parent)
_OWN_HOME = str(Path(__file__).parents[2])
_TIES_NOTHING = "definition of `tie_weights_keys`"
"""What transformers says of layers that should share weights with others, which there are not."""

_NEVER_AT_FAULT = frozenset({"dtype", "torch_dtype", "model_type", "architectures", "use_cache"})
_MOST = 2**31 - 1
_CONDITION_LINES = 2
"""Lines before one that raises in which its condition may be."""

_SHOWN = 6
_SHOWN_CHARS = 60


_Path = tuple[str, ...]
"""Where a value is in config.json: its name, after those of what it is within."""

_Names = Mapping[str, Sequence[_Path]]


def refused(how: str, config: Mapping[str, Any], exc: BaseException) -> CheckpointError:
    """Return the error for a config.json that transformers cannot use.

    Args:
        how: what transformers does, as it precedes "the config.json".
        config: the content of config.json.
        exc: raised by transformers, or by torch when transformers called it.
    """
    why = _what_is_wrong(exc, config) or "it has values that its model type does not allow"
    return CheckpointError(
        f"transformers {how} the config.json of this {config['model_type']!r} model: {why}. The "
        "file is damaged, or for another version of transformers: copy that of the original model."
    )


@contextmanager
def computing(config: Mapping[str, Any]) -> Iterator[None]:
    """Have errors of a model's first computation tell of its config.json if they come from it.

    Those do that transformers or torch raise on behalf of a line of transformers that reads values.
    What this package raises is its own fault.

    Args:
        config: the content of config.json.

    Raises:
        CheckpointError: config.json has a value with which nothing can be computed.
    """
    try:
        yield
    except Exception as exc:
        raised_in = traceback.extract_tb(exc.__traceback__)[-1].filename
        if raised_in.startswith(_OWN_HOME) or not _what_is_wrong(exc, config):
            raise
        raise refused("cannot compute with", config, exc) from exc


def _what_is_wrong(exc: BaseException, config: Mapping[str, Any]) -> str:
    """Return what is wrong with a config.json, in words for people; empty if the error hides it."""
    said, known = str(exc), _known_names(config)
    if field := _WRONG_FIELD.search(said):
        named = known.get(field[1], [(field[1],)])
        return f"{_shown(named, config)} is no value for it"
    in_text = _names_in(said, {**_declared_names(config), **known})
    if names := in_text or list(_spelled_out(said, known)):
        return f"it does not allow {_shown((*_unusual(config, least=0), *names), config)}"
    if _TIES_NOTHING in said:
        declared = {**_declared_names(config), **config}
        lists = [(name,) for name in LISTS_OF_TYPES if name in declared]
        return f"no two layers share weights by {_shown(lists, config)}"
    read = _first_read(exc, known, 0) or _first_read(exc, known, _CONDITION_LINES)
    if at_fault := (*_unusual(config, least=0 if read else 1), *read):
        return f"it fails where it reads {_shown(at_fault, config)}"
    return ""


def _unusual(config: Mapping[str, Any], *, least: int) -> Iterator[_Path]:
    """Yield the paths of sizes that are no numbers from `least` on, nor what is usual."""
    usual = config_defaults(str(config.get("model_type"))).values
    for name, told in config.items():
        default = usual.get(name)
        may_count = not isinstance(told if default is None else default, bool)
        is_count = (type(default) is int and default > 0) or (is_size(name) and may_count)
        right = type(told) is int and (least if default else 0) <= told <= _MOST
        is_other = told is not None and told != default and not isinstance(told, list)
        if is_count and is_other and not right and name not in _NEVER_AT_FAULT:
            yield (name,)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and so on."""
    cause: BaseException | None = exc
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _known_names(config: Mapping[str, Any]) -> _Names:
    """Return the names that code may have for values of a config.json, with their places there."""
    defaults = config_defaults(str(config.get("model_type")))
    known = {name: name for name in (*defaults.values, *config)}
    for alias, own in CONFIG_MAPPING[config["model_type"]].attribute_map.items():
        known |= {alias: own} if own in config else {own: alias} if alias in config else {}
    if "rope_scaling" in config:  # what transformers makes of it has another name
        known["rope_parameters"] = "rope_scaling"
    within: dict[str, list[_Path]] = {}
    for path in _within(config):
        within.setdefault(path[-1], []).append(path)
    names: _Names = {**within, **{name: [(key,)] for name, key in known.items()}}
    return {name: paths for name, paths in names.items() if paths[0][-1] not in _NEVER_AT_FAULT}


def _within(part: Mapping[str, Any], *above: str) -> Iterator[_Path]:
    """Yield the paths of all values within others."""
    for name, value in part.items():
        if above:
            yield (*above, name)
        if isinstance(value, Mapping):
            yield from _within(value, *above, name)


def _declared_names(config: Mapping[str, Any]) -> _Names:
    """Return the names of values of transformers' class for a config.json, each with itself.

    Among them are those that have no default, which an error may miss. Not the names that all
    classes have.
    """
    kind = CONFIG_MAPPING[config["model_type"]]
    bases = [base for base in kind.__mro__ if base not in PretrainedConfig.__mro__]
    names = (name for base in bases for name in inspect.get_annotations(base))
    return {name: [(name,)] for name in names if name not in _NEVER_AT_FAULT}


def _names_in(text: str, known: _Names) -> list[_Path]:
    return [path for word in _WORD.findall(text) for path in known.get(word, ())]


def _spelled_out(text: str, known: _Names) -> Iterator[_Path]:
    """Yield the places of names that a text spells out, as in "the number of attention heads"."""
    words = text.lower().replace("number of ", "num ")
    for name, paths in known.items():
        if "_" in name and re.search(rf"\b{re.escape(name.replace('_', ' '))}\b", words):
            yield from paths


def _first_read(exc: BaseException, known: _Names, above: int) -> list[_Path]:
    """Return the places that `_names_read` yields first of an error or what it was raised from."""
    return next((found for one in _causes(exc) for found in _names_read(one, known, above)), [])


def _names_read(exc: BaseException, known: _Names, above: int) -> Iterator[list[_Path]]:
    """Yield the places of names in the lines of transformers that an error came through.

    Those of the innermost line come first.

    Args:
        exc: the error.
        known: names that code may have, with their places in config.json.
        above: how many lines before the innermost one are searched as well, and no others then.
    """
    frames = reversed(traceback.extract_tb(exc.__traceback__))
    theirs = (frame for frame in frames if frame.filename.startswith(_HOME))
    for frame in islice(theirs, 1 if above else None):
        if frame.lineno is not None:
            last = frame.end_lineno or frame.lineno
            lines = range(max(frame.lineno - above, 1), last + 1)
            text = "".join(linecache.getline(frame.filename, number) for number in lines)
            if names := _names_in(text, {**_kept_as(frame.filename, known), **known}):
                yield names


def _kept_as(file: str, known: _Names) -> _Names:
    """Return the attributes in which modules of a file keep values, with the values' places."""
    found = _KEPT.findall("".join(linecache.getlines(file)))
    return {attribute: known[name] for attribute, name in found if name in known}


def _shown(paths: Iterable[_Path], config: Mapping[str, Any]) -> str:
    return ", ".join(_value_text(path, config) for path in islice(dict.fromkeys(paths), _SHOWN))


def _value_text(path: _Path, config: Mapping[str, Any]) -> str:
    found: Any = config
    for name in path:
        if name not in found:
            return f"{'.'.join(path)}, which it lacks"
        found = found[name]
    shown = repr(found)
    cut = shown if len(shown) <= _SHOWN_CHARS else f"{shown[:_SHOWN_CHARS]}..."
    return f"{'.'.join(path)} = {cut}"
