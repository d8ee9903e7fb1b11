"""Write a file of settings: every setting with its description and default.

    python -m distributed_llm.common.config_template
        prints what `default.yaml` in the package says
    python -m distributed_llm.common.config_template config/local.yaml --set worker.name=pc
        writes a file to edit, with the values that were set; all others are comments

An existing file is never overwritten.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from distributed_llm.common.config import Key, load_settings, setting_names
from distributed_llm.common.errors import ConfigError
from distributed_llm.common.settings import SECTIONS, Settings

_DEFAULT_HEADER = """\
# Every setting with its default. Write what you change to a file (`dllm config init`), or set it in
# the environment (threads under worker: is DLLM_WORKER__THREADS) or on the command line; each goes
# before the one named earlier.
"""
_EFFECTIVE_HEADER = """\
# Every setting as it applies here. Behind a value stands where it was given; the others are
# defaults.
"""
_LOCAL_HEADER = """\
# The settings of this machine. A line that begins with "# name:" is off and shows the default:
# remove the "# " to change it. Name this file with --config when you start.
"""


def render(chosen: Mapping[str, str] | None = None) -> str:
    """Return a YAML file of settings.

    Args:
        chosen: values by dotted name, such as `{"worker.name": "pc"}`; all other settings become
            comments. None gives every setting with its default.

    Raises:
        ConfigError: a name or value in `chosen` is wrong.
    """
    values = load_settings(None, environment={}, overrides=chosen or {})
    if chosen is None:
        return _text(_DEFAULT_HEADER, values)
    on = {tuple(dotted.split(".", 1)) for dotted in chosen}
    return _text(_LOCAL_HEADER, values, off=[key for key in setting_names() if key not in on])


def render_effective(values: Settings, origins: Mapping[Key, str]) -> str:
    """Return settings as a YAML file that says where each was given; without any, the defaults.

    Args:
        values: of all settings.
        origins: where those were given that are no defaults.
    """
    return _text(_EFFECTIVE_HEADER if origins else _DEFAULT_HEADER, values, origins=origins)


def _text(
    header: str,
    values: Settings,
    *,
    off: Collection[Key] = (),
    origins: Mapping[Key, str] | None = None,
) -> str:
    """Return a file of settings, those in `off` as comments."""
    lines = [header]
    for section, kind in SECTIONS.items():
        lines.append(f"{section}:  # {kind.__doc__}")
        current = getattr(values, section).model_dump(mode="json")
        for name, field in kind.model_fields.items():
            description = textwrap.wrap(field.description or "", 94)
            lines += [f"  # {line}" for line in description]
            sign = "# " if (section, name) in off else ""
            value = "" if current[name] is None else current[name]
            origin = (origins or {}).get((section, name))
            comment = f"  # from {origin}" if origin else ""
            lines.append(f"  {sign}{name}: {json.dumps(value, ensure_ascii=False)}{comment}")
        lines.append("")
    return "\n".join(lines)


def chosen_of(items: Iterable[str]) -> dict[str, str]:
    """Return values by dotted name.

    Args:
        items: such as "worker.name=pc".

    Raises:
        ConfigError: one has no "=".
    """
    chosen = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set {item:.100}: no value; write SECTION.NAME=VALUE.")
        chosen[name] = value
    return chosen


def write(path: Path, chosen: Mapping[str, str]) -> None:
    """Write a file of settings to edit.

    Args:
        path: of the file, which must not be there yet.
        chosen: as for `render`.

    Raises:
        ConfigError: a name or value in `chosen` is wrong, the file is there already, or it cannot
            be written.
    """
    text = render(chosen)
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already and was kept as it is. Name another file."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be written: {reason}") from None


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="config_template", description="Write a file of settings, or print the defaults."
    )
    parser.add_argument("path", nargs="?", type=Path, help="file to write; kept if it exists")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="may be repeated"
    )
    options = parser.parse_args(arguments)
    if options.path is None:
        sys.stdout.write(render())
        return 0
    if options.path.exists():
        print(f"{options.path} is there already; kept as it is.")
        return 0
    try:
        write(options.path, chosen_of(options.set))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"Wrote {options.path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
