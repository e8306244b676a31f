from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

from lvrpo.config import parse_section
from lvrpo.errors import ContractError, InputError
from lvrpo.registry import allow_code
from lvrpo.rewards import OLD_NAMES, REWARDS
from lvrpo.rewards.base import Scores
from lvrpo.rewards.config import ConfiguredReward, RewardConfig, WeightSchedule
from lvrpo.rewards.function import as_reward
from lvrpo.rewards.table import NOT_APPLICABLE, build_rewards, score_groups, score_groups_unchecked
from lvrpo.rewards.verifiable_text import ExactAnswer
from lvrpo.types import Group, Prompt

TEXT = Prompt("text", "understand", ("x",), ("text",), answer="red")
DRAW = Prompt("draw", "generate", ("x",), ("image",))


class Fixed:
    """A reward that says what it is told, or raises it."""

    def __init__(
        self, says: Any = 0.5, failures: dict[tuple[int, int], str] | None = None, task: str | None = None
    ) -> None:
        self.says, self.failures, self.task = says, failures or {}, task
        self.seen: list[str] = []

    def applies(self, prompt: Prompt) -> bool:
        return self.task is None or prompt.task == self.task

    def score(self, groups: Sequence[Group], judge: Any) -> Scores:
        self.seen += [group.prompt.id for group in groups]
        if isinstance(self.says, Exception):
            raise self.says
        if isinstance(self.says, float):
            return Scores(torch.full((len(groups), len(groups[0])), self.says), self.failures)
        return Scores(torch.as_tensor(self.says), self.failures)


def source(reward: Any, on_failure: Literal["mask", "stop"] = "mask", **config: Any) -> ConfiguredReward:
    return ConfiguredReward(RewardConfig(name="fixed", on_failure=on_failure, **config), reward)


@pytest.fixture
def groups(group: Callable[..., Group]) -> list[Group]:
    image = torch.zeros(3, 8, 8)
    return [group(TEXT, [["red"], ["blue"]]), group(DRAW, [[image], [image]])]


@pytest.fixture
def nobody(judge: Callable[..., Any]) -> Any:
    return judge({})


def test_rewards_are_scored_where_they_apply(groups: list[Group], nobody: Any) -> None:
    everywhere, drawings = Fixed(0.25), Fixed(0.75, task="generate")
    sources = [
        source(ExactAnswer(), weight=2.0, label="answer"),
        source(everywhere, label="all", tasks=("understand",)),
        source(drawings, weight=0.5),
    ]
    table = score_groups(sources, groups, nobody)
    assert table.names == ("answer", "all", "fixed")
    assert table.weights.tolist() == [2.0, 1.0, 0.5]
    assert table.tasks == ("understand", "generate")
    assert table.mask.tolist() == [[[True, True, False]] * 2, [[False, False, True]] * 2]
    assert table.scores[0].tolist() == [[1, 0.25, 0], [0, 0.25, 0]]
    assert table.scores[1, :, 2].tolist() == [0.75, 0.75]
    assert set(table.reasons.values()) == {NOT_APPLICABLE}
    assert set(table.reasons) == {(p, g, k) for p, k in ((0, 2), (1, 0), (1, 1)) for g in range(2)}
    assert (everywhere.seen, drawings.seen) == (["text"], ["draw"])
    assert table.mean("answer") == 0.5
    assert table.mean("fixed") == 0.75


def test_a_reward_that_applies_nowhere_has_no_mean(groups: list[Group], nobody: Any) -> None:
    never = Fixed(task="edit")
    table = score_groups([source(never)], groups, nobody)
    assert not table.mask.any()
    assert len(table.reasons) == 4
    assert math.isnan(table.mean("fixed"))
    assert never.seen == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_masked_with_its_reason(bad: float, groups: list[Group], nobody: Any) -> None:
    reward = Fixed([[0.5, bad], [1.0, 0.0]])
    table = score_groups([source(reward)], groups, nobody)
    assert table.mask[..., 0].tolist() == [[True, False], [True, True]]
    assert table.scores.isfinite().all()
    assert table.reasons == {(0, 1, 0): f"failed: the score is {bad}"}
    assert table.mean("fixed") == 0.5
    with pytest.raises(ContractError, match=r"'fixed' failed on prompt 'text', member 1: the score is"):
        score_groups([source(reward, "stop")], groups, nobody)


def test_a_failure_that_the_reward_tells_is_masked_where_it_happened(groups: list[Group], nobody: Any) -> None:
    reward = Fixed(0.5, failures={(0, 0): "timed out"}, task="generate")
    table = score_groups([source(reward)], groups, nobody)
    assert table.mask[..., 0].tolist() == [[False, False], [False, True]]
    assert table.reasons[1, 0, 0] == "failed: timed out"
    assert table.reasons[0, 0, 0] == NOT_APPLICABLE
    with pytest.raises(ContractError, match=r"prompt 'draw', member 0: timed out"):
        score_groups([source(reward, "stop")], groups, nobody)


