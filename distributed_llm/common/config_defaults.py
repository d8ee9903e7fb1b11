"""Reads which model types transformers has, and what it takes where a config.json says nothing.

Its classes need torch, which the coordinator never loads. So their source is parsed: class
attributes with plain values are the defaults. What is written otherwise is not found, and then is
missing as if there were no default.
"""

import ast
import functools
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CLASS_NAMES = "CONFIG_MAPPING_NAMES"
_GENERATORS = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES")
_MODULE_NAMES = "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"
_TEXT = "text_config"
_ALIASES = "attribute_map"
_PARTS = "sub_configs_defaults"
_CLASS = "config_class"
_GIVEN = "init_kwargs"
_OF_CLASS = frozenset({_ALIASES, _PARTS, "model_type"})
"""Attributes that are of the class, and no fields of a config.json."""


@dataclass(frozen=True)
class ConfigDefaults:
    """What transformers' configuration class of a model type says.

    Attributes:
        model_type: of the class.
        values: by name, of what is not in a config.json; those that are None are left out.
        aliases: other names under which a config.json may give a value, each with the class's own.
        text_type: the model type of the text model, if this is a configuration of several parts;
            else empty.
        text_is_fixed: whether it is that, whatever a config.json says.
        text_values: of what is not said of the text model, before the defaults of its own type.
    """

    model_type: str
    values: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    text_type: str = ""
    text_is_fixed: bool = False
    text_values: Mapping[str, Any] = field(default_factory=dict)


def has_type(model_type: str) -> bool:
    """Return whether the installed transformers has classes for a model type."""
    return model_type in _tables()[0]


def generates_text(model_type: str) -> bool:
    """Return whether the installed transformers has a class of this type that generates text."""
    return model_type in _text_generators()


@functools.cache
def config_defaults(model_type: str) -> ConfigDefaults:
    """Return what transformers' class for configurations of this type says; nothing if it has none.

    Args:
        model_type: as in config.json.
    """
    class_names, modules = _tables()
    name = class_names.get(model_type)
    if name is None:
        return ConfigDefaults(model_type)
    module = modules.get(model_type, model_type.replace("-", "_"))
    classes = _classes(_models() / module / f"configuration_{module}.py")
    if name not in classes:
        return ConfigDefaults(model_type)
    attributes = _attributes(classes, name)
    values = {
        key: value
        for key, node in attributes.items()
        if key not in _OF_CLASS and (value := _value(node)) is not None
    }
    aliases = _value(attributes.get(_ALIASES))
    spec = _text_spec(attributes.get(_PARTS))
    text_type, is_fixed = _text_type(classes, spec)
    text_values = _value(spec.get(_GIVEN)) if _hands_on(classes[name]) else None
    return ConfigDefaults(
        *(model_type, values, aliases or {}, text_type, is_fixed), text_values=text_values or {}
    )


def _models() -> Path:
    distribution = importlib.metadata.distribution("transformers")
    return Path(str(distribution.locate_file("transformers/models")))


@functools.cache
def _tables() -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return the names of classes by model type, and of modules that are called otherwise."""
    found = _mappings("auto_mappings.py", _CLASS_NAMES, _MODULE_NAMES)
    return found.get(_CLASS_NAMES, {}), found.get(_MODULE_NAMES, {})


@functools.cache
def _text_generators() -> frozenset[str]:
    """Return the model types that have a class which generates text."""
    found = _mappings("modeling_auto.py", *_GENERATORS)
    return frozenset(model_type for mapping in found.values() for model_type in mapping)


def _mappings(file: str, *wanted: str) -> dict[str, Mapping[str, str]]:
    """Return tables of names of classes by model type, of a file of transformers' auto classes."""
    found: dict[str, Mapping[str, str]] = {}
    for node in _body(_models() / "auto" / file):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(args=[pairs])):
                if name in wanted:
                    found[name] = dict(_value(pairs))
    return found


def _classes(path: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in _body(path) if isinstance(node, ast.ClassDef)}


def _body(path: Path) -> list[ast.stmt]:
    try:
        return ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, ValueError, SyntaxError):  # not there in this version of transformers
        return []


def _attributes(classes: Mapping[str, ast.ClassDef], name: str) -> dict[str, ast.expr]:
    """Return the fields of a class that have a value, and the class variables of `_OF_CLASS`."""
    found: dict[str, ast.expr] = {}
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found |= _attributes(classes, base.id)
    for node in classes[name].body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=key), value=ast.expr() as value):
                found[key] = value
            case ast.Assign(targets=[ast.Name(id=key)], value=value) if key in _OF_CLASS:
                found[key] = value
    return found


def _text_spec(parts: ast.expr | None) -> dict[str | None, ast.expr]:
    """Return what is said of the text model among parts: its class, and perhaps more."""
    if isinstance(parts, ast.Dict):
        for key, value in zip(parts.keys, parts.values, strict=True):
            if isinstance(key, ast.Constant) and key.value == _TEXT:
                words = value.keywords if isinstance(value, ast.Call) else []
                return {_CLASS: value} | {word.arg: word.value for word in words}
    return {}


def _text_type(
    classes: Mapping[str, ast.ClassDef], spec: Mapping[str | None, ast.expr]
) -> tuple[str, bool]:
    """Return the model type of the text model, and whether it is always that."""
    kind = spec.get(_CLASS)
    if isinstance(kind, ast.Name) and kind.id in classes:
        return str(_value(_attributes(classes, kind.id).get("model_type"))), True
    return str(_value(spec.get("model_type")) or ""), False


def _hands_on(node: ast.ClassDef) -> bool:
    """Return whether a class takes what it says of its parts for what a config.json leaves out."""
    return any(isinstance(n, ast.Attribute) and n.attr == _GIVEN for n in ast.walk(node))


def _value(node: ast.expr | None) -> Any:
    """Return the value of a constant expression; None if it is no such expression."""
    match node:
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            factors = _value(left), _value(right)
            return None if None in factors else factors[0] * factors[1]
        case ast.expr():
            try:
                return ast.literal_eval(node)
            except ValueError:
                return None
    return None
