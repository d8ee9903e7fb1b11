"""The plots of the story grammar; `story_tables` explains the names in braces."""

from dataclasses import dataclass

Row = tuple[str, ...]


@dataclass(frozen=True)
class Plot:
    """What happens: one sentence is drawn from each row of `problem` and `solution`."""

    moral: str
    problem: tuple[Row, ...]
    solution: tuple[Row, ...]
    ends: Row
    things: Row = ()


_THING_NAMES = (
    "ball", "kite", "book", "drum", "hat", "bell", "boat", "cup", "lamp", "key",
    "blanket", "toy", "flute", "ring", "doll", "spoon", "box", "coat", "stone",
    "basket", "mirror", "ladder", "pencil", "button",
)  # fmt: skip
_BREAKABLE = ("boat", "kite", "drum", "clock", "cup", "lamp", "flute", "toy", "wagon")
_LIGHT = ("kite", "hat", "balloon", "scarf", "feather", "map")

_MEETS_FRIEND: Row = (
    "Just then, {a_fspecies} named {friend} came by.",
    "Then {hero} met {a_fspecies} named {friend}.",
    "{A_fspecies} named {friend} heard {him} and came to help.",
    "Soon {a_fspecies} came along. {fHis} name was {friend}.",
)
_ASKS: Row = (
    '"What is wrong?" asked {friend}.',
    '"Why are you sad?" asked {friend}.',
    '"Can I help you?" asked {friend}.',
    '"Oh dear, what happened?" said {friend}.',
)
_THANKS_FRIEND: Row = (
    '"Thank you, {friend}!" said {hero}.',
    '"You are a good friend, {friend}," said {hero}.',
    '{hero} gave {friend} a big hug and said, "Thank you!"',
    '"I could not have done it without you," {hero} told {friend}.',
)
_FRIENDS_END: Row = (
    "From that day on, {hero} and {friend} were best friends.",
    "{hero} and {friend} ate {food} together and laughed until the sun went down.",
    "After that, {hero} and {friend} played together {at} every day.",
    "{hero} was happy, because now {he} had a good friend.",
)

