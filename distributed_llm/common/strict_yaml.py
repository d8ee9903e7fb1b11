"""A strict subset of YAML for files of settings: text, numbers, lists and maps.

The line of each key is kept. Everything else that YAML can do is refused: aliases (a few lines of
them expand to gigabytes), tags that build objects, keys that are not text, duplicate keys, and
several documents in a file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distributed_llm.common.errors import ConfigError

_MAX_BYTES = 256 * 1024
_MAX_DEPTH = 16  # PyYAML needs minutes for 100 kB of "[", so this is checked while it reads

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class YamlFile:
    """The content of a YAML file.

    Attributes:
        values: the outermost map; empty for an empty file.
        lines: by key path, such as `("worker", "name")`, the line of the key, from 1.
    """

    values: dict[str, Any]
    lines: dict[KeyPath, int]


def read_yaml(path: Path) -> YamlFile:
    """Return the content of the file at `path`.

    Raises:
        ConfigError: it cannot be read, or is not of the subset above; with the line.
    """
    text = _read_text(path)
    lines: dict[KeyPath, int] = {}
    try:
        _check_events(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = None if root is None else _plain(root, (), lines)
    except _Refused as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}:{_line_of(error, text)}: {_reason(error, text)}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: expected sections such as 'worker:', found {values!r:.60}")
    return YamlFile(values, lines)


class _Refused(Exception):
    """Something that YAML allows but this subset does not.

    Args:
        where: the node or event, which has the line.
        message: what it is and what to do.
    """

    def __init__(self, where: yaml.Node | yaml.Event, message: str) -> None:
        super().__init__(message)
        mark = where.start_mark
        self.line = 1 if mark is None else mark.line + 1


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file of settings")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `dllm config init {path}` writes one") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: is larger than 256 KiB, so it is no file of settings")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8 text; save it as UTF-8") from None


def _check_events(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(event, "aliases (*name) are not allowed; repeat the value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise _Refused(event, "lists and maps are nested too deeply")


def _plain(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> Any:
    if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
        return _plain_map(node, path, lines)
    if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
        return [_plain(item, path, lines) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise _Refused(node, f"the tag {node.tag!r} is not allowed")
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except yaml.constructor.ConstructorError:
        raise _Refused(node, f"the tag {node.tag!r} is not allowed") from None
    except (ValueError, LookupError, AttributeError):  # e.g. the date 2026-13-45, `!!bool maybe`
        kind = node.tag.rpartition(":")[2]
        raise _Refused(
            node, f"{node.value!r:.60} is not a valid {kind}; put text in quotes"
        ) from None


def _plain_map(node: yaml.MappingNode, path: KeyPath, lines: dict[KeyPath, int]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = key_node.value
        if key_node.tag != "tag:yaml.org,2002:str":
            raise _Refused(key_node, f"the key {key!r:.60} is not text; put it in quotes")
        here = (*path, key)
        if key in values:
            raise _Refused(
                key_node,
                f"duplicate key {'.'.join(here)!r}, first given on line {lines[here]}",
            )
        lines[here] = 1 if key_node.start_mark is None else key_node.start_mark.line + 1
        values[key] = _plain(value_node, here, lines)
    return values


def _line_of(error: yaml.YAMLError, text: str) -> int:
    if isinstance(error, yaml.reader.ReaderError):
        return text.count("\n", 0, error.position) + 1
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return 1 if mark is None else int(mark.line) + 1


def _reason(error: yaml.YAMLError, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character {text[error.position]!a} is not allowed"
    problem = getattr(error, "problem", None) or "cannot be understood"
    return f"is not valid YAML: {problem}"
