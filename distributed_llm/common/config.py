"""Reading settings from a file, the environment and the command line; later ones win.

A setting has one name: `threads` under `worker:` in the file, `DLLM_WORKER__THREADS` in the
environment, `worker.threads` among the overrides of the command line. An unknown name or a bad
value is an error that says where it was given.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource

from distributed_llm.common.errors import ConfigError
from distributed_llm.common.settings import (
    SECTIONS,
    ClientSettings,
    CoordinatorSettings,
    Settings,
    WorkerSettings,
)
from distributed_llm.common.strict_yaml import read_yaml

__all__ = [
    "ClientSettings",
    "CoordinatorSettings",
    "Settings",
    "WorkerSettings",
    "load_settings",
    "read_settings",
    "setting_names",
    "unknown_key",
]

# Read by the setup scripts; not an unknown setting when a `dllm` command finds it.
_FOREIGN_VARIABLES = frozenset(
    {"DLLM_TORCH_INDEX_URL", "DLLM_STATE", "DLLM_KEY", "DLLM_CACHE", "DLLM_KERNELS"}
)

Key = tuple[str, str]
"""Section and name of a setting."""


class _Given(NamedTuple):
    value: Any
    where: str


_COMMAND_LINE = "command line"


def load_settings(
    path: Path | None,
    *,
    environment: Mapping[str, str],
    overrides: Mapping[str, Any],
) -> Settings:
    """Return the settings from file, environment and command line; later ones win.

    Args:
        path: the YAML file, or None.
        environment: such as `os.environ`; only names that begin with `DLLM_` are read.
        overrides: from the command line, by dotted name: `{"worker.threads": 4}`. None means that
            the setting was not given.

    Raises:
        ConfigError: with a line for each problem: where it is and what to write instead.
    """
    return read_settings(path, environment=environment, overrides=overrides)[0]


def read_settings(
    path: Path | None,
    *,
    environment: Mapping[str, str],
    overrides: Mapping[str, Any],
) -> tuple[Settings, dict[Key, str]]:
    """Return the settings as `load_settings` does, and where each was given that is no default.

    Raises:
        ConfigError: as `load_settings`.
    """
    given: dict[Key, _Given] = {}
    problems: list[str] = []
    if path is not None:
        _add_file(path, given, problems)
    _add_environment(environment, given, problems)
    _add_overrides(overrides, given, problems)
    if problems:
        raise ConfigError("\n".join(problems))
    sections: dict[str, dict[str, Any]] = {}
    for (section, key), entry in given.items():
        sections.setdefault(section, {})[key] = entry.value
    try:
        settings = Settings(**sections)  # type: ignore[arg-type]
    except ValidationError as error:
        found = [_problem(details, given) for details in error.errors(include_url=False)]
        problems = [_text(key, [m for k, m in found if k == key]) for key in dict(found)]
        raise ConfigError("\n".join(problems)) from None
    return settings, {key: entry.where for key, entry in given.items()}


def setting_names() -> list[tuple[str, str]]:
    """Return section and name of every setting, in the order of `default.yaml`."""
    return [(section, name) for section, kind in SECTIONS.items() for name in kind.model_fields]


def _add_file(path: Path, given: dict[Key, _Given], problems: list[str]) -> None:
    file = read_yaml(path)
    for section, values in file.values.items():
        where = f"{path}:{file.lines[(section,)]}"
        if section not in SECTIONS:
            problems.append(f"{where}: {unknown_key(section)}")
        elif values is None:  # every setting in it is commented out
            continue
        elif not isinstance(values, dict):
            problems.append(f"{where}: {section}: should be a section, not {values!r:.60}")
        else:
            for name, value in values.items():
                where = f"{path}:{file.lines[(section, name)]}"
                if name in SECTIONS[section].model_fields:
                    given[section, name] = _Given(value, where)
                else:
                    problems.append(f"{where}: {unknown_key(name, section)}")


def _add_environment(
    environment: Mapping[str, str], given: dict[Key, _Given], problems: list[str]
) -> None:
    names = [f"DLLM_{section}__{name}".upper() for section, name in setting_names()]
    known: dict[str, str] = {}
    for variable, value in environment.items():
        upper = variable.upper()
        if upper in names:
            known[upper.lower()] = value
        elif upper.startswith("DLLM_") and upper not in _FOREIGN_VARIABLES:
            close = difflib.get_close_matches(upper[:100], names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"environment: unknown variable {variable:.100}{hint}")
    source = EnvSettingsSource(Settings)
    source.env_vars = known
    for section, values in source().items():
        for name, value in values.items():
            variable = f"DLLM_{section}__{name}".upper()
            given[section, name] = _Given(value, f"environment: {variable}")


def _add_overrides(
    overrides: Mapping[str, Any], given: dict[Key, _Given], problems: list[str]
) -> None:
    for dotted, value in overrides.items():
        section, _, name = dotted.partition(".")
        if section in SECTIONS and name in SECTIONS[section].model_fields:
            if value is not None:
                given[section, name] = _Given(value, _COMMAND_LINE)
        else:
            unknown = unknown_key(name, section) if name else unknown_key(section)
            problems.append(f"{_COMMAND_LINE}: {unknown}")


def unknown_key(name: str, section: str = "") -> str:
    """Return what is said of a name that no setting, or no section, has."""
    dotted = f"{section}.{name}" if section else name
    siblings = SECTIONS[section].model_fields if section in SECTIONS else SECTIONS
    close = difflib.get_close_matches(name[:100], siblings, n=1)
    if not close:  # perhaps it belongs to another section
        homes = {other: f"{home}.{other}" for home, other in setting_names()}
        close = [homes[other] for other in difflib.get_close_matches(name[:100], homes, n=1)]
    return f"unknown key {dotted!r:.100}; " + (
        f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(siblings)}"
    )


_PLAINER = {
    r"a valid integer(, .*)?$": "a whole number",
    r"a valid number(, .*)?$": "a number",
    r"greater than or equal to": "at least",
    r"less than or equal to": "at most",
    r"greater than": "above",
}
"""What is said instead of words of pydantic, by pattern."""


def _text(where: tuple[str, str], messages: Sequence[str]) -> str:
    """Return what is wrong with a value as a line for people; one of `messages` has to be met."""
    place, value = where
    first, *others = messages
    either = "".join(f" or {other.removeprefix('should be ')}" for other in others)
    return f"{place}: {first}{either}{value}"


def _problem(details: ErrorDetails, given: Mapping[Key, _Given]) -> tuple[tuple[str, str], str]:
    """Return where an error of pydantic is, and the value there; and what that should be."""
    section, *path = (str(part) for part in details["loc"])
    context = details.get("ctx", {})
    if not path:  # raised by `settings.conflict`
        named: Iterable[str] = context["keys"]
        path = [next((name for name in named if (section, name) in given), context["keys"][0])]
    entry = given[section, path[0]]
    message = details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    for pattern, words in _PLAINER.items():
        message = re.sub(pattern, words, message)
    key = ".".join([section, *(part for part in path if "[" not in part)])
    if entry.where == _COMMAND_LINE:
        key = f"--{path[0].replace('_', '-')} ({key})"
    value = "" if details["type"] == "conflict" else f", not {details['input']!r:.60}"
    return (f"{entry.where}: {key}", value), message
