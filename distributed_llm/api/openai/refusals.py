"""Fields that clients send and that cannot be done here, or need not be. Pure."""

from collections.abc import Mapping
from typing import Any

from distributed_llm.api.bodies import Body
from distributed_llm.api.errors import unsupported

_TEXT_ONLY = "Only text is served."
_NO_SEARCH = "Answers are sampled, not searched for. Leave it out."
_TOOLS = "Functions are called as tools. Send `tools` and `tool_choice`."

_REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), _TEXT_ONLY),
    "modalities": ((["text"],), _TEXT_ONLY),
    "mm_processor_kwargs": ((), _TEXT_ONLY),
    "functions": (([],), _TOOLS),
    "function_call": (("none",), _TOOLS),
    "prediction": ((), "Text that is expected does not make answers faster here. Leave it out."),
    "verbosity": (("medium",), "Say in a message how long the answer should be."),
    "web_search_options": ((), "Nothing is searched for in the web here. Leave it out."),
    "chat_template": ((), "The chat template is the checkpoint's own. Leave it out."),
    "trust_remote_code": ((False,), "No code of a checkpoint is ever run. Leave it out."),
    "add_generation_prompt": ((True,), "An answer is always the assistant's next message."),
    "continue_final_message": ((False,), "An answer is always a new message. Leave it out."),
    "documents": (([],), "Put documents into messages."),
    "use_beam_search": ((False,), _NO_SEARCH),
    "length_penalty": ((1, 1.0), _NO_SEARCH),
    "include_stop_str_in_output": ((False,), "Answers end before a stop string. Append it."),
    "prompt_logprobs": ((), "Log-probabilities of prompts are not computed. Leave it out."),
    "truncate_prompt_tokens": ((), "Prompts are never cut. Send a shorter one."),
    "bad_words": (([],), "Give token ids with a low logit_bias instead."),
    "allowed_token_ids": ((), "Give a grammar or regex in structured_outputs instead."),
    "return_token_ids": ((False,), "Answers have texts. Ask /tokenize for their token ids."),
    "return_tokens_as_token_ids": ((False,), "Tokens are told as text. Leave it out."),
    "priority": ((0,), "All requests are equal. Leave it out."),
    "base_url": ((), "Nothing is fetched from elsewhere. Leave it out."),
    "webhook": ((), "Nothing is sent elsewhere. Leave it out."),
}
"""Why a field cannot be done, and the values that are done anyway, besides null."""

_HARMLESS = frozenset(
    {
        *("user", "safety_identifier", "store", "metadata", "service_tier"),
        *("prompt_cache_key", "prompt_cache_retention", "spaces_between_special_tokens"),
        *("request_id", "cache_salt"),
    }
)
"""Fields that change no answer."""


def refuse_fields(body: Body) -> None:
    """Check the fields that a body has beyond those of its class.

    Raises:
        ApiError: one is known, and asks for what cannot be done.
    """
    for name, value in (body.model_extra or {}).items():
        usual, why = _REFUSED.get(name, ((value,), ""))
        if value is not None and value not in usual:
            raise unsupported(name, f"{name} cannot be {value!r:.80}. {why}")


KNOWN = frozenset(_REFUSED) | _HARMLESS
"""Fields that are no mistake, although no class of a body has them."""
