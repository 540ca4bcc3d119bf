"""Prompts that the model itself writes, sampled from the chat template's open user turn. They need no data set."""

from collections.abc import Iterator

from orthrus.base.loading import Base
from orthrus.base.prompt import template_text
from orthrus.config import SamplingParams
from orthrus.decoding.noise import choice_seed
from orthrus.errors import UserInputError
from orthrus.training.answers import Answerer, Question

# Beginnings of user turns by domain. After an empty one, the model chooses the subject. None ends with a space, because
# most tokenizers join a space with the next word, and a lone space is seldom followed by a word.
OPENINGS: dict[str, tuple[str, ...]] = {
    "math": (
        "A shop sells", "If a train", "What is the", "Solve the equation", "Find the value of",
        "There are", "A farmer has", "Calculate the", "How many",
    ),
    "code": (
        "Write a Python function that", "Write a solution to the following problem:\n```python\ndef",
        "Write a Python program to", "Complete the following Python function:\n```python\ndef",
        "Write a Python function to", "Fix the bug in this code:\n```python\n", "Write a function to",
        "Implement a class", "Write a solution to the following problem and make sure that it passes the "
        "tests:\n```python\nfrom typing import List\n\n\ndef",
    ),
    "chat": ("", "How do I", "What are the", "Explain", "Can you", "Why", "Give me"),
    "writing": (
        "Write a", "Write a short story about", "Write an email", "Compose", "Draft a", "Describe",
    ),
    "summary": ("Summarize the following text:", "Summarize:", "Rewrite the following paragraph:"),
    "translation": (
        "Translate German to English:", "Translate to French:", "Translate this sentence into Spanish:",
        "Translate English to German:", "Translate the following text from French to English:",
    ),
    "questions": (
        "Who was", "Where is", "When did", "What is the name of", "Which", "Who wrote", "What year did",
    ),
    "reading": (
        "Read the passage and answer the question.\n\nPassage:", "Context:", "Answer the question from the text.\n\n",
        "Extract all names and dates from this text:",
    ),
}  # fmt: skip
_MARK = "\u241f"


def open_user_turn(base: Base) -> str:
    """The chat template up to the user's own words.

    Raises UserInputError for a base without a chat template, and for a template that fails or changes those words.
    """
    if not getattr(base.tokenizer, "chat_template", None):
        raise UserInputError(
            f"{base.name} has no chat template, so it cannot make its own prompts; give files of prompts instead "
            "(--prompts)."
        )
    message = {"role": "user", "content": _MARK}
    head, found, _ = template_text(base.tokenizer, [message], add_generation_prompt=False).partition(_MARK)
    if not found:
        raise UserInputError(
            f"the chat template of {base.name} does not keep what was said, so it cannot make its own prompts; give "
            "files of prompts instead (--prompts)."
        )
    return head


def self_prompts(
    base: Base,
    answerer: Answerer,
    counts: dict[str, int],
    *,
    seed: int,
    max_tokens: int = 240,
    min_words: int = 4,
) -> Iterator[tuple[str, str]]:
    """Yield (text, domain) from `counts[domain]` attempts. Cut, short and repetitive texts are dropped."""
    head = open_user_turn(base)
    jobs: list[tuple[str, str]] = []
    for domain, count in counts.items():
        openings = OPENINGS.get(domain, ("",))
        jobs += [(domain, openings[i % len(openings)]) for i in range(count)]
    questions = [
        Question(
            i,
            # Encoded in one piece, without a trailing space, which the model writes itself.
            list(base.tokenizer((head + opening).rstrip(" "), add_special_tokens=False)["input_ids"]),
            SamplingParams(temperature=1.0, top_p=0.95, seed=choice_seed(seed, i)),
        )
        for i, (_, opening) in enumerate(jobs)
    ]
    for answer in sorted(answerer(questions, max_new_tokens=max_tokens)):
        domain, opening = jobs[answer.key]
        # In one piece: some tokenizers take the space off the first word that they decode.
        ids = [*base.tokenizer(opening, add_special_tokens=False)["input_ids"], *answer.token_ids]
        text = str(base.tokenizer.decode(ids, skip_special_tokens=True))
        if answer.finished and len(text.split()) >= min_words and not is_repetitive(answer.token_ids):
            yield text.strip(), domain


def is_repetitive(token_ids: list[int], n: int = 4, least_distinct: float = 0.5) -> bool:
    """Whether fewer than half of the n-grams differ, as in a text that repeats itself."""
    grams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return len(grams) >= 8 and len(set(grams)) < least_distinct * len(grams)
