"""Atomic questions with their right answers from free text, written by the policy itself or by a chat endpoint."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from lvrpo.atomic_io import write_atomic
from lvrpo.config import Config
from lvrpo.data.base import world_of
from lvrpo.errors import InputError
from lvrpo.policies.base import Judge, Sampling
from lvrpo.reading import read_json_object
from lvrpo.rewards.base import is_fingerprint_overridden, judge_fingerprint
from lvrpo.rewards.endpoint import Answer, ChatEndpoint, EndpointConfig, NoAnswer, strip_thinking
from lvrpo.sampling import derive_seed
from lvrpo.types import Fact, Group, Image, Prompt, TextSegment

TEMPLATE = """\
A picture was drawn from this description: {prompt}

Write the questions that check whether the picture shows what was described: one question for every object, count, \
color, relation and written text. Every question asks for one thing and can be answered from the picture alone, by yes \
or no, by a number, or by one or two words. Write one question per line, with its right answer after the question mark:
is there a cube? yes
what color is the cube? red
how many birds are there? 3"""

EDIT_TEMPLATE = """\
A picture was edited by this instruction: {prompt}

Write the questions that check, from the edited picture alone, whether the instruction was followed: one question for \
every thing that it asks for. Every question can be answered by yes or no, by a number, or by one or two words. Write \
one question per line, with its right answer after the question mark:
is there a cube? yes
what color is the cube? red
how many birds are there? 3"""

STAY_TEMPLATE = """\
This picture will be edited by this instruction: {prompt}

