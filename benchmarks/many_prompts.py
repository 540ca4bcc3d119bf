"""A thousand and more prompts of our own in twelve domains: python benchmarks/many_prompts.py OUT.jsonl [--help]

Templates with varied content, all written for this file; the same file every time.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from orthrus.base.outputs import write_text_atomic

PER_DOMAIN = 84
NAMES = ("Ada", "Bruno", "Chidi", "Dalia", "Emre", "Farah", "Goran", "Hana", "Idris", "Jun", "Kaia", "Luca")
PLACES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Kyoto", "Tallinn", "Perth", "Galway", "Izmir", "Leipzig")
THINGS = (
    "apples",
    "notebooks",
    "candles",
    "bricks",
    "tickets",
    "bottles",
    "stamps",
    "chairs",
    "lamps",
    "seeds",
)
TOPICS = (
    "why leaves change colour in autumn",
    "how a bicycle stays upright",
    "what a central bank does",
    "how bread rises",
    "why the sea is salty",
    "how vaccines train the body",
    "what makes a good map",
    "how a lock on a canal works",
    "why cats purr",
    "how a violin makes sound",
    "what causes tides",
    "how glass is made",
    "why we dream",
    "how a compass works",
    "what soil is made of",
)
MOODS = ("hopeful", "wistful", "playful", "solemn", "angry", "calm", "curious")
SUBJECTS = (
    "a lighthouse keeper",
    "an empty railway station",
    "the first snow",
    "a broken clock",
    "two rival bakers",
    "a river that forgot its name",
    "an old fisherman",
    "a robot who gardens",
    "a city at dawn",
    "a lost glove",
    "a violin in an attic",
    "a comet",
    "a storm at sea",
    "a library at night",
    "a letter never sent",
)
FUNCTIONS = (
    ("count_vowels", "takes a string and returns how many vowels it has"),
    ("merge_sorted", "merges two sorted lists into one sorted list"),
    ("is_palindrome", "tells whether a string reads the same backwards, ignoring case and spaces"),
    ("running_mean", "returns the mean of the last k numbers at each place of a list"),
    ("flatten", "flattens a list that holds lists to any depth"),
    ("word_frequencies", "returns a dictionary from each word of a text to how often it occurs"),
    ("roman", "converts a positive whole number to Roman numerals"),
    ("transpose", "transposes a matrix that is given as a list of lists"),
    ("primes_below", "returns all prime numbers below n"),
    ("group_by_length", "groups words by their length"),
    ("parse_duration", "turns a text such as '2h 5m' into seconds"),
    ("rotate", "rotates a list by k places to the right"),
)
TASKS = (
    "Write a Python function `{name}` that {what}.",
    "In JavaScript, write a function `{name}` that {what}.",
    "Write `{name}` in Python, which {what}, and three assertions that test it.",
    "Explain step by step how you would write a function that {what}, then write it in Python.",
    "Write a function `{name}` in Go that {what}. Handle empty input.",
    "Here is a signature: `def {name}(value):`. Complete it so that it {what}. Add a docstring.",
    "Write `{name}` in Rust, which {what}.",
)
FACTS = (
    "The bridge over the {river} was opened in {year}. It is {length} metres long and was built by {people} workers.",
    "The museum of {place} keeps {people} paintings. It moved to its present house in {year}, after a fire.",
    "In {year} the harbour of {place} handled {people} ships, more than in any year before the war.",
    "{name} founded a small press in {place} in {year}. It printed {people} copies of its first book.",
    "The railway near {place} is {length} km long. It has run since {year} and carries {people} people a day.",
    "A school in {place} planted {people} trees in {year}. {name}, who led the work, says that most have survived.",
)
SENTENCES = (
    "The ferry to the island leaves at {hour} from the old pier.",
    "My sister has bought a house near {place}.",
    "We could not find the keys, although {name} had left them on the table.",
    "It has rained for {num} days in {place}.",
    "{name} would like to change the appointment to {hour}.",
    "The soup needs more salt and a little lemon.",
    "Nobody knew why the {thing} had disappeared.",
    "Please send the {thing} to our office in {place}.",
    "If the train is late again, we will take the bus at {hour}.",
    "The {thing} cost {num} euros last year.",
)
LANGUAGES = ("French", "Spanish", "German", "Italian", "Portuguese", "Dutch", "Swedish")
WRONG = (
    "{name} don't has no {thing} left.",
    "Yesterday we goes to {place} and buyed {num} {thing}.",
    "The {thing} is more cheaper then they was before.",
    "Me and {name} was waiting since {num} hours in {place}.",
    "Each of the {thing} have there own box, isn't it?",
    "She said me that the train arrive at {hour} to {place}.",
    "I am knowing {name} since {num} years, he live in {place}.",
    "Less {thing} was sold, because of the price were high.",
)
OPENINGS = (
    "I would like to learn a new language this year.",
    "I am planning a weekend in {place}.",
    "My tomato plants have yellow leaves.",
    "I have {num} people coming for dinner and little time.",
    "I want to start running, but I get bored.",
    "My old bicycle makes a noise when I pedal.",
    "I have to give a short talk about {topic}.",
)
ANSWERS = (
    "Good. What have you tried so far?",
    "I can help with that. How much time do you have?",
    "Sure. Is there anything that I should know first?",
    "Let us begin with what matters most to you.",
)
FOLLOWING = (
    "About an hour a day. What should I do first?",
    "Nothing yet. Give me three ideas and say which is best.",
    "I have little money. Make a plan for one week.",
    "Please explain it as you would to a child.",
    "What would you do in my place, and why?",
    "Summarise your advice in two sentences.",
)


def filled(rng: random.Random, template: str) -> str:
    """The template with its blanks filled."""
    return template.format(
        name=rng.choice(NAMES),
        other=rng.choice(NAMES),
        place=rng.choice(PLACES),
        thing=rng.choice(THINGS),
        topic=rng.choice(TOPICS),
        num=rng.randint(3, 97),
        more=rng.randint(2, 19),
        year=rng.randint(1840, 2015),
        length=rng.randint(40, 980),
        people=rng.randint(100, 9000),
        hour=f"{rng.randint(6, 21)}:{rng.choice((10, 25, 40))}",
        river=rng.choice(("Arno", "Elbe", "Tagus", "Vistula", "Severn")),
    )


def paragraph(rng: random.Random, num: int = 4) -> str:
    """Some sentences that state facts, all made up."""
    return " ".join(filled(rng, fact) for fact in rng.sample(FACTS, num))


def _math(rng: random.Random) -> str:
    return filled(
        rng,
        rng.choice(
            (
                "{name} has {num} {thing} and gives {more} to {other}. How many are left, and what share?",
                "A shop sells {thing} at {more} euros each. {name} buys {num} and gets 10 % off. What is the price?",
                "A train goes {length} km in {more} hours. How fast is it, and how far does it go in {num} minutes?",
                "What is {num} times {length} minus {year}? Show each step.",
                "{name} reads {more} pages a day of a book of {length} pages. After how many days is it finished?",
                "A rectangle is {num} cm long and {more} cm wide. Find its area, its perimeter and its diagonal.",
                "Solve for x: {more}x + {num} = {length}. Check your answer.",
            )
        ),
    )


def _code(rng: random.Random) -> str:
    name, what = rng.choice(FUNCTIONS)
    return rng.choice(TASKS).format(name=name, what=what)


def _chat(rng: random.Random) -> str:
    return filled(
        rng,
        rng.choice(
            (
                "Can you explain {topic}?",
                "I am new in {place}. What should I see in {more} days?",
                "Why do people disagree about {topic}? Keep it short.",
                "Give {name} some advice before a job interview in {place}.",
                "What should I know before I buy {num} {thing}?",
                "Tell me three surprising things about {topic}.",
                "How do I tell {name} kindly that I cannot come at {hour}?",
            )
        ),
    )


def _creative(rng: random.Random) -> str:
    subject, mood = rng.choice(SUBJECTS), rng.choice(MOODS)
    return filled(
        rng,
        rng.choice(
            (
                f"Write a {mood} short story about {subject}, set in {{place}}.",
                f"Write the opening paragraph of a {mood} novel about {subject} and {{name}}.",
                f"Describe {subject} through the eyes of {{name}}, in a {mood} voice.",
                f"Write a {mood} dialogue between {{name}} and {{other}} about {subject}.",
            )
        ),
    )


def _poetry(rng: random.Random) -> str:
    subject, mood = rng.choice(SUBJECTS), rng.choice(MOODS)
    return rng.choice(
        (
            f"Write a {mood} poem of {rng.choice((8, 12, 16))} lines about {subject}.",
            f"Write three {mood} haiku about {subject}.",
            f"Write a {mood} sonnet about {subject}.",
            f"Write a {mood} limerick about {subject}.",
            f"Write a {mood} ballad in rhyming couplets about {subject}.",
        )
    )


def _summary(rng: random.Random) -> str:
    ask = rng.choice(
        ("Summarise in one sentence", "Summarise in two sentences", "Give the main points as a list")
    )
    return f"{ask}:\n\n{paragraph(rng, 5)}"


def _translation(rng: random.Random) -> str:
    lines = " ".join(filled(rng, line) for line in rng.sample(SENTENCES, 2))
    return f"Translate into {rng.choice(LANGUAGES)}: {lines}"


def _json(rng: random.Random) -> str:
    return filled(
        rng,
        rng.choice(
            (
                "Return JSON with the keys name, city and age for {name}, who is {num} and lives in {place}.",
                "Make a JSON array of {more} {thing}, each an object with an id, a colour and a price.",
                'Turn this into JSON: "{name} ordered {num} {thing} on 3 May {year}, to be sent to {place}".',
                "Write a JSON schema for an order of {thing} with at most {num} items and a delivery address.",
                "Return JSON with the keys from, to, departure and price: {place} to Oslo at {hour} for {num} euros.",
            )
        ),
    )


def _grammar(rng: random.Random) -> str:
    lines = " ".join(filled(rng, line) for line in rng.sample(WRONG, 2))
    return f"Correct the grammar and keep the meaning: {lines}"


def _question(rng: random.Random) -> str:
    question = rng.choice(
        (
            "Which years are named?",
            "Who or what is the largest number about?",
            "What happened first, and what last?",
            "Which places are named, and why?",
        )
    )
    return f"Read the text and answer. {question}\n\n{paragraph(rng, 3)}"


def _extraction(rng: random.Random) -> str:
    what = rng.choice(
        (
            "all numbers with what they count",
            "all places",
            "all years, in order",
            "all people and what they did",
        )
    )
    return f"List {what}:\n\n{paragraph(rng, 4)}"


def _dialogue(rng: random.Random) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": filled(rng, rng.choice(OPENINGS))},
        {"role": "assistant", "content": rng.choice(ANSWERS)},
        {"role": "user", "content": rng.choice(FOLLOWING)},
    ]


DOMAINS: dict[str, Callable[[random.Random], Any]] = {
    "math": _math,
    "code": _code,
    "chat": _chat,
    "creative": _creative,
    "poetry": _poetry,
    "summary": _summary,
    "translation": _translation,
    "json": _json,
    "grammar": _grammar,
    "question": _question,
    "extraction": _extraction,
    "multi-turn": _dialogue,
}


def records(per_domain: int = PER_DOMAIN) -> Iterator[dict[str, Any]]:
    """Records as `read_prompt_file` takes them: `domain` and `prompt` or `messages`; no prompt comes twice.

    Domains take turns, so that the first n records hold all of them evenly.
    """
    sources = {domain: random.Random(f"orthrus {domain}") for domain in DOMAINS}
    seen: set[str] = set()
    for _ in range(per_domain):
        for domain, make in DOMAINS.items():
            while (key := json.dumps(prompt := make(sources[domain]))) in seen:
                pass
            seen.add(key)
            yield {"domain": domain, "messages" if isinstance(prompt, list) else "prompt": prompt}


def main(
    output: Annotated[Path, typer.Argument(help="JSONL file to write.")],
    per_domain: Annotated[int, typer.Option(min=1, max=84, help="Prompts of each domain.")] = PER_DOMAIN,
) -> None:
    """Write the prompts."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records(per_domain)]
    write_text_atomic(output, "\n".join(lines) + "\n")
    typer.echo(f"{len(lines)} prompts in {len(DOMAINS)} domains")


if __name__ == "__main__":
    typer.run(main)
