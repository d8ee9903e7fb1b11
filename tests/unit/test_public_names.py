"""The names of the package, which are imported when they are first used."""

import distributed_llm


def test_the_public_names_are_listed() -> None:
    assert set(distributed_llm.__all__) <= set(dir(distributed_llm))
