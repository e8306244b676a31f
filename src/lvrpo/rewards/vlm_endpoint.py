"""VLM-as-judge reward: a chat model behind an OpenAI-compatible endpoint judges images or texts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from lvrpo.config import Config
from lvrpo.policies.base import Judge
from lvrpo.rewards.base import Failures, SampleIndex, Scores, image_problem, join_judges
from lvrpo.rewards.endpoint import ChatEndpoint, EndpointConfig, NoAnswer
from lvrpo.rewards.questions import MOST_WORDS, RENAMED_OPTIONS, QuestionConfig, QuestionGenerator
from lvrpo.rewards.verifiable_text import normalize_answer, text_problem
from lvrpo.types import Fact, Group, Image, OutputKind, Parts, Prompt, Trajectory

Ask = Literal["questions", "yes_no", "rating"]

TEMPLATES: Mapping[Ask, str] = {
    "questions": "{question} Answer with yes, no, a number, or one or two words, and nothing else.",
    "yes_no": "Does this picture show exactly what was asked for: {prompt}? Answer yes or no.",
    "rating": "From 0 (nothing of it) to 10 (everything, and well drawn): how well does this picture show what was "
    "asked for: {prompt}? Answer with the number alone.",
}
FIELDS: Mapping[Ask, str] = {"questions": "question", "yes_no": "prompt", "rating": "prompt"}


class VLMEndpoint(Config):
    """Answers of a model that is no part of the policy. Range [0, 1].

    An edit is shown with its source first (but for questions, which are about the result).

    What cannot be read as an answer, an answer that is empty or was cut off, and a request that failed after all its
    tries are masked with the reason (``rewards.endpoint``). One question without an answer masks the output.
    """

    sides: ClassVar = ()
    hints: ClassVar = RENAMED_OPTIONS

    endpoint: EndpointConfig
    """The model that judges."""
    ask: Ask = "questions"
    """questions: share of the prompt's facts whose question it answers rightly from the image alone (what counts as
    an answer: ``rewards.vlm_endpoint``). yes_no: 1 for yes, 0 for no. rating: a number from 0 to 10, divided by
    10."""
    template: str | None = None
    """The request after the image: with {question}, or with {prompt}; one that also holds {answer} makes it a judge
    of texts, shown the images of the prompt. None: that of TEMPLATES."""
    questions: QuestionConfig | None = None
    """Makes questions of free text (see ``self_vqa``); what should stay of an edit is kept where this model says so of
    the source."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        field = FIELDS[self.ask]
        if f"{{{field}}}" not in self._template:
            raise ValueError(f"template={self._template!r}: must hold {{{field}}} for ask={self.ask}")
        if self.questions is not None and self.ask != "questions":
            raise ValueError(f"questions: has no effect with ask={self.ask}: leave it out, or ask questions")
        if self._of_text and self.ask == "questions":
            raise ValueError("template: {answer} goes with ask=yes_no or ask=rating")
        return self

    @property
    def judges(self) -> tuple[OutputKind, ...]:
        return ("text",) if self._of_text else ("image",)

    @property
    def waits(self) -> bool:
        return self.questions is None or self.questions.by != "policy"

    @cached_property
    def judged_by(self) -> str:
        return join_judges(self._client.identity, self._generator)

    @property
    def _template(self) -> str:
        return TEMPLATES[self.ask] if self.template is None else self.template

    @property
    def _of_text(self) -> bool:
        return "{answer}" in self._template

    @cached_property
    def _client(self) -> ChatEndpoint:
        return ChatEndpoint(self.endpoint)

    @cached_property
    def _generator(self) -> QuestionGenerator | None:
        return None if self.questions is None else QuestionGenerator(self.questions)

    def applies(self, prompt: Prompt) -> bool:
        if self._of_text:
            return prompt.output == ("text",) and bool(prompt.text)
        if "image" not in prompt.output:
            return False
        if self.ask != "questions":
            return bool(prompt.text)
        return bool(prompt.facts) or (self._generator is not None and self._generator.applies(prompt))

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        missing: dict[int, str] = {}
        if self._generator is not None:
            groups, missing = self._generator.with_questions(groups, judge, self._confirm)
        failures: Failures = {}
        asked: list[tuple[SampleIndex, Parts, str]] = []
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories):
                problem = missing.get(p) or self._problem(trajectory)
                if problem:
                    failures[p, g] = problem
                else:
                    asked += [((p, g), *request) for request in self._requests(trajectory)]
        found, unanswered = ask_endpoint(self._client, asked, self.read)
        means = {cell: sum(terms) / len(terms) for cell, terms in found.items()}
        return Scores.of(groups, means, failures | unanswered)

    def read(self, answer: str, wanted: str = "") -> float | NoAnswer:
        """The number that an answer stands for; ``wanted``: the right one of a question."""
        if self.ask == "rating":
            return rating(answer)
        if self.ask == "yes_no":
            return yes_or_no(answer, "yes")
        return read_answer(answer, wanted)

    def _confirm(self, pairs: Sequence[tuple[Image, Fact]]) -> list[float | NoAnswer]:
        """1 where its answer about an image is that of the fact, 0 where it is another."""
        answers = self._client.ask([self._question(image, fact) for image, fact in pairs])
        rows = zip(pairs, answers, strict=True)
        return [a if isinstance(a, NoAnswer) else self.read(a, fact.answer) for (_, fact), a in rows]

    def _question(self, image: Image, fact: Fact) -> Parts:
        return (image, self._template.replace("{question}", fact.question))

    def _problem(self, trajectory: Trajectory) -> str | None:
        if self._of_text:
            return text_problem(trajectory)
        return image_problem(trajectory)

    def _requests(self, trajectory: Trajectory) -> list[tuple[Parts, str]]:
        prompt = trajectory.prompt
        if self._of_text:
            texts = {"{prompt}": prompt.text, "{answer}": trajectory.text or ""}
            words = re.sub("{prompt}|{answer}", lambda name: texts[name[0]], self._template)  # not in the texts too
            return [((*prompt.images, words), "")]
        assert trajectory.image is not None
        if self.ask == "questions":
            return [(self._question(trajectory.image, fact), fact.answer) for fact in prompt.facts]
        return [((*prompt.images, trajectory.image, self._template.replace("{prompt}", prompt.text)), "")]


