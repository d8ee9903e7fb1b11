"""Token counts, as OpenAI tells them. Pure."""

from collections.abc import Iterable, Sequence

import msgspec

from distributed_llm.client.answers import Generation


class PromptDetails(msgspec.Struct):
    """Tokens of a prompt that needed no computing."""

    cached_tokens: int


class UsageBody(msgspec.Struct):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


def usage_of(answers: Iterable[Sequence[Generation]]) -> UsageBody:
    """Return the token counts of a request.

    Args:
        answers: those to each of its prompts.
    """
    prompt = completion = cached = 0
    for generations in answers:
        prompt += generations[0].usage.prompt_tokens
        cached += generations[0].usage.cached_tokens
        completion += sum(one.usage.completion_tokens for one in generations)
    return UsageBody(prompt, completion, prompt + completion, PromptDetails(cached))
