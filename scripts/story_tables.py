"""The words and sentences of the story grammar; `story_grammar` says how they are put together.

In a sentence, {hero} {he} {him} {his} {He} {His} are the hero, {friend} {fhe} ... the friend,
{kind} is "little fox" and {species} "fox", {thing} is "red ball" and {noun} "ball", {at} is
"in the forest" and {place} "the forest"; a name that begins with a_ has its article.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from story_plots import PLOTS

Row = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A place and the preposition for being there."""

    name: str
    preposition: str


def _words(text: str) -> Row:
    """Return the words of `text`."""
    return tuple(text.split())


NAMES: dict[str, Row] = {
    "she": _words(
        "Lily Mia Rosie Anna Luna Ruby Daisy Nora Ella Pip Clara Ivy Zoe Hazel Emma Lucy Alice "
        "Molly Grace Eva Lola Maya Nina Olive Poppy Stella Tilly Wendy Bella Cora Elsa Greta"
    ),
    "he": _words(
        "Finn Tom Max Ben Leo Sam Oscar Jack Bruno Felix Otto Theo Milo Hugo Tim Bob Charlie "
        "Henry George Noah Peter Paul Rex Rusty Toby Walter Arthur Bolt Buddy Eddie Frank Jasper"
    ),
}
SPECIES: Row = _words(
    "fox rabbit bear cat dragon robot dog mouse owl frog duck bird squirrel turtle hedgehog "
    "princess king knight queen wizard elephant penguin lion pig horse cow sheep goat monkey tiger "
    "wolf deer"
)
RARE_SPECIES: Row = _words(
    "fish whale crab snail bee ant spider pirate witch giant fairy unicorn ghost monster dinosaur "
    "kitten puppy farmer baker sailor teacher doctor train car bus boat ship star cloud moon "
    "snowman tree"
)
GENDERED = {
    "princess": "she", "queen": "she", "witch": "she", "fairy": "she",
    "king": "he", "knight": "he", "wizard": "he", "snowman": "he",
}  # fmt: skip
TRAITS: Row = _words("little old brave kind shy clever small young happy tiny curious big")
CHILD_TRAITS: Row = _words("little kind brave young shy happy clever curious")
COLOURS: Row = _words("red blue yellow green new shiny big small golden old")
PLACES: tuple[Place, ...] = tuple(
    Place(name, preposition)
    for preposition, name in (
        ("in", "the forest"), ("in", "the garden"), ("by", "the river"), ("by", "the sea"),
        ("at", "the park"), ("in", "the village"), ("on", "the hill"), ("by", "the lake"),
        ("on", "the farm"), ("in", "the meadow"), ("on", "the mountain"), ("in", "the castle"),
    )
)  # fmt: skip
EXTRAS: dict[str, Row] = {
    "spot": ("under a bush", "behind a big rock", "in the tall grass", "under an old tree",
             "behind the barn", "near the old well"),
    "home": ("a small house", "a cozy cave", "an old tower", "a little hut", "a big tree"),
    "food": ("apples", "bread", "berries", "cookies", "soup", "nuts"),
    "trick": ("sing", "swim", "dance", "paint", "climb", "ride a bike"),
    "fear": ("the dark", "the storm", "loud noises", "deep water"),
    "when": ("One day", "One sunny morning", "One rainy day", "One cold morning",
             "One evening"),
    "mood": ("friendly", "gentle", "cheerful", "quiet", "funny"),
}  # fmt: skip

