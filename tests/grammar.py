"""What no sentence for people says: one of several, numbers and words of ours, layers from 0."""

import re

_WRONG = re.compile(
    r"(?<![0-9.,])1 (?!ms\b|GB|was\b|has\b|is\b)[a-z]+s\b"  # 1 threads
    r"|\b0-[0-9]"  # layers counted from 0
    r"|\bpositions?\b|None|\{|\}|  "
    r"|\b[0-9]{7}"  # 9677888
)


def faults_of(text: str) -> list[str]:
    """Return what is wrong with a sentence."""
    return _WRONG.findall(text)
