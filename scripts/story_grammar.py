"""A grammar of little stories: the text the built-in demo model is trained on.

A story is drawn in two steps. First its facts: hero, friend, place, thing. Then one sentence from
each row of a plot, filled in with these facts, so that names, pronouns and things agree from the
first sentence to the last. Everything is written here by hand; nothing is copied from a data set.

The first alternative of a row is twice as likely as the others (`pick`), so that greedy decoding
meets few near-ties. In one story of five a name or a thing is a word made up from
syllables, which teaches the model to copy words it has never seen.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import story_tables as tables
from story_plots import PLOTS

T = TypeVar("T")
Facts = dict[str, str]
Turn = dict[str, str]

_NOVEL_SHARE = 0.22
_PARAGRAPH = "\n\n"
_PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}


@dataclass(frozen=True)
class Story:
    """One story: its text and the facts it tells of."""

    text: str
    facts: Facts
    plot: str
    moral: str
    has_thing: bool
    has_friend: bool


def pick(rng: Random, items: Sequence[T]) -> T:
    """Return one of `items`, the first twice as often as any other."""
    return rng.choices(items, [2] + [1] * (len(items) - 1))[0]


def with_article(words: str) -> str:
    """Return `words` after "a" or "an"."""
    is_vowel = words[0].lower() in "aeiou" and not words.startswith("uni")
    return ("an " if is_vowel else "a ") + words


def tell(rng: Random) -> Story:
    """Return a new story."""
    plot_name = pick(rng, tuple(PLOTS))
    plot = PLOTS[plot_name]
    facts = _draw_facts(rng, plot.things)
    starts_with_thing = bool(plot.things) and rng.random() < 0.4
    openings = tables.CHILD_OPENINGS if facts["adult"] == "no" else tables.OPENINGS
    first = [tables.THING_OPENINGS if starts_with_thing else openings]
    if plot.things and not starts_with_thing:
        first.append(tables.THING_INTRODUCTIONS)
    first.append(tables.DETAILS)
    parts = [first, plot.problem, plot.solution, (plot.ends,)]
    paragraphs = [" ".join(pick(rng, row) for row in part) for part in parts]
    paragraphs[-1] += pick(rng, tables.LAST_WORDS)
    template = _PARAGRAPH.join([*paragraphs[:2], " ".join(paragraphs[2:])])
    return Story(
        text=template.format(**facts),
        facts=facts,
        plot=plot_name,
        moral=plot.moral,
        has_thing=bool(plot.things),
        has_friend="{friend}" in template,
    )


def tell_chat(rng: Random) -> list[Turn]:
    """Return a conversation: mostly a request and its story, at times small talk before it."""
    turns: list[Turn] = []
    if rng.random() < 0.12:
        turns.append(_turn("system", pick(rng, tables.SYSTEM_PROMPTS)))
    for _ in range(pick(rng, (0, 0, 1))):
        turns += _small_talk(rng)
    if rng.random() < 0.9 or len(turns) < 2:
        story = tell(rng)
        turns += [_turn("user", _request(rng, story)), _turn("assistant", story.text)]
        if rng.random() < 0.25:
            turns += _follow_up(rng)
    return turns


def lexicon() -> frozenset[str]:
    """Return every word, in lower case, that a story without made-up words can hold."""
    found: set[str] = set()
    for text in tables.all_texts():
        found.update(words_of(re.sub(r"\{\w+\}", " ", text)))
    return frozenset(found)


def words_of(text: str) -> list[str]:
    """Return the words of `text` in lower case."""
    return re.findall(r"[^\W\d_]+", text.lower())


def made_up_word(rng: Random) -> str:
    """Return a word of a few syllables that means nothing."""
    count = rng.choice((1, 1, 2))
    syllables = (rng.choice(tables.ONSETS) + rng.choice(tables.VOWELS) for _ in range(count))
    return "".join(syllables) + rng.choice(tables.CODAS)


def _draw_facts(rng: Random, things: tuple[str, ...]) -> Facts:
    """Return the names, pronouns, places and things of one story."""
    novel = rng.choice(("name", "species", "noun")) if rng.random() < _NOVEL_SHARE else ""
    place = pick(rng, tables.PLACES)
    facts: Facts = {"place": place.name, "at": f"{place.preposition} {place.name}"}
    _add_character(rng, facts, "", novel)
    while facts.get("friend", facts["hero"]) == facts["hero"]:
        _add_character(rng, facts, "f", "")
    noun = made_up_word(rng) if novel == "noun" else pick(rng, things or ("ball",))
    facts["noun"] = noun
    facts["thing"] = f"{pick(rng, tables.COLOURS)} {noun}"
    for name, row in tables.EXTRAS.items():
        facts[name] = pick(rng, row)
    facts["when_low"] = facts["when"].lower()
    for name in ("thing", "noun", "kind", "species", "fspecies"):
        facts[f"a_{name}"] = with_article(facts[name])
        facts[f"A_{name}"] = facts[f"a_{name}"].capitalize()
    return facts


def _add_character(rng: Random, facts: Facts, prefix: str, novel: str) -> None:
    """Put a character's name, species and pronouns into `facts`, for `prefix` "" or "f".

    `novel` says which of them is a made-up word. The likeliest friend has another name and is of
    another species than the likeliest hero.
    """
    start = 2 if prefix else 0
    gender = rng.choice(("she", "he"))
    is_child = novel != "species" and rng.random() < (0.2 if prefix else 0.35)
    if is_child:
        species, names = ("girl" if gender == "she" else "boy"), tables.NAMES[gender]
    else:
        row = tables.SPECIES if rng.random() < 0.8 else tables.RARE_SPECIES
        species = pick(rng, row[start:] + row[:start])
        gender = tables.GENDERED.get(species, gender)
        names = tables.NAMES[gender]
    name = pick(rng, names[start:] + names[:start])
    if novel == "name":
        name = made_up_word(rng).capitalize()
    elif novel == "species":
        species = made_up_word(rng)
    facts[prefix + "species"] = species
    facts["friend" if prefix else "hero"] = name
    for key, pronoun in zip(("he", "him", "his"), _PRONOUNS[gender], strict=True):
        facts[prefix + key] = pronoun
        facts[prefix + key.capitalize()] = pronoun.capitalize()
    if not prefix:
        traits = tables.CHILD_TRAITS if is_child else tables.TRAITS
        facts["trait"] = pick(rng, traits)
        facts["kind"] = f"{facts['trait']} {species}"
        facts["adult"] = "no" if is_child else "yes"


def _turn(role: str, content: str) -> Turn:
    """Return one message of a conversation."""
    return {"role": role, "content": content}


def _request(rng: Random, story: Story) -> str:
    """Return a user's wish for `story`, naming some of what it tells of."""
    facts = story.facts
    topics = [facts["a_species"], facts["hero"], f"{facts['a_species']} named {facts['hero']}"]
    if story.has_friend:
        topics += [
            f"{facts['a_species']} and {facts['a_fspecies']}",
            f"{facts['hero']} and {facts['friend']}",
        ]
    if story.has_thing:
        topics += 2 * [f"{facts['hero']} and {facts['a_thing']}", facts["a_noun"]]
        topics += 2 * [f"{facts['a_species']} and {facts['a_noun']}", facts["a_thing"]]
    topics += [f"{facts['a_kind']}", story.moral]
    if facts["place"] in story.text:
        topics.append(f"{facts['a_species']} {facts['at']}")
    if rng.random() < 0.07:
        return pick(rng, tables.OPEN_REQUESTS)
    request = pick(rng, tables.REQUESTS).format(topic=pick(rng, topics))
    return _untidy(rng, request)


def _untidy(rng: Random, text: str) -> str:
    """Return `text`, at times without its full stop or in lower case, as people type."""
    if rng.random() < 0.25:
        text = text.rstrip(".!?")
    return text[0].lower() + text[1:] if rng.random() < 0.12 else text


def _small_talk(rng: Random) -> list[Turn]:
    """Return a user's remark and the answer to it."""
    ask, reply = pick(rng, tables.SMALL_TALK)
    question = pick(rng, ask).format(word=made_up_word(rng), number=rng.randrange(100))
    return [_turn("user", _untidy(rng, question)), _turn("assistant", pick(rng, reply))]


def _follow_up(rng: Random) -> list[Turn]:
    """Return what comes after a story: thanks, or one more story."""
    if rng.random() < 0.5:
        ask, reply = tables.THANKS
        return [_turn("user", pick(rng, ask)), _turn("assistant", pick(rng, reply))]
    return [_turn("user", pick(rng, tables.MORE)), _turn("assistant", tell(rng).text)]
