"""Free text to atomic questions with their right answers, asked of the policy itself or of a chat endpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lvrpo.config import Config, parse_section
from lvrpo.policies.base import Policy, Sampling
from lvrpo.rewards.endpoint import Answer, ChatEndpoint, EndpointConfig, NoAnswer, after_thought
from lvrpo.rewards.identity import judge_identity
from lvrpo.rewards.text_cache import TextCache, cache_folder
from lvrpo.sampling import derive_seed
from lvrpo.types import Fact, Group, Prompt, TextSegment

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

UNTOLD = "none of its questions is of a kind that the judge can tell"
"""Why a prompt that was split has no score: a gate left nothing."""

_LINE = re.compile(
    r"^\W*(?:\d+[.):]\s*)?(?:(?:question|q)\s*\d*\s*[.:]\s*)?(?P<question>[^?\n]{2,300}\?)"
    r"\W*(?:(?:answer|a)\s*\d*\s*[.:]\s*)?(?P<answer>[^?\n]+)$",
    re.IGNORECASE,
)
_ANSWER_BELOW = re.compile(r"\?[*_\s]*\n[*_\s]*(?:answer|a)\s*\d*\s*[.:]", re.IGNORECASE)
MOST_WORDS = 6
"""Of an answer: what is longer is no atomic answer."""

_KINDS = (
    ("count", r"\bhow many\b|\bnumber of\b"),
    ("color", r"\bwhat colou?r\b|\bwhich colou?r\b"),
    ("position", r"\b(left|right|above|below|under|underneath|behind|between|on top|in front|next to|where)\b"),
    ("text", r"\b(words?|written|says?|spell|letters?|text)\b"),
    ("exists", r"^(is|are|does|do|has|have|can)\b"),
)


class SplitConfig(Config):
    """Who splits a prompt, and how it is asked."""

    by: Literal["policy", "endpoint"] = "policy"
    """policy: the frozen judge writes the questions; endpoint: a chat model does."""
    endpoint: EndpointConfig | None = None
    template: str = TEMPLATE
    """What is asked, with ``{prompt}``; the answer is to be a line per question: "is there a cube? yes"."""
    edit_template: str = EDIT_TEMPLATE
    """The same for instructions to edit a picture."""
    limit: int = Field(default=12, ge=1)
    """Questions of a prompt at most; the first ones are kept."""
    max_new_tokens: int = Field(default=512, ge=1)
    """The policy writes at most so many; an endpoint has its own limit."""
    cache: Path | None = None
    """Folder of what was found; None: ``questions`` in ``$LVRPO_CACHE``, else in the user's folder of caches."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("template", "edit_template"):
            if "{prompt}" not in getattr(self, name):  # the two fields
                raise ValueError(f"{name}: must hold {{prompt}}")
        if (self.by == "endpoint") != (self.endpoint is not None):
            raise ValueError("by=endpoint and the section endpoint belong together: give both, or neither")
        return self


