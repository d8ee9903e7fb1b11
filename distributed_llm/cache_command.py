"""`dllm cache`: the weights that workers of this user keep on this machine."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from distributed_llm.options import AsJson

if TYPE_CHECKING:
    from distributed_llm.weights.cache.content_cache import ContentCache

app = typer.Typer(
    help="List or delete the weights that workers keep on this machine.", no_args_is_help=True
)


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Show of which models there are weights, and how much room they take."""
    from distributed_llm import console

    cache = _cache()
    console.print_cache(cache.folder, cache.contents(), as_json=as_json)


@app.command()
def prune(
    to: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Delete what was not used for longest, until SIZE is left."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Delete what no other model has; see dllm cache list."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all weights.")] = False,
) -> None:
    """Delete weights, but none that are being fetched. Workers fetch again what they need."""
    from distributed_llm.common.units import parse_size
    from distributed_llm.common.wording import size_text

    if (to is not None) + (model is not None) + everything != 1:
        raise typer.BadParameter(
            "say what to delete: --to SIZE (what was not used for longest, until SIZE is left), "
            "--model NAME (of one model; `dllm cache list` shows them) or --all."
        )
    cache = _cache()
    if model is not None:
        pruned = cache.forget_model(model)
    elif everything:
        pruned = cache.clear()
    else:
        try:
            pruned = cache.shrink_to(parse_size(to or "nothing") or 0)
        except ValueError as exc:
            raise typer.BadParameter(f"{to!r} is {exc}.", param_hint="--to") from exc
    print(f"{size_text(pruned.freed_bytes)} are free again in {cache.folder}", file=sys.stderr)
    if pruned.left_bytes:
        print(
            f"{size_text(pruned.left_bytes)} stay: they are being fetched or read, or this user "
            "may not delete them",
            file=sys.stderr,
        )


def _cache() -> "ContentCache":
    from distributed_llm.common.cache_folder import cache_folder
    from distributed_llm.weights.cache.content_cache import ContentCache

    return ContentCache(cache_folder(), None)