Write the questions that check, from the edited picture alone, whether everything else stayed as it is: ask about the \
objects, colors, counts, relations and the background of this picture that the instruction does not touch, and about \
nothing that it changes. Every question asks for one thing and can be answered by yes or no, by a number, or by one \
or two words. Write one question per line, with its answer in this picture after the question mark:
is there a cube? yes
what color is the cube? red
how many birds are there? 3"""

UNCHANGED = "unchanged"
"""The kind of facts about what an edit must leave as it is in the source."""

Questions = tuple[Fact, ...] | NoAnswer
"""The questions of a prompt, or why there are none."""

Confirm = Callable[[Sequence[tuple[Image, Fact]]], Sequence[float | NoAnswer]]
"""A reader's confidence in each fact's answer, given the image beside it: in [0, 1], or why there is none."""

MIN_CONFIDENCE = 0.75
"""Minimum confidence of a reader in what it sees in the source."""

NO_QUESTION = "none of its questions is of a kind that is asked"
"""Reason of a missing score for a prompt whose questions are all left out."""
RENAMED_OPTIONS = {"split": "is called questions now"}
"""Hints of the rewards that have questions written."""

_LINE = re.compile(
    r"^\W*(?:\d+[.):]\s*)?(?:(?:question|q)\s*\d*\s*[.:]\s*)?(?P<question>[^?\n]{2,300}\?)"
    r"\W*(?:(?:answer|a)\s*\d*\s*[.:]\s*)?(?P<answer>[^?\n]+)$",
    re.IGNORECASE,
)
_ANSWER_BELOW = re.compile(r"\?[*_\s]*\n[*_\s]*(?:answer|a)\s*\d*\s*[.:]", re.IGNORECASE)
MOST_WORDS = 6
"""Maximum words of an answer; a longer one is no atomic answer."""

_KINDS = (
    ("count", r"\bhow many\b|\bnumber of\b"),
    ("color", r"\bwhat colou?r\b|\bwhich colou?r\b"),
    ("position", r"\b(left|right|above|below|under|underneath|behind|between|on top|in front|next to|where)\b"),
    ("text", r"\b(words?|written|says?|spell|letters?|text)\b"),
    ("exists", r"^(is|are|does|do|has|have|can)\b"),
)


class QuestionConfig(Config):
    """The model that writes questions for a prompt, and its instructions."""

    by: Literal["policy", "endpoint", "grammar"] = "policy"
    """policy: the frozen judge writes the questions; endpoint: a chat model does; grammar: they follow from the words,
    as the prompt's world has it (``lvrpo.data.base``)."""
    endpoint: EndpointConfig | None = None
    template: str = TEMPLATE
    """The request, with ``{prompt}``; the answer must be a line per question: "is there a cube? yes"."""
    edit_template: str = EDIT_TEMPLATE
    """The same for instructions to edit an image: what should be in the result."""
    stay_template: str | None = STAY_TEMPLATE
    """The request together with the source of an edit, about what should stay as it is; null: no request."""
    sure: float = Field(default=MIN_CONFIDENCE, ge=0, lt=1)
    """A question about what should stay is dropped where the reader is less sure of its answer, given the source."""
    limit: int = Field(default=12, ge=1, le=1000)
    """Questions of a prompt at most, and as many about what should stay; the first ones are kept."""
    max_new_tokens: int = Field(default=512, ge=1, le=100_000)
    """Maximum tokens of the policy's answer; an endpoint has its own limit."""
    cache: Path | None = None
    """Folder of what was found; None: ``questions`` in ``$LVRPO_CACHE``, else in the user's folder of caches."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("template", "edit_template", "stay_template"):
            template: str | None = getattr(self, name)  # the three fields
            if template is not None and "{prompt}" not in template:
                raise ValueError(f"{name}: must hold {{prompt}}")
        if self.stay_template is None and "sure" in self.model_fields_set:
            raise ValueError(
                f"sure={self.sure}: applies to questions about what should stay: leave it out, or set stay_template"
            )
        if (self.by == "endpoint") != (self.endpoint is not None):
            raise ValueError("by=endpoint and the section endpoint belong together: give both, or neither")
        return self


@dataclass(frozen=True)
class _Request:
    """One request for questions: the words, and the source image of an edit."""

    words: str
    shown: Image | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """Key of the cache: the words, and a hash of size and pixels of the image."""
        if self.shown is None:
            return (self.words,)
        pixels = self.shown.detach().float().cpu().contiguous()
        digest = hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes())
        return self.words, digest.hexdigest()

    @property
    def parts(self) -> tuple[str | Image, ...]:
        return (self.words,) if self.shown is None else (self.shown, self.words)


class QuestionGenerator:
    """Gives facts to prompts without: questions whose answers say whether an image shows what the prompt describes.

    Of an edit there are two kinds: what should be, from the instruction; and what should stay (facts of the kind
    ``unchanged``), from the instruction and the source image. The second are kept only where the reader is ``sure``
    of their answer given the source, so that what it is asked about the result is whether it agrees with the source.

    The answer of the model is kept on the disk, by hash of prompt, image, template and author (class and weights of
    a policy; model, address and settings of an endpoint). What failed is not kept and is tried again next time.
    """

    def __init__(self, config: QuestionConfig) -> None:
        self.config = config
        self.endpoint = None if config.endpoint is None else ChatEndpoint(config.endpoint)
        self.cache = TextCache(config.cache or cache_folder() / "questions")

    @property
    def judged_by(self) -> str:
        """The model that writes the questions, if it is not the policy."""
        return "" if self.endpoint is None else f"questions by {self.endpoint.identity}"

    def applies(self, prompt: Prompt) -> bool:
        """Whether there are words to write questions about, and no facts yet."""
        return not prompt.facts and bool(prompt.text)

    def with_questions(
        self, groups: Sequence[Group], judge: Judge, confirm: Confirm
    ) -> tuple[list[Group], dict[int, str]]:
        """The groups, those without facts with questions for facts; and by place why one has none.

        ``confirm``: the reader of the results, who is asked about the sources first.
        """
        wanted = [p for p, group in enumerate(groups) if self.applies(group.prompt)]
        if not wanted:
            return list(groups), {}
        found = dict(zip(wanted, self.questions([groups[p].prompt for p in wanted], judge), strict=True))
        edits = [p for p in wanted if self._has_rest(groups[p].prompt) and not isinstance(found[p], NoAnswer)]
        rest = self.unchanged_questions([groups[p].prompt for p in edits], judge)
        cases = [(groups[p].prompt.images[-1], _joined(found[p], stays)) for p, stays in zip(edits, rest, strict=True)]
        found |= dict(zip(edits, keep_confirmed(cases, confirm, self.config.sure), strict=True))
        out, missing = [], {}
        for p, group in enumerate(groups):
            facts = found.get(p, group.prompt.facts)
            if isinstance(facts, NoAnswer):
                missing[p], facts = facts.reason, ()
            out.append(group if p not in found else with_facts(group, facts))
        return out, missing

    def questions(self, prompts: Sequence[Prompt], judge: Judge) -> list[Questions]:
        """The questions of every prompt about what should be, or why there are none."""
        if self.config.by == "grammar":
            found = [world_of(prompt.world).questions(prompt.text) for prompt in prompts]
            return [facts or NoAnswer("the grammar does not know its words") for facts in found]
        answers = self._answers([self._request(prompt) for prompt in prompts], judge)
        return [self._facts(answer) for answer in answers]

    def unchanged_questions(self, prompts: Sequence[Prompt], judge: Judge) -> list[Questions]:
        """The questions of every edit about what should stay, made in view of its source, or why there are none."""
        if self.config.by == "grammar":
            return [world_of(prompt.world).unchanged_questions(prompt.text) for prompt in prompts]
        template = self.config.stay_template or ""
        requests = [_Request(template.replace("{prompt}", p.text), p.images[-1]) for p in prompts]
        found = []
        for answer in self._answers(requests, judge):
            facts = self._facts(answer, "questions about what should stay")
            found.append(facts if isinstance(facts, NoAnswer) else tuple(replace(f, kind=UNCHANGED) for f in facts))
        return found

    def _has_rest(self, prompt: Prompt) -> bool:
        return self.config.stay_template is not None and prompt.task == "edit" and bool(prompt.images)

    def _request(self, prompt: Prompt) -> _Request:
        template = self.config.edit_template if prompt.task == "edit" else self.config.template
        return _Request(template.replace("{prompt}", prompt.text))

    def _answers(self, requests: Sequence[_Request], judge: Judge) -> list[Answer]:
        """The answers to all requests, from the cache or new."""
        author = f"policy {judge_fingerprint(judge)}, {self.config.max_new_tokens} tokens"
        author = author if self.endpoint is None else self.endpoint.identity
        keys = [(*request.key, author) for request in requests]
        distinct = dict(zip(keys, requests, strict=True))
        answers: dict[tuple[str, ...], Answer] = {}
        for key in distinct:
            kept = self.cache.get(*key)
            if kept is not None:
                answers[key] = kept
        new = [key for key in distinct if key not in answers]
        keep = self.endpoint is not None or not is_fingerprint_overridden()  # else the key names other weights
        for key, answer in zip(new, self._ask([distinct[key] for key in new], judge), strict=True):
            answers[key] = answer
            if keep and isinstance(answer, str) and parse_questions(answer):
                self.cache.put(answer, *key)
        return [answers[key] for key in keys]

    def _ask(self, requests: Sequence[_Request], judge: Judge) -> list[Answer]:
        if not requests:
            return []
        if self.endpoint is not None:
            return self.endpoint.ask([request.parts for request in requests])
        prompts = [
            Prompt(f"split/{i}", "reason" if request.shown is None else "understand", request.parts, ("text",))
            for i, request in enumerate(requests)
        ]
        sampling = Sampling(group_size=1, temperature=0.0, max_new_tokens=self.config.max_new_tokens)
        groups = judge.sample(prompts, sampling, [derive_seed("split", *request.key) for request in requests])
        return [self._written(group.trajectories[0].segments[-1]) for group in groups]

    def _written(self, segment: object) -> Answer:
        assert isinstance(segment, TextSegment)
        if not segment.ended:
            return NoAnswer(f"the questions were cut off at {self.config.max_new_tokens} tokens")
        return strip_thinking(segment.text) or NoAnswer("nothing was written")

    def _facts(self, answer: Answer, what: str = "questions") -> Questions:
        if isinstance(answer, NoAnswer):
            return NoAnswer(f"no {what}: {answer.reason}")
        pairs = parse_questions(answer)[: self.config.limit]
        if not pairs:
            return NoAnswer(f"no {what}: none can be read in {_short(answer)}")
        return tuple(Fact(kind_of(question), question, right) for question, right in pairs)


def keep_confirmed(cases: Sequence[tuple[Image, Questions]], confirm: Confirm, sure: float) -> list[Questions]:
    """The facts of each edit without those about what should stay that the reader does not see in its source.

    A fact of the kind ``unchanged`` is seen where the reader is ``sure`` of its answer given the source. Where there
    were such facts and none is left, or the reader gave no number for one, the reason stands instead. All sources are
    asked about at once.
    """
    asked = [(source, fact) for source, facts in cases for fact in _unchanged_facts(facts)]
    answers = iter(confirm(asked) if asked else ())
    return [_seen(facts, [next(answers) for _ in _unchanged_facts(facts)], sure) for _, facts in cases]


def _seen(facts: Questions, given: Sequence[float | NoAnswer], sure: float) -> Questions:
    if isinstance(facts, NoAnswer):
        return facts
    problem = next((answer for answer in given if isinstance(answer, NoAnswer)), None)
    if problem is not None:
        return NoAnswer(f"of the source: {problem.reason}")
    seen = iter([isinstance(answer, float) and answer >= sure for answer in given])
    kept = tuple(fact for fact in facts if fact.kind != UNCHANGED or next(seen))
    if given and not _unchanged_facts(kept):
        return NoAnswer(f"of {len(given)} questions about what should stay the judge is sure of none")
    return kept


def _unchanged_facts(facts: Questions) -> list[Fact]:
    """The facts about what an edit must leave unchanged."""
    return [] if isinstance(facts, NoAnswer) else [fact for fact in facts if fact.kind == UNCHANGED]


def parse_questions(text: str) -> list[tuple[str, str]]:
    """(question, answer) of every line "question? answer"; numbering, bullets, "Q:" and "A:" do not matter.

    Other lines, and answers of more than a few words, are passed over; of equal questions the first one counts, and
    one that has two different answers is dropped.
    """
    found: dict[str, str] = {}
    doubtful = set()
    for line in _ANSWER_BELOW.sub("? ", text).splitlines():
        match = _LINE.match(line.strip())
        if match is None:
            continue
        question = " ".join(match["question"].strip("*_`\"' ").split())
        answer = " ".join(match["answer"].strip(" \t.,;:!*_`\"'()[]|").lower().split())
        if not answer or len(answer.split()) > MOST_WORDS:
            continue
        if found.setdefault(question, answer) != answer:
            doubtful.add(question)
    return [(question, answer) for question, answer in found.items() if question not in doubtful]


def kind_of(question: str) -> str:
    """count, color, position, text, exists, or question."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, question.lower())), "question")


