"""Write a file of settings: every setting with its description and default.

    python -m distributed_llm.common.config_template
        prints config/default.yaml
    python -m distributed_llm.common.config_template config/local.yaml --set worker.name=pc
        writes a file to edit, with the values that were set; all others are comments

An existing file is never overwritten.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from distributed_llm.common.config import load_settings
from distributed_llm.common.errors import ConfigError
from distributed_llm.common.settings import SECTIONS

_DEFAULT_HEADER = """\
# Every setting with its default. Copy what you change to config/local.yaml, or set it in the
# environment (threads under worker: is DLLM_WORKER__THREADS) or on the command line; each goes
# before the one named earlier.
"""
_LOCAL_HEADER = """\
# The settings of this machine. A line that begins with "# name:" is off and shows the default:
# remove the "# " to change it. Started with: --config config/local.yaml
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
    lines = [_DEFAULT_HEADER if chosen is None else _LOCAL_HEADER]
    for section, kind in SECTIONS.items():
        lines.append(f"{section}:  # {kind.__doc__}")
        current = getattr(values, section).model_dump()
        for name, field in kind.model_fields.items():
            description = textwrap.wrap(field.description or "", 94)
            lines += [f"  # {line}" for line in description]
            off = "# " if chosen is not None and f"{section}.{name}" not in chosen else ""
            value = "" if current[name] is None else current[name]
            lines.append(f"  {off}{name}: {json.dumps(value, ensure_ascii=False)}")
        lines.append("")
    return "\n".join(lines)


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
    chosen = dict(item.partition("=")[::2] for item in options.set)
    try:
        text = render(chosen)
        with options.path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError:
        print(f"{options.path} is there already; kept as it is.")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{options.path}: cannot be written: {error.strerror}", file=sys.stderr)
        return ConfigError.exit_code
    else:
        print(f"Wrote {options.path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
