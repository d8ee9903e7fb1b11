"""`dllm generate`: has a coordinator go on from a prompt, with parameters from the command line."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from distributed_llm.common import streams
from distributed_llm.common.stopping import interruptible
from distributed_llm.options import Config, Coordinator, Insecure, client_of, settings_of

_LENGTH = "Where an answer ends"
_SAMPLING = "How tokens are picked"
_BIASES = "Which tokens are made more or less likely"
_ANSWERS = "What is asked for and printed"
_IDS = "ID,ID,..."


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to go on from; nothing or - reads stdin.")
    ] = None,
    coordinator: Coordinator = None,
    config: Config = None,
    token_ids: Annotated[
        str | None,
        typer.Option(
            metavar=_IDS,
            help="Token ids to go on from instead of text; prints token ids.",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", "-n", help="Number of answers.", show_default="1", rich_help_panel=_ANSWERS
        ),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: log-probabilities of so many tokens per place.",
            show_default="none",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Give up after this, such as 30s.",
            show_default="never",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_ANSWERS)
    ] = False,
    stats: Annotated[
        bool, typer.Option(help="Tell who ran what.", rich_help_panel=_ANSWERS)
    ] = False,
    insecure: Insecure = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens at most.", show_default="the model's, else 256", rich_help_panel=_LENGTH
        ),
    ] = None,
    fit_context: Annotated[
        bool,
        typer.Option(
            help="Fewer than --max-new-tokens where there is no room for them.",
            rich_help_panel=_LENGTH,
        ),
    ] = False,
    min_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens at least.", show_default="the model's, else none", rich_help_panel=_LENGTH
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End before this text; may be repeated.",
            show_default="none",
            rich_help_panel=_LENGTH,
        ),
    ] = None,
    eos_token_id: Annotated[
        str | None,
        typer.Option(
            metavar=_IDS,
            help="End after one of these tokens.",
            show_default="the model's",
            rich_help_panel=_LENGTH,
        ),
    ] = None,
    stop_token_ids: Annotated[
        str | None,
        typer.Option(
            metavar=_IDS,
            help="End after one of these tokens too.",
            show_default="none",
            rich_help_panel=_LENGTH,
        ),
    ] = None,
    ignore_eos: Annotated[
        bool,
        typer.Option(help="Go on after the end-of-sequence token.", rich_help_panel=_LENGTH),
    ] = False,
    skip_special_tokens: Annotated[
        bool,
        typer.Option(
            "--skip-special-tokens/--show-special-tokens",
            help="Whether the text has no special tokens.",
            rich_help_panel=_ANSWERS,
        ),
    ] = True,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 is greedy.", show_default="the model's, else 0", rich_help_panel=_SAMPLING
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Sample from the k likeliest tokens; 0 is all.",
            show_default="the model's, else 0",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest tokens with this much probability.",
            show_default="the model's, else 1",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Drop tokens below this share of the best.",
            show_default="the model's, else 0",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    typical_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the most typical tokens with this much probability.",
            show_default="the model's, else 1",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Same seed, same text in float32 (in bfloat16 a token may differ now and then).",
            show_default="drawn anew",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1: repeat less; 1 is off.",
            show_default="the model's, else 1",
            rich_help_panel=_BIASES,
        ),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(
            help="Subtracted from logits of tokens in the answer; 0 is off.",
            show_default="0",
            rich_help_panel=_BIASES,
        ),
    ] = None,
    frequency_penalty: Annotated[
        float | None,
        typer.Option(
            help="The same, once per occurrence; 0 is off.",
            show_default="0",
            rich_help_panel=_BIASES,
        ),
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None,
        typer.Option(
            help="No so many tokens in a row occur twice; 0 is off.",
            show_default="the model's, else 0",
            rich_help_panel=_BIASES,
        ),
    ] = None,
    bad_words_ids: Annotated[
        list[str] | None,
        typer.Option(
            metavar=_IDS,
            help="Tokens that do not follow each other in the answer; may be repeated.",
            show_default="the model's, else none",
            rich_help_panel=_BIASES,
        ),
    ] = None,
    suppress_tokens: Annotated[
        str | None,
        typer.Option(
            metavar=_IDS,
            help="Tokens that are never picked.",
            show_default="the model's, else none",
            rich_help_panel=_BIASES,
        ),
    ] = None,
    forced_bos_token_id: Annotated[
        str | None,
        typer.Option(
            metavar="ID|TOKEN",
            help="First token of an encoder-decoder's answer: 5, or as it is written.",
            show_default="the model's, else none",
            rich_help_panel=_BIASES,
        ),
    ] = None,
    source_language: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Language of the prompt, for a translator: eng_Latn.",
            show_default="the tokenizer's",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    target_language: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Language to translate to: fra_Latn.",
            show_default="the model's",
            rich_help_panel=_ANSWERS,
        ),
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID=NUMBER",
            help="Number to add to the logit of a token; may be repeated.",
            show_default="none",
            rich_help_panel=_BIASES,
        ),
    ] = None,
) -> None:
    """Go on from a prompt and print the text as it comes."""
    if logprobs is not None and not as_json:
        raise typer.BadParameter(
            "they are shown in JSON only; give --json too.", param_hint="--logprobs"
        )
    settings = settings_of(
        config, {"client.coordinator": coordinator, "client.insecure": insecure or None}
    )
    asked = _text_prompt(prompt) if token_ids is None else _ids_prompt(token_ids, prompt)
    params = {
        "max_new_tokens": max_new_tokens,
        "fit_context": fit_context,
        "min_new_tokens": min_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "typical_p": typical_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "bad_words_ids": _each(bad_words_ids, "--bad-words-ids"),
        "suppress_tokens": _optional_ids(suppress_tokens, "--suppress-tokens"),
        "forced_bos_token_id": _token(forced_bos_token_id),
        "source_language": source_language,
        "target_language": target_language,
        "logit_bias": _biases(logit_bias),
        "logprobs": logprobs,
        "n": n,
        "seed": seed,
        "stop_strings": stop,
        "eos_token_id": _optional_ids(eos_token_id, "--eos-token-id"),
        "stop_token_ids": _optional_ids(stop_token_ids, "--stop-token-ids"),
        "ignore_eos": ignore_eos,
        "skip_special_tokens": skip_special_tokens,
        "timeout_s": _seconds(timeout, "--timeout"),
    }
    from distributed_llm import console

    with interruptible(), client_of(settings) as client:
        console.print_answers(
            client.stream(asked, **params),
            n=n,
            as_json=as_json,
            stats=stats,
            as_ids=token_ids is not None,
        )


def _text_prompt(prompt: str | None) -> str:
    """Return the prompt, or what stdin holds."""
    if prompt not in (None, "-"):
        return str(prompt)
    if sys.stdin is not None and sys.stdin.isatty():
        end = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
        print(f"Type the prompt; {end} on a line of its own ends it.", file=sys.stderr)
    return streams.read_prompt()


def _ids_prompt(token_ids: str, prompt: str | None) -> list[int]:
    if prompt is not None:
        raise typer.BadParameter("give either a prompt or token ids.", param_hint="--token-ids")
    return _ids(token_ids, "--token-ids")


def _token(text: str | None) -> int | str | None:
    """Return a token: its id, or how it is written."""
    return int(text) if text is not None and text.isdecimal() else text


def _ids(text: str, flag: str) -> list[int]:
    """Return the token ids of "1, 5, 9"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as exc:
        raise typer.BadParameter(
            f"{text!r:.60} are no token ids; write them as 1,5,9.", param_hint=flag
        ) from exc


def _optional_ids(text: str | None, flag: str) -> list[int] | None:
    return None if text is None else _ids(text, flag)


def _each(texts: Sequence[str] | None, flag: str) -> list[list[int]] | None:
    return [_ids(text, flag) for text in texts] if texts else None


def _biases(texts: Sequence[str] | None) -> dict[int, float] | None:
    """Return the numbers of "5=-1.5", by token id; None if there are none."""
    biases = {}
    for text in texts or ():
        token_id, _, number = text.partition("=")
        try:
            biases[int(token_id)] = float(number)
        except ValueError as exc:
            raise typer.BadParameter(
                f"{text!r:.60} is no token id with a number; write it as 5=-1.5.",
                param_hint="--logit-bias",
            ) from exc
    return biases or None


def _seconds(duration: str | None, flag: str) -> float | None:
    from distributed_llm.common.units import parse_duration

    try:
        return None if duration is None else parse_duration(duration)
    except ValueError as exc:
        raise typer.BadParameter(f"{duration!r} is {exc}.", param_hint=flag) from exc
