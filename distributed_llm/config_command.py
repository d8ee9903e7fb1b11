"""`dllm config`: shows the settings that apply, writes a file of settings, checks one."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Show, write or check settings.", no_args_is_help=True)

FILE = Path("dllm.yaml")
"""Where `dllm config init` writes unless told otherwise."""


@app.command()
def show(
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of settings; none unless given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every setting with what it means, its value, and where that was given.

    A value on the command line goes before the environment, that before the file, that before the
    default.
    """
    import msgspec

    from distributed_llm.common import config_template
    from distributed_llm.common.config import read_settings

    settings, origins = read_settings(config, environment=os.environ, overrides={})
    if as_json:
        document: dict[str, Any] = {
            section: {
                name: {"value": value, "from": origins.get((section, name), "default")}
                for name, value in values.items()
            }
            for section, values in settings.model_dump(mode="json").items()
        }
        print(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())
    else:
        print(config_template.render_effective(settings, origins), end="")


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write; one that is there is kept.")] = FILE,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.NAME=VALUE", help="A value; may be repeated."),
    ] = None,
) -> None:
    """Write a file of settings to edit: all of them, as comments that show the defaults."""
    from distributed_llm.common import config_template

    config_template.write(path, config_template.chosen_of(settings or ()))
    print(f"Wrote {path}. Edit it, and start with: --config {path}")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="YAML file of settings.")],
) -> None:
    """Check a file of settings, together with the environment."""
    from distributed_llm.common.config import read_settings
    from distributed_llm.common.wording import count_text

    _, origins = read_settings(path, environment=os.environ, overrides={})
    print(f"{path}: no mistakes; {count_text(len(origins), 'setting')} given")