PLOTS: dict[str, Plot] = {
    "lost": Plot(
        moral="helping a friend",
        things=_THING_NAMES,
        problem=(
            ("{when}, {hero} could not find the {noun}.", "{when}, the {noun} was gone.",
             "But {when_low}, {hero} lost the {noun} {at}."),
            ("{He} looked in the house, but it was not there.",
             "{He} looked everywhere, but {he} could not see it.",
             "{He} looked high and low, but the {noun} was not there."),
            ("{hero} sat down and began to cry.", "{hero} felt very sad.",
             '"Where is my {noun}?" {he} cried.'),
        ),
        solution=(
            _MEETS_FRIEND, _ASKS,
            ('"I lost my {thing}," said {hero}.', '"My {thing} is gone," {hero} said.'),
            ('"Do not cry. I will help you look," said {friend}.',
             '"Then let us look for it together," said {friend}.'),
            ("They looked and looked, and at last {friend} found the {noun} {spot}.",
             "Together they went back, and there was the {noun}, {spot}.",
             "After a long time {hero} saw something {spot}. It was the {noun}!"),
            _THANKS_FRIEND,
        ),
        ends=_FRIENDS_END,
    ),
    "broken": Plot(
        moral="fixing things",
        things=_BREAKABLE,
        problem=(
            ("{when}, {hero} fell down, and the {noun} broke.",
             "{when}, the {noun} fell on a stone and broke.",
             "{when}, {hero} ran too fast and dropped the {noun}. It broke!"),
            ("{He} tried to fix it, but it was too hard.",
             "{He} did not know how to fix it.",
             "{He} picked up the pieces and began to cry."),
        ),
        solution=(
            _MEETS_FRIEND, _ASKS,
            ('"My {thing} is broken," said {hero}.', '"I broke my {thing}," {hero} said.'),
            ('"I can fix it," said {friend}. "I only need some glue."',
             '"Do not worry. We can fix it together," said {friend}.',
             '"I have some string. Let us try," said {friend}.'),
            ("They worked all day, and soon the {noun} was as good as new.",
             "{friend} worked with great care, and the {noun} was whole again.",
             "In the evening the {noun} looked even better than before."),
            _THANKS_FRIEND,
        ),
        ends=("{hero} learned that broken things can be fixed with the help of a friend.",
              *_FRIENDS_END),
    ),
    "wind": Plot(
        moral="the wind",
        things=_LIGHT,
        problem=(
            ("{when}, a strong wind took the {noun} away.",
             "{when}, the wind blew and the {noun} flew up into the sky.",
             "{when}, the wind pulled the {noun} out of the hands of {hero}."),
            ("The {noun} landed at the top of a tall tree.",
             "It flew over the hill and got stuck in a tall tree.",
             "It landed on a high roof."),
            ("{hero} jumped and jumped, but {he} could not reach it.",
             '"It is too high for me," {hero} said, and {he} felt sad.'),
        ),
        solution=(
            _MEETS_FRIEND,
            ('"Can you help me get my {noun}?" asked {hero}.',
             '"My {thing} is up there," said {hero}.'),
            ('"Yes! I will climb up," said {friend}.',
             '"Stand on my back," said {friend}.',
             '"I have a long ladder," said {friend}.'),
            ("Slowly and with care, they got the {noun} back.",
             "Up and up they went, and then they had the {noun}.",
             "It was not easy, but soon {hero} held the {noun} again."),
            _THANKS_FRIEND,
        ),
        ends=("{hero} held the {noun} tight all the way home.", *_FRIENDS_END),
    ),
    "share": Plot(
        moral="sharing",
        things=_THING_NAMES,
        problem=(
            ("{when}, {a_fspecies} named {friend} came to play.",
             "{when}, {hero} met {a_fspecies} named {friend}."),
            ('"May I play with your {noun}?" asked {friend}.',
             '"What a nice {noun}! Can I hold it?" asked {friend}.'),
            ('"No! It is mine," said {hero}.', '"No, I do not want to share," said {hero}.'),
            ("{friend} was sad and walked away.", "{friend} looked down and went home."),
        ),
        solution=(
            ("{hero} played alone with the {noun}, but it was no fun.",
             "Now {hero} was alone, and the {noun} was not fun anymore."),
            ("{He} thought about {friend} and felt sorry.",
             '"I was not kind," {he} thought.'),
            ("So {hero} ran after {friend}.", "{hero} went to find {friend}."),
            ('"I am sorry," {hero} said. "Let us play with the {noun} together."',
             '"I am sorry," said {hero}. "You can have the first turn."'),
            ("{friend} smiled, and they took turns all day.",
             "{friend} was so happy that {fhe} jumped up and down."),
        ),
        ends=("{hero} learned that it is more fun to share.",
              "From that day on, {hero} and {friend} shared everything.", *_FRIENDS_END),
    ),
    "gift": Plot(
        moral="a gift",
        things=_THING_NAMES,
        problem=(
            ("{when}, {hero} saw {a_fspecies} who looked very sad.",
             "{when}, {a_fspecies} sat alone {at}, crying."),
            ('"What is your name?" asked {hero}. "I am {friend}," said the {fspecies}.',
             '"Who are you?" asked {hero}. "My name is {friend}," said the {fspecies}.'),
            ('"Today is my birthday, but nobody came," said {friend}.',
             '"I have no toys and no friends," said {friend}.'),
        ),
        solution=(
            ("{hero} thought for a while.", "{hero} wanted to help, so {he} had an idea."),
            ("{He} ran home and came back with the {thing}.",
             "{He} put the {noun} in a box and tied it with a ribbon."),
            ('"This is for you," said {hero}, and {he} gave {friend} the {noun}.',
             '"Here is a present for you," {hero} said to {friend}.'),
            ('"For me? Thank you, {hero}!" said {friend}, and {fhis} eyes were shining.',
             "{friend} could not believe it. {fHe} laughed and danced with the {noun}."),
        ),
        ends=("{hero} learned that giving makes the heart warm.", *_FRIENDS_END),
    ),
    "stuck": Plot(
        moral="being helpful",
        problem=(
            ("{when}, {hero} heard a small voice.", "{when}, {hero} heard someone call for help."),
            ('"Help! I am stuck," it called.', '"Please help me!" cried the voice.'),
            ("It was {a_fspecies} named {friend}, stuck in a deep hole.",
             "High in a tree sat {a_fspecies} named {friend} who could not get down.",
             "{A_fspecies} named {friend} was stuck in the mud."),
        ),
        solution=(
            ('"Do not be afraid, {friend}. I will help you," said {hero}.',
             '"Wait, {friend}! I am coming," called {hero}.'),
            ("{hero} ran and got a long rope.", "{hero} found a strong branch.",
             "{hero} thought hard, and then {he} had an idea."),
            ("{He} pulled and pulled, but nothing happened.",
             "It was hard, and {he} was tired, but {he} did not stop."),
            ("{He} tried one more time, and pop! {friend} was free.",
             "At last {friend} was safe."),
            ('"You saved me, {hero}! Thank you," said {friend}.',
             '"Thank you, {hero}! You are so brave," said {friend}.'),
        ),
        ends=_FRIENDS_END,
    ),
    "way": Plot(
        moral="finding the way home",
        problem=(
            ("{when}, {hero} walked too far from home.",
             "{when}, {hero} followed a butterfly and did not look where {he} went."),
            ("Soon {he} did not know where {he} was.", "The path was gone, and it grew dark."),
            ('"I am lost," {he} said, and {he} was afraid.', "{hero} was cold and tired."),
        ),
        solution=(
            _MEETS_FRIEND, _ASKS,
            ('"I cannot find my way home," said {hero}.', '"I am lost," {hero} said.'),
            ('"I know the way. Come with me," said {friend}.',
             '"Follow the stars," said {friend}. "I will show you."'),
            ("They walked side by side and sang a song.",
             "{friend} went first, and {hero} stayed close."),
            ("Soon {hero} saw the lights of {his} home.",
             "At last they stood at the door of {home}."),
            _THANKS_FRIEND,
        ),
        ends=_FRIENDS_END,
    ),
    "fear": Plot(
        moral="being brave",
        problem=(
            ("But {hero} was afraid of {fear}.",
             "There was one problem. {hero} was afraid of {fear}."),
            ('"I wish I were brave," {he} thought.', "{He} hid under {his} blanket every night."),
            ("{when}, {his} friend {friend}, {a_fspecies}, called for help.",
             "{when}, {his} friend {friend}, {a_fspecies}, did not come home."),
        ),
        solution=(
            ("{hero} was afraid, but {he} wanted to help {friend}.",
             '"{friend} needs me," said {hero}.'),
            ("{He} took a deep breath and went outside.",
             "{He} took a small lamp and walked, step by step."),
            ("There was {friend}, {spot}.",
             "{He} called and called, and then {he} saw {friend} {spot}."),
            ('"You came to find me!" said {friend}.',
             '"You are not afraid anymore!" said {friend}.'),
            ("Hand in hand they walked home.", "Together they laughed, and the fear was gone."),
        ),
        ends=("{hero} learned that {he} was brave after all.",
              "From that day on, {hero} was not afraid of {fear}.", *_FRIENDS_END),
    ),
    "learn": Plot(
        moral="not giving up",
        problem=(
            ("{hero} had a dream. {He} wanted to learn to {trick}.",
             "More than anything, {hero} wanted to {trick}."),
            ("{when}, {he} tried to {trick}, but it went wrong.",
             "{when}, {he} tried and tried, but {he} could not do it."),
            ('"I will never learn it," {he} said.', "{hero} was sad and wanted to give up."),
        ),
        solution=(
            _MEETS_FRIEND,
            ('"I can teach you," said {friend}.', '"You must not give up," said {friend}.',
             '"I could not {trick} at first," said {friend}. "Try again!"'),
            ("So every day they practiced together.", "{hero} tried again, a little every day."),
            ("And one morning, {hero} could {trick}!",
             "It took a long time, but then {hero} could do it."),
            ('"Look at me!" {he} shouted, and {friend} clapped.',
             '"I knew you could do it," said {friend}.'),
        ),
        ends=("{hero} learned that you should never give up.", *_FRIENDS_END),
    ),
    "lonely": Plot(
        moral="friendship",
        problem=(
            ("But {hero} was lonely.", "But {hero} had nobody to play with."),
            ('"I wish I had a friend," {he} said to the moon.',
             "{He} asked the birds to play, but they flew away."),
            ("{when}, {he} went out to find a friend.", "{when}, {he} heard someone sing {spot}."),
        ),
        solution=(
            ("There {he} saw {a_fspecies}.", "Behind the trees stood {a_fspecies}."),
            ('"Hello! I am {hero}. What is your name?" asked {hero}.',
             '"Hello, my name is {hero}. Who are you?" {he} asked.'),
            ('"I am {friend}," said the {fspecies}. "Do you want to play?"',
             '"My name is {friend}," said the {fspecies}. "I am looking for a friend too."'),
            ("They ran and jumped and played all day.", "They shared some {food} and told stories.",
             "They played by the water until it was dark."),
        ),
        ends=_FRIENDS_END,
    ),
    "hungry": Plot(
        moral="being kind",
        problem=(
            ("{when}, {hero} had a big bowl of {food}.",
             "{when}, {hero} had only a small bowl of {food}."),
            ("On the road {he} met {a_fspecies} named {friend}.",
             "{A_fspecies} named {friend} knocked at the door."),
            ('"I am so hungry," said {friend}.',
             '"Please, I have not eaten all day," said {friend}.'),
        ),
        solution=(
            ("{hero} was hungry too, but {he} was kind.",
             "{hero} looked at the {food} and smiled."),
            ('"Come and eat with me," {he} said.', '"Take half of my {food}," {he} said.'),
            ("{friend} ate and ate, and soon {fhe} felt better.",
             "They sat down and ate the {food} together."),
            ("The next day, {friend} came back with a big cake for {hero}.",
             "In the winter, when {hero} had nothing to eat, {friend} brought {him} warm soup."),
            ('"You were kind to me, so I want to be kind to you," said {friend}.',
             '"Friends help each other," said {friend}.'),
        ),
        ends=("{hero} learned that kindness always comes back.", *_FRIENDS_END),
    ),
}  # fmt: skip