def test_a_reason_given_by_the_reward_wins_over_its_nan(groups: list[Group], nobody: Any) -> None:
    reward = Fixed(math.nan, failures={(0, 0): "timed out"})
    table = score_groups([source(reward)], groups, nobody)
    assert table.reasons[0, 0, 0] == "failed: timed out"
    assert table.reasons[0, 1, 0] == "failed: the score is nan"


def test_an_exception_masks_everything_or_stops(groups: list[Group], nobody: Any) -> None:
    reward = Fixed(RuntimeError("no network"))
    other = source(Fixed(0.5), label="other")
    table = score_groups([source(reward), other], groups, nobody)
    assert not table.mask[..., 0].any()
    assert table.mask[..., 1].all()
    assert {table.reasons[p, g, 0] for p in range(2) for g in range(2)} == {"failed: RuntimeError: no network"}
    with pytest.raises(ContractError, match="no network"):
        score_groups([source(reward, "stop")], groups, nobody)


def test_an_error_of_ours_is_not_masked(groups: list[Group], nobody: Any) -> None:
    with pytest.raises(InputError, match="unknown word"):
        score_groups([source(Fixed(InputError("unknown word")))], groups, nobody)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (4, 1), (2, 2, 1)])
def test_a_wrong_shape_stops_whatever_is_configured(shape: tuple[int, ...], groups: list[Group], nobody: Any) -> None:
    with pytest.raises(ContractError, match=r"returned shape .* for 2 groups of 2: return float \(2, 2\)"):
        score_groups([source(Fixed(torch.zeros(shape)))], groups, nobody)


def test_scores_are_float32_without_a_graph(groups: list[Group], nobody: Any) -> None:
    leaf = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    table = score_groups([source(Fixed(leaf)), source(Fixed([[1, 0], [0, 1]]), label="whole numbers")], groups, nobody)
    assert table.scores.dtype == torch.float32
    assert not table.scores.requires_grad
    assert table.scores[..., 1].tolist() == [[1, 0], [0, 1]]