class Splitter:
    """Prompts without facts get some: questions whose answers tell whether a picture shows what was asked for.

    The answer of the model is kept on the disk, by hash of prompt, template and splitter (class and weights of a
    policy; model, address and settings of an endpoint). What failed is not kept and is tried again next time.
    """

    def __init__(self, config: SplitConfig) -> None:
        self.config = config
        self.endpoint = None if config.endpoint is None else ChatEndpoint(config.endpoint)
        self.cache = TextCache(config.cache or cache_folder() / "questions")

    @property
    def judged_by(self) -> str:
        """Who writes the questions, where it is not the policy."""
        return "" if self.endpoint is None else f"questions by {self.endpoint.identity}"

    @classmethod
    def read(cls, options: Mapping[str, Any], where: str) -> Self:
        """From the options of a reward; raises InputError that begins with ``where``."""
        return cls(parse_section(SplitConfig, options, where))

    def applies(self, prompt: Prompt) -> bool:
        """Whether there is something to split, and nothing that is split already."""
        return not prompt.facts and bool(words_of(prompt))

    def with_questions(self, groups: Sequence[Group], judge: Policy) -> tuple[list[Group], dict[int, str]]:
        """The groups, those without facts with questions for facts; and by place why one has none."""
        wanted = [p for p, group in enumerate(groups) if self.applies(group.prompt)]
        if not wanted:
            return list(groups), {}
        found = dict(zip(wanted, self.questions([groups[p].prompt for p in wanted], judge), strict=True))
        out, missing = [], {}
        for p, group in enumerate(groups):
            facts = found.get(p, group.prompt.facts)
            if isinstance(facts, NoAnswer):
                missing[p], facts = facts.reason, ()
            out.append(group if p not in found else _with_facts(group, facts))
        return out, missing

    def questions(self, prompts: Sequence[Prompt], judge: Policy) -> list[tuple[Fact, ...] | NoAnswer]:
        """The questions of every prompt, or why there are none."""
        splitter = f"policy {judge_identity(judge)}, {self.config.max_new_tokens} tokens"
        splitter = splitter if self.endpoint is None else self.endpoint.identity
        requests = [self._request(prompt) for prompt in prompts]
        answers: dict[str, Answer] = {}
        for request in dict.fromkeys(requests):
            kept = self.cache.get(request, splitter)
            if kept is not None:
                answers[request] = kept
        new = [request for request in dict.fromkeys(requests) if request not in answers]
        for request, answer in zip(new, self._ask(new, judge), strict=True):
            answers[request] = answer
            if isinstance(answer, str) and parse_questions(answer):
                self.cache.put(answer, request, splitter)
        return [self._facts(answers[request]) for request in requests]

    def _request(self, prompt: Prompt) -> str:
        template = self.config.edit_template if prompt.task == "edit" else self.config.template
        return template.replace("{prompt}", words_of(prompt))

    def _ask(self, requests: Sequence[str], judge: Policy) -> list[Answer]:
        if not requests:
            return []
        if self.endpoint is not None:
            return self.endpoint.ask([(request,) for request in requests])
        prompts = [Prompt(f"split/{i}", "reason", (request,), ("text",)) for i, request in enumerate(requests)]
        sampling = Sampling(group_size=1, temperature=0.0, max_new_tokens=self.config.max_new_tokens)
        groups = judge.sample(prompts, sampling, [derive_seed("split", request) for request in requests])
        return [self._written(group.trajectories[0].segments[-1]) for group in groups]

    def _written(self, segment: object) -> Answer:
        assert isinstance(segment, TextSegment)
        if not segment.ended:
            return NoAnswer(f"the questions were cut off at {self.config.max_new_tokens} tokens")
        return after_thought(segment.text) or NoAnswer("the splitter wrote nothing")

    def _facts(self, answer: Answer) -> tuple[Fact, ...] | NoAnswer:
        if isinstance(answer, NoAnswer):
            return NoAnswer(f"no questions: {answer.reason}")
        pairs = parse_questions(answer)[: self.config.limit]
        if not pairs:
            return NoAnswer(f"no questions: none can be read in {_short(answer)}")
        return tuple(Fact(kind_of(question), question, right) for question, right in pairs)


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
    """count, color, position, text, exists, or question: the kinds that a gate knows."""
    return next((kind for kind, pattern in _KINDS if re.search(pattern, question.lower())), "question")


def words_of(prompt: Prompt) -> str:
    """The text of a prompt."""
    return " ".join(part for part in prompt.parts if isinstance(part, str)).strip()


def _with_facts(group: Group, facts: tuple[Fact, ...]) -> Group:
    prompt = replace(group.prompt, facts=facts)
    return Group(prompt, tuple(replace(trajectory, prompt=prompt) for trajectory in group.trajectories))


def _short(text: str) -> str:
    line = json.dumps(" ".join(text.split()), ensure_ascii=False)
    return line if len(line) <= 80 else f'{line[:76]}..."'
