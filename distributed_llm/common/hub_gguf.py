"""Chooses a GGUF file in a repository of the hub, as people name them. Pure."""

import re
from collections.abc import Collection

from distributed_llm.common.errors import CheckpointError
from distributed_llm.common.gguf_files import SUFFIX, models_among

_NAME = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(?P<file>[\w./ -]+\.gguf)|:(?P<tag>[\w./-]+))"
    r"(?:@(?P<revision>.+))?",
    re.ASCII,
)
_FILE_WITH_TAG = re.compile(r"(?P<file>.*\.gguf):(?P<tag>[\w./-]*)", re.ASCII | re.IGNORECASE)
_SHOWN_NAMES = 20
_SHOWN_CHARS = 100


def parse_name(model: str) -> tuple[str, str] | None:
    """Return the repository, with its revision, and the file or tag that `model` names, or None.

    Args:
        model: such as "org/name:Q4_K_M" or "org/name/file.gguf", perhaps with "@revision".

    Raises:
        CheckpointError: it names a file, and how the weights in it are to be kept.
    """
    if tagged := _FILE_WITH_TAG.fullmatch(model):
        file, tag = tagged["file"][:_SHOWN_CHARS], tagged["tag"][:_SHOWN_CHARS]
        raise CheckpointError(
            f"{file}:{tag} names a GGUF file, and {tag!r} after it: a file keeps its weights in "
            f"one way only. Give {file} alone; a colon chooses among the files of a repository of "
            "the hub, such as 'org/name:Q4_K_M'."
        )
    match = _NAME.fullmatch(model)
    if match is None or ".." in model:
        return None
    at = f"@{match['revision']}" if match["revision"] else ""
    return match["repository"] + at, match["file"] or match["tag"]


def choose(repository: str, paths: Collection[str], wanted: str) -> str:
    """Return the file of a model among those of a repository, of several parts the first.

    Args:
        paths: of the files in it.
        wanted: a file, or how the weights are kept: "Q4_K_M".

    Raises:
        CheckpointError: there is none, or more than one; with those that there are.
    """
    models = models_among(paths)
    if wanted in models:
        return wanted
    ending = re.compile(
        rf"(^|[-._/]){re.escape(wanted.removesuffix(SUFFIX))}(-\d{{5}}-of-\d{{5}})?\.gguf",
        re.IGNORECASE,
    )
    found = [name for name in models if ending.search(name)]
    if len(found) == 1:
        return found[0]
    shown = ", ".join((found or models)[:_SHOWN_NAMES]) or "none at all"
    which = "several such models" if found else "no such model"
    raise CheckpointError(
        f"{repository} has {which} in GGUF ({wanted!r}): it has {shown}. Give one of them: "
        f"{repository}/{(found or models or ['FILE.gguf'])[0]}."
    )
