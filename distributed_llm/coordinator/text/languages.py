"""The languages between which translators translate: NLLB, M2M100, mBART and their kin.

A token names the language of a source, beside it; another one names that of the answer, and is the
first that is written. As transformers has them, which sets the language of all sources at once.
"""

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from distributed_llm.common.errors import InvalidRequest
from distributed_llm.common.wording import list_text

_WRITTEN = re.compile(r"[a-z]{2,3}_[A-Z][A-Za-z]{1,3}")
"""How special tokens of NLLB are written that name a language."""

_SHOWN = 4
"""Names that an error lists."""

_NO_LANGUAGES = (
    "This model's tokenizer has no languages to choose from, so {name} says nothing to it. Say in "
    "the prompt what is wanted, as the model was trained: 'translate English to German: ...' for "
    "T5, '>>deu<< ...' for some of Marian's."
)


class Languages:
    """The languages that a tokenizer knows; none, if it is not that of such a translator.

    Args:
        hugging_face: tokenizer of transformers; None: there is none.
    """

    def __init__(self, hugging_face: Any | None) -> None:
        self._tokens = _tokens_of(hugging_face)
        self._around: tuple[list[int], list[int]] = ([], [])
        self._usual: int | None = None
        if self._tokens:
            assert hugging_face is not None
            around = list(hugging_face.prefix_tokens), list(hugging_face.suffix_tokens)
            known = set(self._tokens.values())
            self._usual = next((token for one in around for token in one if token in known), None)
            self._around = around

    def token_of(self, language: str, name: str) -> int:
        """Return the id of the token that names a language.

        Args:
            language: as people write it ("fra_Latn").
            name: of the parameter that gives it.

        Raises:
            InvalidRequest: the tokenizer has no such language, or none at all.
        """
        if not self._tokens:
            raise InvalidRequest(_NO_LANGUAGES.format(name=name))
        token = self._tokens.get(language)
        if token is None:
            raise InvalidRequest(
                f"The model has no language {language!r}, which {name} names. Among its "
                f"{len(self._tokens)} are {self._like(language)}."
            )
        return token

    def surround(self, token_ids: list[int], language: str) -> list[int]:
        """Return a source in a language: a text with special tokens before and after it.

        Args:
            token_ids: of the text alone.
            language: of the source.

        Raises:
            InvalidRequest: as `token_of`.
        """
        own = self.token_of(language, "source_language")
        before, after = (
            [own if token == self._usual else token for token in tokens] for tokens in self._around
        )
        return [*before, *token_ids, *after, *([own] if self._usual is None else [])]

    def _like(self, language: str) -> str:
        """Return a few names, those first that begin alike."""
        start = language[:2].lower()
        names = sorted(self._tokens, key=lambda name: (not name.startswith(start), name))
        return list_text(islice(names, _SHOWN))


def _tokens_of(hugging_face: Any | None) -> Mapping[str, int]:
    """Return the tokens that name languages, by the names that people write."""
    if not hasattr(hugging_face, "_build_translation_inputs"):
        return {}
    assert hugging_face is not None
    by_code = getattr(hugging_face, "lang_code_to_id", None)
    if by_code is None:
        special = hugging_face.all_special_tokens
        written = [token for token in special if _WRITTEN.fullmatch(token)]
        by_code = dict(zip(written, hugging_face.convert_tokens_to_ids(written), strict=True))
    unknown = hugging_face.unk_token_id
    return {code.strip("_"): int(i) for code, i in by_code.items() if i != unknown}