def with_facts(group: Group, facts: tuple[Fact, ...]) -> Group:
    """The group with other facts about its images."""
    prompt = replace(group.prompt, facts=facts)
    return Group(prompt, tuple(replace(trajectory, prompt=prompt) for trajectory in group.trajectories))


def _joined(facts: Questions, stays: Questions) -> Questions:
    """Facts about the change and about the rest; a question in both is about the change."""
    if isinstance(facts, NoAnswer) or isinstance(stays, NoAnswer):
        return facts if isinstance(facts, NoAnswer) else stays
    asked = {_plain(fact.question) for fact in facts}
    kept = tuple(fact for fact in stays if _plain(fact.question) not in asked)
    return (*facts, *kept) if kept else NoAnswer("no questions about what should stay: all are about what changes")


def _plain(question: str) -> str:
    return " ".join(re.findall(r"\w+", question.lower()))


def _short(text: str) -> str:
    line = json.dumps(" ".join(text.split()), ensure_ascii=False)
    return line if len(line) <= 80 else f'{line[:76]}..."'


def cache_folder() -> Path:
    """``$LVRPO_CACHE``, else ``lvrpo`` in the user's folder of caches."""
    own = os.environ.get("LVRPO_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvrpo"


class TextCache:
    """Key -> text. Processes may share a folder: a file appears by one rename, and a damaged one counts as absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, *key: str) -> str | None:
        """The text, or None where there is none that is whole."""
        try:
            found = read_json_object(self._path(key))
            text = found["text"]
            return text if found["sha256"] == _digest(text) else None
        except (InputError, KeyError, TypeError, AttributeError):
            return None

    def put(self, text: str, *key: str) -> None:
        """Writes the text under the key; the last of several writers wins. Raises InputError where it cannot."""
        path = self._path(key)
        content = json.dumps({"text": text, "sha256": _digest(text)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, content.encode())
        except OSError as error:
            raise InputError(f"{self.folder}: cannot be written ({error.strerror}): name another folder") from None

    def _path(self, key: tuple[str, ...]) -> Path:
        name = _digest(json.dumps(key))
        return self.folder / name[:2] / f"{name}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