def test_rewards_are_found_by_name_or_import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("somebodys_rewards")
    vars(module).update(Fixed=Fixed, Silent=type("Silent", (), {"applies": lambda self, prompt: True}))
    monkeypatch.setitem(sys.modules, "somebodys_rewards", module)
    with pytest.raises(InputError, match="if you trust it, add --allow-code, or"):
        build_rewards([RewardConfig(name="somebodys_rewards:Fixed")])
    allow_code(["somebodys_rewards"])
    built = build_rewards(
        [
            RewardConfig(name="exact_answer"),
            RewardConfig(name="somebodys_rewards:Fixed", options={"says": 0.5}, label="mine"),
            RewardConfig(name="scene_facts", options={"mode": "all"}, label="all"),
            RewardConfig(name="self_vqa"),
        ]
    )
    assert [s.config.title for s in built] == ["exact_answer", "mine", "all", "self_vqa"]
    assert isinstance(built[1].reward, Fixed)
    with pytest.raises(InputError, match="has no method 'score'"):
        build_rewards([RewardConfig(name="somebodys_rewards:Silent")])


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([{"name": "exact_anser"}], "did you mean exact_answer"),
        ([{"name": "no_such_module:Reward"}], "is code of no_such_module, not of lvrpo"),
        (
            [{"name": "self_vqa", "options": {"speed": 1}}],
            r"self_vqa\.options\.speed: unknown key: there are .*both",
        ),
        (
            [{"name": "scene_facts", "options": {"mode": "most"}}],
            "options.mode=most: must be 'fraction', 'gated', 'all' or",
        ),
        ([{"name": "scene_facts"}, {"name": "scene_facts"}], "two entries are called 'scene_facts'"),
        ([{"name": "scene_facts", "label": "x"}, {"name": "self_vqa", "label": "x"}], "two entries are called 'x'"),
        ([{"name": "self_vqa", "weight": 0}, {"name": "exact_answer", "weight": 0}], "every weight is 0"),
    ],
)
def test_rewards_that_cannot_be_built(configs: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_rewards([RewardConfig.model_validate(config) for config in configs])
    assert "\n" not in str(caught.value)


def test_two_of_a_kind_with_labels() -> None:
    configs = [RewardConfig(name="scene_facts"), RewardConfig(name="scene_facts", label="all", options={"mode": "all"})]
    assert [s.config.title for s in build_rewards(configs)] == ["scene_facts", "all"]


@pytest.mark.parametrize("change", [{"weight": -1}, {"tasks": ["draw"]}, {"on_failure": "ignore"}])
def test_configurations_that_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RewardConfig.model_validate({"name": "self_vqa"} | change)


def test_a_reward_of_weight_0_is_scored_and_not_trained(groups: list[Group], nobody: Any) -> None:
    failing = Fixed(0.5, {(0, 1): "away"}, task="understand")
    table = score_groups([source(failing, weight=0, label="watched"), source(Fixed([[0.0, 1.0]] * 2))], groups, nobody)
    assert table.names == ("watched", "fixed")
    assert table.mask[..., 0].tolist() == [[True, False], [False, False]]
    trained = table.trained()
    assert trained.names == ("fixed",)
    assert trained.weights.tolist() == [1.0]
    assert trained.scores.tolist() == [[[0.0], [1.0]]] * 2
    assert trained.mask.all()
    assert trained.reasons == {}
    assert trained.tasks == table.tasks
    assert trained.trained() is trained


def test_reasons_keep_their_reward_without_the_watched_ones(groups: list[Group], nobody: Any) -> None:
    watched, other = source(Fixed(0.5), weight=0, label="watched"), source(Fixed(0.5, {(1, 0): "away"}))
    table = score_groups([watched, other], groups, nobody)
    assert dict(table.trained().reasons) == {(1, 0, 0): "failed: away"}


def test_the_table_says_who_judged(groups: list[Group], nobody: Any) -> None:
    assert score_groups([source(Fixed())], groups, nobody).judge == "FakeJudge"


def test_the_table_says_who_else_judged(groups: list[Group], nobody: Any) -> None:
    """A judge of the row's own, whoever the reward names, and both; nobody for the others."""

    class Elsewhere(Fixed):
        judged_by = "a model at an address"

    class Another:
        identity = "2"

    rows = [source(Fixed(0.5), label="plain"), source(Elsewhere(0.5), label="outside")]
    own = [
        replace(row, judge=Another(), config=row.config.model_copy(update={"label": f"own {i}"}))
        for i, row in enumerate(rows)
    ]
    table = score_groups([*rows, *own], groups, nobody)
    assert table.judged_by == {
        "outside": "a model at an address",
        "own 0": "Another:2",
        "own 1": "Another:2; a model at an address",
    }


@pytest.mark.parametrize(
    "options",
    [
        {"api_key": "SECRET"},
        {"endpoint": {"openai_api_key": "SECRET"}},
        {"endpoint": {"key": "sk-SECRETSECRETSECRET"}},
        {"headers": [{"x": "Bearer sk-SECRETSECRETSECRET"}]},
        *({name: "SECRET"} for name in ("key", "token", "auth", "secret", "password", "credentials", "Authorization")),
        *(
            {name: "SECRET"}
            for name in ("api_token", "hf_token", "openai_key", "x-api-key", "authToken", "access_tokens")
        ),
        {"auth": {"user": "me", "value": ["SECRET"]}},
        {"members": [{"name": "vlm_endpoint", "options": {"endpoint": {"api_key": "SECRET"}}}]},
        {"endpoint": {"base_url": "http://host/sk-SECRET-SECRET-1234/v1"}},
        {"endpoint": {"base_url": "http://host/v1?k=hf_SECRETSECRETSECRET"}},
        {"template": "say ghp_SECRETSECRETSECRETSECRET now"},
        {"sk-SECRETSECRETSECRET": 1},
    ],
)
def test_keys_are_not_taken_as_options(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"looks like a key, .* name that in key_env") as caught:
        parse_section(RewardConfig, {"name": "self_vqa", "options": options}, "rewards")
    assert "SECRET" not in str(caught.value)
    RewardConfig(name="self_vqa", options={"endpoint": {"key_env": "SOME_KEY"}, "questions": {"limit": 3}})


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 24, "max_tokens": "24", "eos_token": "</s>", "key_env": "SOME_KEY"},
        {"keyboard": "qwerty", "monkey": "yes", "author": "me", "tokenizer": "folder", "secretary": "none"},
        {"head": "runs/hf_head_of_last_year", "source": "sk-learn-based-on-nothing-at-all"},
        {"template": "is the key left of the token ?"},
    ],
)
def test_what_only_sounds_like_a_key_is_taken(options: dict[str, Any]) -> None:
    assert RewardConfig(name="self_vqa", options=options).options == options


@pytest.mark.parametrize(("old", "hint"), OLD_NAMES.items())
def test_a_name_of_an_earlier_version_is_refused_with_what_to_use(old: str, hint: str) -> None:
    with pytest.raises(InputError, match=f"rewards.name={old}: {hint}"):
        parse_section(RewardConfig, {"name": old}, "rewards")
    assert old not in REWARDS


def test_wrong_options_are_told_by_their_names_alone() -> None:
    with pytest.raises(InputError, match=r"rewards\.self_vqa\.options\.pass: unknown key") as caught:
        build_rewards([RewardConfig(name="self_vqa", options={"kinds": ["count"], "pass": "SECRET"})])
    assert "SECRET" not in str(caught.value)