def ask_endpoint(
    client: ChatEndpoint, asked: Sequence[tuple[SampleIndex, Parts, str]], read: Callable[[str, str], float | NoAnswer]
) -> tuple[dict[SampleIndex, list[float]], Failures]:
    """The numbers that ``read`` makes of the answers about each output, given the request and the right answer of each;
    an output with a question that has no answer has the reason instead."""
    found: dict[SampleIndex, list[float]] = {}
    failures: Failures = {}
    answers = client.ask([parts for _, parts, _ in asked])
    for (cell, _, wanted), answer in zip(asked, answers, strict=True):
        value = answer if isinstance(answer, NoAnswer) else read(answer, wanted)
        if isinstance(value, NoAnswer):
            failures.setdefault(cell, value.reason)
        else:
            found.setdefault(cell, []).append(value)
    return {cell: terms for cell, terms in found.items() if cell not in failures}, failures


# --- what an answer says ---


LONGEST = 4 * MOST_WORDS
"""Most words of a sentence with an answer in it."""

_RATING = re.compile(r"(?<![\d.\-])(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*10\b)?(?!\.?\d)")
_REFUSAL = re.compile(
    r"\b(?:as an ai|language model|sorry|apolog\w+|unable|unclear|unknown|unsure|not sure|n/a)\b"
    r"|\b(?:hard|difficult|impossible) to\b"
    r"|\b(?:can ?|ca |could |did |do )not (?:(?:be )?(?:tell|say|know|judge|determine\w*|answer\w*)\b"
    r"|(?:\w+ ){0,2}?(?:to )?(?:an?|any|that|the|this|your)? ?(?:image|picture|photo)s?\b)"
    r"|\bno (?:image|picture|photo)s?\b"
)
_GARBLED = re.compile(r"\b[b-df-hj-np-tv-xz]{4,}\b|(.)\1{3}|\b(?:qwer|wert|asdf|sdfg|dfgh|fghj|ghjk|hjkl|zxcv|xcvb)")
_DENIALS = frozenset(("cannot", "neither", "never", "no", "nor", "not", "without"))
_ARTICLES = frozenset(("a", "an", "the"))
_COLOR = re.compile(
    "beige|black|blue|brown|cyan|gold|gray|green|magenta|maroon|navy|orange|pink|purple|red|silver|teal|turquoise|"
    "violet|white|yellow"
)
_PLACE = re.compile("above|behind|below|front|left|middle|right")
_SAME = {"grey": "gray", "over": "above", "top": "above", "center": "middle", "centre": "middle"}
_SAME |= dict.fromkeys(("beneath", "bottom", "under", "underneath"), "below")


def read_answer(answer: str, wanted: str) -> float | NoAnswer:
    """1 where an answer is the wanted one, and 0 where it is another: ``yes_or_no``, or ``same_answer``."""
    return (yes_or_no if normalize_answer(wanted) in ("yes", "no") else same_answer)(answer, wanted)


def yes_or_no(answer: str, wanted: str) -> float | NoAnswer:
    """1 where an answer says yes as wanted, or no as wanted, and 0 where it says the other; it may say more.

    No answer: both words or neither, a refusal, a yes that is denied, and a long sentence in which the word does not
    stand by itself ("a table with no plates and ...").
    """
    plain = _plain(answer)
    words = re.findall(r"[a-z]+", plain)
    said = {"yes", "no"} & set(words)
    if len(said) != 1:
        return _none("both yes and no" if said else "neither yes nor no", answer)
    if _REFUSAL.search(plain):
        return _none("a refusal", answer)
    (word,) = said
    if not re.match(rf"\W*{word}\b", plain):
        if word == "yes" and _DENIALS & set(words):
            return _none("a denial", answer)
        if len(words) > MOST_WORDS and not re.search(rf"\b{word}\s*(?:[^\w\s]|$)", plain):
            return _none("neither yes nor no", answer)
    return float(word == normalize_answer(wanted))


