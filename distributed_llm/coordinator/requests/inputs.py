"""Prompt and grammar of a request, as they come in its tensors. Pure."""

from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.grammar import MAX_GRAMMAR_BYTES, Grammar, decode_grammar
from distributed_llm.common.messages import Embed, Generate
from distributed_llm.common.tensors import Frame
from distributed_llm.coordinator.requests.parameters import wrong_languages, wrong_prompt


def wrong_inputs(message: Generate | Embed, context_length: int) -> InvalidRequest | None:
    """Return an error if tensors are wrong or one too many, or languages make no sense."""
    most = 1 + (isinstance(message, Generate) and message.grammar is not None)
    if len(message.tensors) > most:
        return InvalidRequest(f"The request has {len(message.tensors)} tensors, not {most}.")
    if isinstance(message, Generate) and (wrong := wrong_languages(message.prompt, message.params)):
        return wrong
    if isinstance(message, Embed) or not _has_grammar_text(message):
        return wrong_prompt(message.prompt, message.tensors, context_length)
    *others, text = message.tensors or (None,)
    if text and (text.dtype != "uint8" or text.nbytes > MAX_GRAMMAR_BYTES):
        return InvalidRequest(
            f"A grammar travels as at most {MAX_GRAMMAR_BYTES:,} uint8, not {text}."
        )
    return wrong_prompt(message.prompt, [spec for spec in others if spec], context_length)


def split(message: Generate | Embed, frames: tuple[Frame, ...]) -> tuple[bytes, Grammar | None]:
    """Return the prompt and the grammar of a request whose tensors are right.

    Raises:
        InvalidRequest: the grammar cannot be read.
    """
    if isinstance(message, Embed):
        return bytes(frames[0]) if frames else b"", None
    if not _has_grammar_text(message):
        grammar = Grammar(message.grammar) if message.grammar else None
        return bytes(frames[0]) if frames else b"", grammar
    assert message.grammar is not None
    if not frames:
        raise InvalidRequest(f"The request has no text of its {message.grammar} grammar.")
    grammar = decode_grammar(message.grammar, bytes(frames[-1]))
    return bytes(frames[0]) if len(frames) > 1 else b"", grammar


def _has_grammar_text(message: Generate) -> bool:
    return message.grammar not in (None, "json_object")
