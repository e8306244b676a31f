"""A small table run job by job: bases, grids, budgets, summaries, interruptions and refusals."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lvrpo.cli import main
from lvrpo.commands.keys import find_config
from lvrpo.commands.reproduce import shipped_experiments, write_page
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation.reproduce import plan, runner
from lvrpo.evaluation.reproduce.compute import RunCost
from lvrpo.evaluation.reproduce.plan import Experiment, Job, Recipes, list_jobs, load_experiment
from lvrpo.evaluation.reproduce.runner import Runner
from lvrpo.evaluation.scenes import GENERATE
from lvrpo.evaluation.suite import Evaluation
from lvrpo.evaluation.tuning import TunedSampling
from lvrpo.policies.base import Sampling
from lvrpo.policies.loading import load_policy
from lvrpo.records import BenchmarkRecord, from_json
from lvrpo.report.evidence import Evidence
from lvrpo.training.base_trainer import Interrupted
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig
from lvrpo.training.run_directory import RunDirectory

PRETRAINED = """
policy: {tower_width: 64, transformer: {width: 64, depth: 2, heads: 2, key_heads: 2, mlp_width: 128}}
batch: {generate: 8, caption: 4, question: 8, edit: 2, reason: 3}
corpus: {scenes: 30, edits: 10, reasons: 12}
steps: 4
held_out_every: 0
"""
ALIGNED = """
name: aligned
steps: 3
data: {prompts_per_step: {generate: 2, understand: 4, edit: 1, reason: 2}}
rollout: {group_size: 4}
rewards: [{name: self_vqa}, {name: exact_answer}]
advantages: {std_floor: 1.0e-4}
validation: {every: 2, prompts: {generate: 2, understand: 2}}
checkpoint_every: 1
"""
EXPERIMENT = """
name: small
bases:
  one: {{model: {base}, config: {folder}/pretrained.yaml}}
runs:
  all: [[one, 0]]
budget: {{row: ours}}
tuning: {{base: one, seed: 9, prompts: 3}}
test:
  sizes: {{generate: 7, understand: 8, edit: 5, reason: 3}}
  sampled_prompts: 2
  num_steps: 3
rows:
  base: {{about: the base, group: base, runs: all}}
  base_best_of_4: {{about: the best of 4, group: inference, of: base, best_of: 4, runs: all}}
  longer:
    {{about: more, group: rival, config: {folder}/pretrained.yaml, start: scratch, untuned: as it is, runs: all}}
  ours: {{about: ours, group: ours, config: {folder}/aligned.yaml, runs: all, tune: [[], [optimizer.muon_lr=0.01]]}}
  oracle:
    about: right outputs
    group: oracle
    config: {folder}/continued.yaml
    overrides: [rows=prompts, batch.caption=0]
    runs: all
    tune: [[], [optimizer.muon_lr=0.01]]
"""


@pytest.fixture
def small(tmp_path: Path, small_base: Path) -> Path:
    """The YAML file of a small experiment."""
    (tmp_path / "pretrained.yaml").write_text(PRETRAINED)
    (tmp_path / "continued.yaml").write_text("extends: pretrained.yaml\ninit: tiny\n")
    (tmp_path / "aligned.yaml").write_text(ALIGNED)
    (tmp_path / "small.yaml").write_text(EXPERIMENT.format(base=small_base, folder=tmp_path))
    return tmp_path / "small.yaml"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs that are not counted, in a tenth of the time."""

    def cost(config: TrainConfig | PretrainConfig) -> RunCost:
        return RunCost(2.0 if isinstance(config, PretrainConfig) else 7.0)

    monkeypatch.setattr(plan, "count_cost", cost)


def open_runner(small: Path, **changes: Any) -> Runner:
    experiment = load_experiment(small).model_copy(update=changes)
    return Runner(Recipes(experiment, Path("out"), find_config, device="cpu"), Path("summaries"), lambda line: None)