def same_answer(answer: str, wanted: str) -> float | NoAnswer:
    """1 where an answer is the wanted one, alone or in a sentence ("The cube is red."), and 0 where it is another.

    Where a number, a color or a place is wanted, another one is another answer, and what names none or several is no
    answer. Anything else that is short counts as another answer, as not all of them are known. No answer: what is long
    and lacks the wanted one, holds a rival of it beside it, denies, refuses, or is no language.
    """
    words, want = _words(answer), _words(wanted)
    if want and words == want:
        return 1.0
    if _REFUSAL.search(_plain(answer)):
        return _none("a refusal", answer)
    if not words or set(words) <= {"yes", "no"} or set(want) <= _ARTICLES:
        return _none("no answer to compare", answer)
    if len(words) > LONGEST:
        return _none("too many words for an answer", answer)
    rest = _without(words, want)
    kind = next((name for name, named in _KINDS.items() if _all_of(named, want)), None)
    if _DENIALS & set(words if rest is None else rest) - ({"no"} if kind == "number" else set()):
        return _none("a denial", answer)
    found = _one_of_a_kind(words, want, kind) if kind else _in_free_words(words, want, rest)
    if found == 0 and len(words) > MOST_WORDS:
        return _none("too many words for an answer", answer)
    return _none(found, answer) if isinstance(found, str) else found


def _one_of_a_kind(words: Sequence[str], want: Sequence[str], kind: str) -> float | str:
    """Whether the numbers, colors or places that an answer names are the wanted ones; or why that is unknown."""
    found, wanted = _named(_KINDS[kind], words), _named(_KINDS[kind], want)
    if len(found) != len(wanted):
        return f"more than one {kind}" if found else f"no {kind}"
    return float(found == wanted)


def _in_free_words(words: Sequence[str], want: Sequence[str], rest: Sequence[str] | None) -> float | str:
    """Whether the wanted words occur, ``rest`` being the others; or why that is unknown."""
    if rest is None:
        return "no answer to compare" if _GARBLED.search(" ".join(words)) else 0.0
    rivals = [name for name, named in _KINDS.items() if (own := _named(named, want)) and _named(named, rest) - own]
    if rivals:
        return f"more than one {rivals[0]}"
    return "more than one answer" if {"and", "or"} & set(rest) else 1.0


def rating(answer: str) -> float | NoAnswer:
    """The one number from 0 to 10 in an answer, divided by 10."""
    if _REFUSAL.search(_plain(answer)):
        return _none("a refusal", answer)
    numbers = {float(match[1]) for match in _RATING.finditer(answer)}
    if len(numbers) != 1 or not 0 <= max(numbers) <= 10:
        return _none("no number from 0 to 10", answer)
    return numbers.pop() / 10


def _number(word: str) -> str | None:
    if word in ("no", "none", "nothing"):
        return "0"
    return word if re.fullmatch(r"[+-]?\d+(?:\.\d+)?", word) else None


def _color(word: str) -> str | None:
    word = _SAME.get(word, word)
    return word if _COLOR.fullmatch(word) else None


def _place(word: str) -> str | None:
    word = _SAME.get(word, word)
    return word if _PLACE.fullmatch(word) else None


_KINDS: dict[str, Callable[[str], str | None]] = {"number": _number, "color": _color, "place": _place}


def _named(named: Callable[[str], str | None], words: Iterable[str]) -> set[str]:
    return {name for word in words if (name := named(word)) is not None}


def _all_of(named: Callable[[str], str | None], words: Sequence[str]) -> bool:
    """Whether words are of one kind and nothing else."""
    return any(map(named, words)) and all(word == "and" or named(word) for word in words)


def _words(text: str) -> list[str]:
    return normalize_answer(_plain(text)).split()


def _without(words: Sequence[str], part: Sequence[str]) -> list[str] | None:
    """The words before and after a part; None where it does not occur."""
    for start in range(len(words) - len(part) + 1):
        if list(words[start : start + len(part)]) == list(part):
            return [*words[:start], *words[start + len(part) :]]
    return None


def _plain(text: str) -> str:
    """Lower case on one line, "n't" written out."""
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return re.sub(r"n['’]t\b", " not", text)


def _none(what: str, answer: str) -> NoAnswer:
    line = " ".join(answer.split())
    return NoAnswer(f"{what} in {(line if len(line) <= 60 else f'{line[:57]}...')!r}")