OPENINGS: Row = (
    "Once upon a time, there was {a_kind} named {hero}. {He} lived in {home} {at}.",
    "Once upon a time, {a_kind} named {hero} lived {at}.",
    "One day, {a_kind} named {hero} went for a walk {at}.",
    "The {kind} lived in {home} {at}. {His} name was {hero}.",
    "There once was {a_kind} who lived {at}. {His} name was {hero}.",
    "{hero} was {a_kind} who lived in {home} {at}.",
    "Long ago, {at}, there lived {a_kind} named {hero}.",
    "{hero} the {species} lived in {home} {at}.",
    "It was a sunny day {at}. {A_kind} named {hero} woke up and smiled.",
    "In {home} {at} lived {a_kind}. {His} name was {hero}.",
)
CHILD_OPENINGS: Row = (
    "Once upon a time, there was {a_kind} named {hero}. {He} lived in {home} {at}.",
    "One day, {a_kind} named {hero} went for a walk {at}.",
    "Once upon a time, {a_kind} named {hero} lived {at}.",
    "{hero} was {a_kind} who lived {at}.",
    "{hero} lived in a small house {at} with {his} mother and father.",
    "There once was {a_kind} who lived {at}. {His} name was {hero}.",
    "The {kind} lived {at}. {His} name was {hero}.",
    "{hero} went to {place} with {his} mother.",
)
THING_OPENINGS: Row = (
    "{hero} had {a_thing}. {He} was {a_kind}, and {he} took the {noun} everywhere.",
    "Once upon a time, there was {a_kind} named {hero} who had {a_thing}.",
    "{hero}, {a_kind}, had {a_thing}. It was the best {noun} {at}.",
    "One day, {a_kind} named {hero} got {a_thing} as a present.",
    "The {kind} had {a_thing}. {His} name was {hero}, and {he} lived {at}.",
    "There was {a_thing} in {home} {at}. It belonged to {hero}, {a_kind}.",
)
DETAILS: Row = (
    "{He} loved to play {at}.",
    "Everyone knew {him} because {he} was so {mood}.",
    "Every morning {he} ate {food} and looked at the sky.",
    "{He} liked {food} more than anything else.",
    "{He} was {mood}, and {he} had a warm heart.",
    "{He} liked to look at the clouds and dream.",
)
THING_INTRODUCTIONS: Row = (
    "{His} favorite thing was {a_thing}.",
    "{He} had {a_thing} that {he} loved very much.",
    "{hero} also had {a_thing}, and {he} was very proud of it.",
    "For {his} birthday {he} got {a_thing}.",
)
LAST_WORDS: Row = ("", " The end.", " And they all slept well that night.")

ONSETS: Row = _words("b c d f g h j k l m n p qu r s t v w x y z bl br ch cl cr dr fl fr gl gr pl "
                    "pr sc sh sk sl sn sp st str th tr tw wh")  # fmt: skip
VOWELS: Row = _words("a e i o u a e i o u ai ea ee oa oo ou er ar or an in on el al en")
CODAS: Row = ("", "n", "r", "t", "l", "s", "m", "p", "ck", "x", "ng", "nd", "st", "ll", "by", "a",
              "o", "y", "er", "le", "ine", "ot", "us", "ie")  # fmt: skip

SYSTEM_PROMPTS: Row = (
    "You are a helpful assistant.",
    "You are a friendly storyteller.",
    "You tell little stories for children.",
)
REQUESTS: Row = (
    "Tell me a story about {topic}.",
    "Write about {topic}.",
    "Write a story about {topic}.",
    "Please tell me a story about {topic}.",
    "Can you tell me a story about {topic}?",
    "I want to hear about {topic}.",
    "Write a short story about {topic}.",
    "A story about {topic}, please.",
)
OPEN_REQUESTS: Row = ("Tell me a story.", "Tell me a story, please.", "A story, please!",
                      "Write a story.", "Once upon a time")  # fmt: skip
SMALL_TALK: tuple[tuple[Row, Row], ...] = (
    (("Hello!", "Hi!", "Hi there!", "Good morning!", "Hey", "Hello, how are you?"),
     ("Hello! What shall I tell you a story about?", "Hello! Would you like to hear a story?")),
    (("What can you do?", "Who are you?", "What are you?", "What is your name?", "Help"),
     ("I am a very small model, and I tell little stories. What should the next one be about?",
      "I tell little stories. Ask me for one!")),
    (("What is {word}?", "What is {number} plus {number}?", "What is the capital of {word}?",
      "Who was {word}?", "How do I {word}?", "Explain {word} to me.", "Why is the {word} {word}?",
      "Write a {word} in {word}.", "Do you like {word}?", "Translate {word}."),
     ("I do not know that. I only tell little stories. Would you like to hear one?",)),
)  # fmt: skip
THANKS: tuple[Row, Row] = (
    ("Thank you!", "Thanks!", "That was nice.", "I liked it.", "Good night!"),
    ("You are welcome! Would you like to hear one more?", "I am glad that you liked it!"),
)
MORE: Row = ("Another one, please.", "Tell me one more story.", "One more!", "Another story!")


def all_texts() -> Iterator[str]:
    """Yield every text a story can be made of."""
    yield from (word for names in NAMES.values() for word in names)
    yield from SPECIES + RARE_SPECIES + TRAITS + CHILD_TRAITS + COLOURS
    yield from (f"{place.preposition} {place.name}" for place in PLACES)
    yield from (text for row in EXTRAS.values() for text in row)
    for row in (OPENINGS, CHILD_OPENINGS, THING_OPENINGS, DETAILS, THING_INTRODUCTIONS, LAST_WORDS):
        yield from row
    for plot in PLOTS.values():
        for row in (*plot.problem, *plot.solution, plot.ends, plot.things):
            yield from row
    yield from ("a an he him his she her girl boy",)
