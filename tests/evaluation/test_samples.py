"""Many samples of some prompts, a judge that chooses, and settings chosen on other prompts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lvrpo.errors import InputError
from lvrpo.evaluation.items import form_of
from lvrpo.evaluation.scenes import held_out_prompts
from lvrpo.evaluation.scoring import judge_scores, read_back
from lvrpo.evaluation.suite import SAMPLING, Benchmark, EvaluationOptions, evaluate, find_benchmarks
from lvrpo.evaluation.tuning import GUIDANCE_SCALES, TEMPERATURES, TunedSampling, as_validation, content_key, tune
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import load_policy
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.rewards.self_vqa import SelfVQA
from lvrpo.rewards.verifiable_image import fact_table
from lvrpo.training.run_directory import json_text
from lvrpo.types import Prompt

NUM_SAMPLES = 5


@pytest.fixture
def policy(small_base: Path) -> Policy:
    return load_policy(small_base)


def test_some_prompts_are_sampled_often_and_the_score_stays(policy: Policy) -> None:
    benchmarks = find_benchmarks(["generate", "generate_guided", "understand", "understand_sampled"])
    sizes = {benchmark.name: 6 for benchmark in benchmarks}
    plain = evaluate(policy, benchmarks, sizes=sizes)
    many = evaluate(policy, benchmarks, sizes=sizes, options=EvaluationOptions(2, NUM_SAMPLES))
    counts = {name: [len(row) for row in scored.successes] for name, scored in many.scored.items()}
    assert counts == {
        "generate": [NUM_SAMPLES, NUM_SAMPLES, 1, 1, 1, 1],
        "generate_guided": [NUM_SAMPLES, NUM_SAMPLES, 1, 1, 1, 1],
        "understand": [1] * 6,  # greedy answers do not differ
        "understand_sampled": [NUM_SAMPLES, NUM_SAMPLES, 4, 4, 4, 4],
    }
    for name, scored in many.scored.items():
        assert scored.scores == plain.scored[name].scores
        assert scored.answers == plain.scored[name].answers
    assert [len(row) for row in many.scored["generate"].judged] == [NUM_SAMPLES, NUM_SAMPLES, 0, 0, 0, 0]
    found = many.results()
    assert set(found["generate"]["pass_at_k"]) == {"1", "4"}
    assert set(found["generate"]["best_of"]) == {"2", "4"}
    assert "pass_at_k" not in found["understand"]
    assert "best_of" not in found["understand_sampled"]
    assert set(plain.results()["generate"]) == {"score", "low", "high", "n", "categories", "metric"}
    own = evaluate(policy, benchmarks, sizes=sizes, options=EvaluationOptions(1))
    assert len(own.scored["generate"].successes[0]) == benchmarks[0].pass_at_k_samples
    assert len(own.scored["generate_guided"].successes[0]) == 1


def test_the_judge_is_the_reward_and_may_be_another_model(policy: Policy, tmp_path: Path) -> None:
    prompts = held_out_prompts("generate", 3)
    groups = policy.sample(prompts, replace(SAMPLING, group_size=4), [1, 2, 3])
    expected = SelfVQA().score(groups, policy).values
    assert judge_scores(groups, policy) == [tuple(pytest.approx(v, abs=1e-5) for v in row) for row in expected.tolist()]
    benchmarks = find_benchmarks(["generate"])
    other = load_policy("tiny")
    found = evaluate(policy, benchmarks, sizes={"generate": 2}, options=EvaluationOptions(2, NUM_SAMPLES, judge=other))
    assert found.scored["generate"].settings["judge"] == judge_fingerprint(other)
    own = evaluate(policy, benchmarks, sizes={"generate": 2}, options=EvaluationOptions(2, NUM_SAMPLES))
    assert own.scored["generate"].judged != found.scored["generate"].judged
    assert own.scored["generate"].read_back == found.scored["generate"].read_back  # always by the model itself


def test_what_is_read_back_is_counted_per_fact(policy: Policy) -> None:
    prompts = [*held_out_prompts("generate", 4), *held_out_prompts("understand", 1)]
    groups = policy.sample(prompts, SAMPLING, list(range(5)))
    backs = read_back(groups, policy)
    confidences = SelfVQA().confidences(groups[:4], policy, policy)[0]
    for p, (prompt, held) in enumerate(zip(prompts[:4], fact_table(groups[:4]), strict=True)):
        back = backs[p]
        assert back is not None
        confirmed = [c > 0.5 for c in confidences[p, 0].tolist()]
        assert (back.facts, back.confirmed, back.hold) == (len(prompt.facts), sum(confirmed), sum(held))
        assert back.agree == sum(c == h for c, h in zip(confirmed, held, strict=True))
    assert backs[4] is None


def test_forms_of_questions_of_the_user_are_their_categories() -> None:
    question = held_out_prompts("understand", 1)[0]
    assert form_of(question).endswith("?")
    row = replace(question, form="", source="rows/test", category="colors of cars")
    assert form_of(row) == "colors of cars"
    assert form_of(replace(row, category="")) == "understand"


# --- guidance and temperature ---


def test_each_task_takes_the_value_with_the_best_score(policy: Policy) -> None:
    benchmarks = find_benchmarks(["edit", "understand", "understand_sampled", "generate_guided"])
    tried: list[tuple[str, str, float, float]] = []
    tuned = tune(policy, benchmarks, n=6, progress=lambda *row: tried.append(row))
    assert [(task, name, value) for task, name, value, _ in tried] == [
        *(("edit", "guidance_scale", scale) for scale in GUIDANCE_SCALES),
        *(("understand", "temperature", temperature) for temperature in TEMPERATURES),
    ]
    for task, settings in tuned.settings.items():
        scores = {value: score for each, _, value, score in tried if each == task}
        (chosen,) = settings.values()
        assert scores[chosen] == max(scores.values())
        assert chosen == min(value for value, score in scores.items() if score == max(scores.values()))
    assert tuned.model == judge_fingerprint(policy)
    Path("best.json").write_text(json_text(tuned.as_dict()))
    assert TunedSampling.read(Path("best.json")) == tuned


def test_an_evaluation_takes_what_was_chosen_but_where_a_setting_is_the_point(policy: Policy) -> None:
    settings = {"generate": {"guidance_scale": 3.0}, "understand": {"temperature": 0.7}}
    tuned = TunedSampling("model", settings, frozenset())  # type: ignore[arg-type]  # tasks are literals
    benchmarks = find_benchmarks(["generate", "generate_guided", "understand", "understand_sampled", "edit"])
    sizes = {benchmark.name: 5 for benchmark in benchmarks}
    found = evaluate(policy, benchmarks, sizes=sizes, options=EvaluationOptions(0, tuned=tuned))
    used = {name: next(iter(scored.settings["tasks"].values())) for name, scored in found.scored.items()}
    assert used == {
        "generate": {"temperature": 0.0, "guidance_scale": 3.0},
        "generate_guided": {"temperature": 0.0, "guidance_scale": 1.5},
        "understand": {"temperature": 0.7, "guidance_scale": 1.0},
        "understand_sampled": {"temperature": 1.0, "guidance_scale": 1.0},
        "edit": {"temperature": 0.0, "guidance_scale": 1.0},
    }


def test_prompts_that_settings_were_chosen_on_are_refused_whatever_their_ids(policy: Policy) -> None:
    prompts = held_out_prompts("edit", 5)
    tuned = TunedSampling("model", {}, frozenset(content_key(prompt) for prompt in prompts[:2]))

    def renamed(n: int) -> list[Prompt]:
        return [replace(prompt, id=f"other:{i}") for i, prompt in enumerate(prompts[:n])]

    with pytest.raises(InputError, match="benchmark own: 2 of 5 prompts, 'other:0' first"):
        evaluate(policy, [Benchmark("own", renamed, 5)], options=EvaluationOptions(0, tuned=tuned))
    tuned.require_unseen("own", prompts[2:])


def test_rows_of_the_user_are_chosen_on_and_then_refused(policy: Policy) -> None:
    for name, first in (("validation", 0), ("test", 3)):
        rows = [
            {"task": "reason", "prompt": f"what is {n} + 2 ?", "answer": str(n + 2)} for n in range(first, first + 4)
        ]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (validation,) = find_benchmarks(["validation.jsonl"])
    tuned = tune(policy, [as_validation(validation)])
    assert set(tuned.settings["reason"]) == {"temperature"}
    with pytest.raises(InputError, match="benchmark test: 1 of 4 prompts"):
        evaluate(policy, find_benchmarks(["test.jsonl"]), options=EvaluationOptions(0, tuned=tuned))
    with pytest.raises(InputError, match="no validation prompts to choose on"):
        tune(policy, find_benchmarks(["generate_guided"]))


def test_settings_of_another_model_or_another_file_are_refused() -> None:
    with pytest.raises(InputError, match="chosen for a, but this is b"):
        TunedSampling("a", {}, frozenset()).require_model("b")
    for text, message in (
        ("{", "not JSON"),
        ("[]", "holds list, not an object"),
        ("{}", "holds no settings"),
        ('{"model": "a", "settings": {"paint": {}}, "prompts": []}', "holds no settings"),
        ('{"model": "a", "settings": {"edit": {"speed": 1}}, "prompts": []}', "holds no settings"),
        ('{"model": "a", "settings": {"edit": {"temperature": "hot"}}, "prompts": []}', "holds no settings"),
    ):
        Path("file.json").write_text(text)
        with pytest.raises(InputError, match=message):
            TunedSampling.read(Path("file.json"))
    with pytest.raises(InputError, match="no such file"):
        TunedSampling.read(Path("missing.json"))