def test_a_table_is_run_once_and_read_again(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", str(small), "--out", "out", "--summaries", "summaries", "--device", "cpu"]
    assert main([*command, "--rows", "base_best_of_4,ours"]) == 0, capsys.readouterr().err
    summaries = Path("summaries")
    assert {path.name for path in summaries.glob("*.json")} == {
        "base-one-0.json",
        "ours-one-0.json",
        "tuning-ours.json",
    }
    found = json.loads((summaries / "ours-one-0.json").read_text())
    assert found["flops"] == pytest.approx(found["budget_flops"], rel=0.2)
    assert found["steps"] >= 2
    assert set(found["benchmarks"]) >= {"generate", "generate_plain", "understand", "edit", "reason"}
    assert len((summaries / "ours-one-0.json").read_bytes()) < 16000
    tuning = json.loads((summaries / "tuning-ours.json").read_text())
    assert [member["overrides"] for member in tuning["members"]] == [[], ["optimizer.muon_lr=0.01"]]
    scores = [member["score"] for member in tuning["members"]]
    assert tuning["chosen"] == scores.index(max(scores))
    page = Path("summaries.md").read_text()
    assert "| oracle | right outputs | oracle | not run |" in page
    assert "| base_best_of_4 | the best of 4 | inference | ." in page

    metrics = Path("out/runs/ours-one-0/metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert main([*command, "--rows", "base,ours", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 jobs left"
    assert main([*command, "--table"]) == 0
    assert Path("summaries.md").read_text() == page  # it follows from the summaries alone
    assert Path("out/runs/ours-one-0/metrics.jsonl").stat().st_mtime_ns == metrics

    small.write_text(small.read_text().replace("generate: 7", "generate: 8"))
    assert main([*command, "--rows", "base"]) == 2
    line = capsys.readouterr().err
    assert (
        "base-one-0.json: is of another recipe than the experiment says now: test: sizes.generate=7 against 8" in line
    )


def test_an_interrupted_job_goes_on(small: Path, counted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class AtOnce(runner.InterruptHandler):
        def __call__(self) -> bool:
            return True

    job, this = Job("run", "ours", "one", 0), open_runner(small)
    monkeypatch.setattr(Runner, "best_overrides", lambda self, row: ())
    with monkeypatch.context() as patch:
        patch.setattr(runner, "InterruptHandler", AtOnce)
        with pytest.raises(Interrupted, match="repeat the command to continue"):
            this.run_job(job)
    run = RunDirectory.read(Path("out") / job.folder)
    assert [row["step"] for row in run.metrics()] == [0, 1]
    this.run_job(job)
    assert [row["step"] for row in run.metrics()] == list(
        range(this.recipes.within_budget("ours", (), "one", 0)[0].steps + 1)
    )
    assert this.summary_path(job).exists()


def test_more_pretraining_is_the_budget_on_top_of_the_base(small: Path, counted: None) -> None:
    made = open_runner(small).recipes
    config, cost = made.within_budget("longer", (), "one", 5)
    own = made.base_config("one")
    assert isinstance(config, PretrainConfig)
    assert config.init is None
    assert config.seed == own.seed == 0  # the base's own run at a longer schedule
    more = cost.total(config.steps) - cost.total(own.steps)
    assert config.steps == own.steps + 10  # three steps of 7 buy ten of 2
    assert 0 < made.budget - more < cost.step


def test_the_oracle_sees_the_prompts_of_the_alignment(small: Path) -> None:
    made = open_runner(small).recipes
    config = made.config("oracle", (), "one", 3)
    assert isinstance(config, PretrainConfig)
    assert config.rows == "prompts"
    assert config.prompts.seed == 3
    assert config.prompts.counts == {"generate": 6, "understand": 12, "edit": 3, "reason": 6}  # 3 steps of ALIGNED
    assert config.init == made.base_model("one")


def test_a_run_costs_what_its_parts_do() -> None:
    cost = RunCost(10.0, start=1.0, validation=3.0, reference_eval=2.0, validation_every=4, reference_eval_every=5)
    assert cost.total(8) == 1 + 80 + 3 * (1 + 2) + 2 * 2
    assert cost.steps_within(cost.total(8)) == 8
    assert cost.steps_within(cost.total(8) - 1) == 7
    assert from_json(RunCost, json.loads(json.dumps(asdict(cost))), "costs") == cost
    with pytest.raises(InputError, match="one step takes"):
        cost.steps_within(1.0)


def test_prompts_that_something_was_chosen_on_are_no_test(
    small: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, experiment = load_policy(small_base), load_experiment(small)
    leaking = replace(GENERATE, validation=GENERATE.prompts)
    monkeypatch.setattr(runner, "find_benchmarks", lambda names: [leaking])
    tuned = runner.tune_on_validation(policy, experiment)
    with pytest.raises(InputError, match="choose on another split"):
        runner.evaluate_on_test(policy, experiment, tuned, Path("summaries"), lambda line: None)


def test_images_take_the_steps_that_the_experiment_says(
    small: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, experiment = load_policy(small_base), load_experiment(small)
    sample, seen = policy.sample, set[tuple[bool, int]]()

    def watched(prompts: Any, sampling: Sampling, seeds: Any) -> Any:
        seen.update((prompt.output == ("image",), sampling.num_steps) for prompt in prompts)
        return sample(prompts, sampling, seeds)

    monkeypatch.setattr(policy, "sample", watched)
    tuned = runner.tune_on_validation(policy, experiment)
    assert (True, 3) in seen
    runner.evaluate_on_test(policy, experiment, tuned, Path("summaries"), lambda line: None)
    assert seen == {(True, 3), (False, 3)}


def test_jobs_come_in_the_order_in_which_they_need_each_other() -> None:
    experiment = load_experiment(shipped_experiments()["scenes"])
    jobs = list_jobs(experiment)
    assert [job.name for job in jobs if job.kind == "base"] == ["base-1", "base-2"]
    assert [job.name for job in jobs[:2]] == ["base-1", "base-2"]
    for row, declared in experiment.rows.items():
        own = [job for job in jobs if job.row == row]
        assert sorted(own, key=lambda job: job.kind == "run") == own
        assert sum(job.kind == "tune" for job in own) == len(declared.tune)
    assert {job.base for job in list_jobs(experiment, ["lvrpo"], [1, 2])} == {"tiny"}
    assert {job.base for job in list_jobs(experiment, ["lvrpo"], [3])} == {"tiny", "base-1"}
    assert [job.row for job in list_jobs(experiment, ["base_best_of_4"], [0])] == ["base"]
    with pytest.raises(InputError, match="is no row"):
        list_jobs(experiment, ["lvrop"])
    with pytest.raises(InputError, match="no row has such a seed"):
        list_jobs(experiment, None, [77])


@pytest.mark.parametrize("shipped", ["scenes", "scenes_quick", "tiny-token", "tiny-masked"])
def test_every_member_of_the_shipped_rows_is_a_configuration(shipped: str) -> None:
    experiment = load_experiment(shipped_experiments()["scenes"].with_stem(shipped))
    assert experiment.name == shipped
    assert experiment.evidence is not shipped.endswith("_quick")
    made, (base, *_) = Recipes(experiment, Path("out"), find_config), experiment.bases
    kinds = set()
    for name, row in experiment.used.items():
        for member in (row.tune or ((),)) if row.trained else ():
            config = made.config(name, member, base, 0)
            kinds.add(type(config))
            if isinstance(config, TrainConfig):
                assert config.policy == experiment.bases[base].model
    assert kinds == {TrainConfig, PretrainConfig}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuning": {"base": "one", "seed": 0}}, "seed 0 is the one that grids are tuned with"),
        ({"budget": {"row": "base"}}, "must be a row that trains"),
        ({"only": ["nobody"]}, "'nobody' is no row"),
        ({"runs": {"all": [["one", 0], ["one", 1]]}}, "rows.longer.runs=all: start=scratch takes the seed of the base"),
    ],
)
def test_an_experiment_that_does_not_fit_is_one_line(change: dict[str, Any], message: str, small: Path) -> None:
    tree = load_experiment(small).model_dump(mode="json")
    with pytest.raises(ValueError, match=message):
        Experiment.model_validate(tree | change)
    rows = tree["rows"]
    rows["oracle"]["tune"] = [[]]
    with pytest.raises(ValueError, match="give every row the same number"):
        Experiment.model_validate(tree)


def test_a_job_that_fails_is_passed_over(small: Path, counted: None, capsys: pytest.CaptureFixture[str]) -> None:
    aligned = small.with_name("aligned.yaml")
    aligned.write_text(aligned.read_text().replace("std_floor: 1.0e-4", "std_floor: 5.0"))
    command = ["reproduce", str(small), "--out", "out", "--summaries", "summaries", "--device", "cpu"]
    assert main([*command, "--rows", "base,ours"]) == 1
    told = capsys.readouterr()
    assert "failed: step-0 contract" in told.out
    assert "run ours-one-0: left out, as ours-tune0 failed" in told.out
    assert "3 of 4 jobs failed: ours-tune0, ours-tune1, ours-one-0" in told.err
    assert Path("summaries/base-one-0.json").exists()


def test_the_committed_page_follows_from_the_committed_summaries(root: Path) -> None:
    for name, path in shipped_experiments().items():
        folder = root / "docs" / "results" / name
        page = folder.with_suffix(".md")
        if not folder.is_dir():
            assert not page.exists(), f"{page} has no summaries: remove it"
            continue
        copy = Path(name)
        copy.symlink_to(folder)
        write_page(load_experiment(path), copy)
        assert copy.with_suffix(".md").read_text() == page.read_text(), f"run: lvrpo reproduce {name} --table"
        assert not Evidence.read(folder).summaries.keys() - load_experiment(path).rows.keys()


def test_a_recipe_is_the_same_while_its_values_are(small: Path) -> None:
    """A field that came later is at its default; a value, a default or a name that changed is told."""
    made, path = open_runner(small).recipes, Path("ours.json")
    config = made.config("ours", (), "one", 3)
    found = made.recipe(config, "one")
    made.require_same_recipe(json.loads(json.dumps(found)), made.config("ours", (), "one", 4), "one", path)
    older = json.loads(json.dumps(found))
    del older["config"]["flow"]["unguided_kl_coef"]
    older["config"]["validation"]["rollback_lr"] = 0.5  # a constant now
    made.require_same_recipe(older, config, "one", path)
    for section, key, value, line in (
        (
            "flow",
            "kl_coef",
            7.0,
            r"^ours.json: is of another recipe .*: config: flow.kl_coef=7.0 against 2.0: delete it",
        ),
        ("flow", "not_any_more", 1, r"^ours.json: recipe: config.flow.not_any_more: unknown"),
        ("validation", "rollback_lr", 0.25, r"^ours.json: recipe: config.validation.rollback_lr=0.25: is gone"),
        ("rollout", "num_steps", "x", r"^ours.json: recipe: config.rollout.num_steps=x: must be"),
    ):
        other = json.loads(json.dumps(found))
        other["config"][section][key] = value
        with pytest.raises(InputError, match=line):
            made.require_same_recipe(other, config, "one", path)
    with pytest.raises(InputError, match=r"^ours.json: recipe: "):
        made.require_same_recipe("5f3a", config, "one", path)
    with pytest.raises(InputError, match="base: another against"):
        made.require_same_recipe({**found, "base": "another"}, config, "one", path)


def test_a_prompt_that_could_not_be_scored_is_never_a_wrong_one_of_a_summary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def evaluated(*successes: tuple[float, ...]) -> dict[str, Any]:
        ids = tuple(f"p{i}" for i in range(2))
        record = BenchmarkRecord(ids, ("",) * 2, ids, (1.0, math.nan), successes=successes, settings={"tasks": {}})
        record = replace(record, failures=("", "HTTP 503"))
        monkeypatch.setattr(runner, "evaluate", lambda *args, **named: Evaluation({"generate": record}))
        test = plan.TestConfig(benchmarks=("generate",), sizes={"generate": 2})
        experiment = load_experiment(shipped_experiments()["scenes"]).model_copy(update={"test": test})
        tuned = TunedSampling("model", {}, frozenset())
        return runner.evaluate_on_test(load_policy("tiny"), experiment, tuned, tmp_path, lambda line: None)

    assert evaluated((1.0,), (0.0,))["generate"]["first"] == "80"  # bits 1 and 0
    for successes, lost in ((((1.0,), (math.nan,)), 1), ((), 2)):
        with pytest.raises(ContractError, match=rf"test: {lost} of 2 prompts are neither right nor wrong: HTTP 503"):
            evaluated(*successes)