def test_a_share_of_failures_may_be_too_much(groups: list[Group], nobody: Any) -> None:
    reward = Fixed(0.5, failures={(0, 0): "timed out", (1, 0): "timed out", (1, 1): "cut off"})
    assert score_groups([source(reward, max_failed=0.75)], groups, nobody).mask.sum() == 1
    with pytest.raises(
        ContractError, match=r"'fixed' failed on 3 of 4 outputs, max_failed=0.7: most often \(2\): timed"
    ):
        score_groups([source(reward, max_failed=0.7)], groups, nobody)


def test_scores_beyond_the_cap_count_as_its_end(groups: list[Group], nobody: Any) -> None:
    says = Fixed([[0.2, 3.0], [-4.0, 0.7]], {(1, 1): "broken"})
    table = score_groups([source(says, clip=(-1.0, 0.5)), source(Fixed(0.9), label="free")], groups, nobody)
    assert table.scores[..., 0].flatten().tolist() == pytest.approx([0.2, 0.5, -1.0, 0.5])
    assert table.cut["fixed"].tolist() == [[False, True], [True, True]]
    assert not table.mask[1, 1, 0]
    assert set(table.cut) == {"fixed"}
    upper = score_groups([source(says, clip=(None, 0.5))], groups, nobody)
    assert upper.scores[1, 0, 0] == -4


def test_what_failed_is_not_cut(groups: list[Group], nobody: Any) -> None:
    table = score_groups([source(Fixed([[math.nan, math.inf], [0.0, 1.0]]), clip=(0.0, 0.5))], groups, nobody)
    assert table.mask[..., 0].tolist() == [[False, False], [True, True]]
    assert table.cut["fixed"].tolist() == [[False, False], [False, True]]


def test_weights_follow_their_schedule(groups: list[Group], nobody: Any) -> None:
    linear = RewardConfig(name="x", weight=2, schedule=WeightSchedule(points=((10, 1.0), (20, 0.0), (30, 0.5))))
    assert [linear.weight_at(step) for step in (0, 10, 15, 20, 25, 30, 99)] == [2, 2, 1, 0, 0.5, 1, 1]
    stepped = WeightSchedule(kind="step", points=((0, 1.0), (10, 3.0)))
    assert [stepped.factor(step) for step in (0, 9, 10, 50)] == [1, 1, 3, 3]
    assert WeightSchedule(kind="constant", points=((0, 0.25),)).factor(7) == 0.25
    late = source(Fixed(), schedule={"kind": "step", "points": [[0, 0], [5, 1]]})
    assert score_groups_unchecked([late], groups, nobody, 4).weights.tolist() == [0.0]
    assert score_groups_unchecked([late], groups, nobody, 5).weights.tolist() == [1.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip": [1, 0]},
        {"clip": [None, None]},
        {"schedule": {"points": [[5, 1], [5, 0]]}},
        {"schedule": {"points": [[0, -1]]}},
        {"schedule": {"points": []}},
        {"schedule": {"kind": "constant", "points": [[0, 1], [1, 1]]}},
        {"normalize": "all"},
    ],
)
def test_caps_scales_and_schedules_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RewardConfig(name="self_vqa", **wrong)


def test_a_row_may_have_a_judge_of_its_own(groups: list[Group], nobody: Any) -> None:
    asked: list[Any] = []

    class Asks(Fixed):
        def score(self, groups: Sequence[Group], judge: Any) -> Scores:
            asked.append(judge)
            return super().score(groups, judge)

    (built,) = build_rewards([RewardConfig(name="self_vqa", judge="tiny")])
    assert built.judge is not None
    score_groups([ConfiguredReward(built.config, Asks(), built.judge), source(Asks(), label="b")], groups, nobody)
    assert asked == [built.judge, nobody]
    with pytest.raises(InputError, match="no such folder"):
        build_rewards([RewardConfig(name="self_vqa", judge="tinny")])


def test_the_judge_of_a_reward_that_asks_none_is_refused_and_that_of_one_from_python_is_asked() -> None:
    for name in ("exact_answer", "numeric"):
        with pytest.raises(InputError, match=rf"^rewards\.{name}\.judge=tiny: this reward asks no judge: leave it"):
            build_rewards([RewardConfig(name=name, judge="tiny")])
    row = RewardConfig(name="mine", judge="tiny")
    (found,) = build_rewards([row], {"mine": Fixed()})
    assert found.judge is not None
    assert found.sides == ()
    rule = as_reward(lambda image: 1.0)()
    with pytest.raises(InputError, match=r"^rewards\.mine\.judge=tiny: this reward asks no judge"):
        build_rewards([row], {"mine": rule})
