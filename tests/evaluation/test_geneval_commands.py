"""GenEval from the command line: the official layout by one command, and a run that its prompts guard.

The built-in world knows too few words for its questions, which are put in that world's words here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lvrpo.cli import main
from lvrpo.data import geneval as data
from lvrpo.data.geneval import read_metadata
from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.evaluation.benchmarks import geneval
from lvrpo.policies.loading import load_policy
from lvrpo.report.run import load_run
from lvrpo.rewards.self_vqa import SelfVQA
from lvrpo.sampling import derive_seed
from lvrpo.training.rollout_log import read_validations


def written(folder: Path, rows: Sequence[Any]) -> Path:
    path = folder / data.METADATA
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TINY_ROWS: list[dict[str, Any]] = [
    {
        "tag": "counting",
        "include": [{"class": "circle", "count": n}],
        "exclude": [{"class": "circle", "count": n + 1}],
        "prompt": f"{word} circles",
    }
    for n, word in ((2, "two"), (3, "three"))
]


@pytest.fixture
def tiny_data(tmp_path: Path, few_prompts: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two prompts of the built-in world as if they were the official ones, with questions in its words."""
    (tmp_path / "geneval").mkdir()
    path = written(tmp_path / "geneval", TINY_ROWS)
    monkeypatch.setattr(geneval, "OFFICIAL", data.fingerprint(read_metadata(path)))
    asked = data.facts_of

    def in_its_words(metadata: data.Metadata) -> Any:
        return tuple(replace(f, question="how many circles are there ?") for f in asked(metadata))

    monkeypatch.setattr(data, "facts_of", in_its_words)
    return tmp_path


def test_one_command_writes_the_official_layout(
    tiny_data: Path, small_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(small_base), "--benchmark", "geneval_vqa", "--data", str(tiny_data), "--num-steps", "2"]
    command += ["--out", str(tmp_path / "out"), "--geneval-layout", str(tmp_path / "layout")]
    assert main(command) == 0
    assert f"GenEval's layout: {tmp_path / 'layout'}" in capsys.readouterr().out.replace("\n", "")
    files = sorted(str(p.relative_to(tmp_path / "layout")) for p in (tmp_path / "layout").rglob("*") if p.is_file())
    folders = [
        f"{row:05d}/{file}"
        for row in (0, 1)
        for file in ("metadata.jsonl", *(f"samples/{i:04d}.png" for i in range(4)))
    ]
    assert files == sorted(folders)
    assert json.loads((tmp_path / "layout/00001/metadata.jsonl").read_text()) == TINY_ROWS[1]
    own = tmp_path / "out/geneval_vqa" / "geneval+00001-2.png"
    assert (tmp_path / "layout/00001/samples/0002.png").read_bytes() == own.read_bytes()
    assert main(command) == 2
    assert "layout: exists already" in capsys.readouterr().err
    assert main([*command, "--force", "--n", "1"]) == 0  # the folder of items still holds both
    own.unlink()
    assert main([*command, "--force"]) == 2
    assert own.name in capsys.readouterr().err
    both = [*command[:-1], str(tmp_path / "both"), "--guidance", "1,2", "--against", str(small_base)]
    both[both.index(str(tmp_path / "out"))] = str(tmp_path / "two")
    assert main(both) == 0
    assert {str(p.relative_to(tmp_path / "both")) for p in (tmp_path / "both").glob("*/*")} == {
        f"{phase}/geneval_vqa@{scale}" for phase in ("before", "after") for scale in (1, 2)
    }


def test_a_layout_needs_images_of_all_prompts(
    tiny_data: Path, small_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(small_base), "--benchmark", "geneval_vqa", "--data", str(tiny_data), "--num-steps", "2"]
    command += ["--geneval-layout", str(tmp_path / "layout")]
    assert main(command) == 2
    assert "add --benchmark and --out DIR" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "out"), "--n", "1"]) == 2
    assert "has no image (1 of 2 have none): evaluate all prompts first" in capsys.readouterr().err
    assert not (tmp_path / "layout").exists()


def test_a_run_is_guarded_by_a_benchmark(small_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Validation watches the first prompts of a benchmark's rows; its scores are those of the judge, by hand."""
    rows, file, train = (tmp_path / f"{name}.jsonl" for name in ("rows", "geneval", "train"))
    many = [
        {**row, "include": [{"class": name, "count": row["include"][0]["count"]}], "prompt": f"{word} {name}s"}
        | {"exclude": [{"class": name, "count": row["exclude"][0]["count"]}]}
        for row, word in zip(TINY_ROWS, ("two", "three"), strict=True)
        for name in ("circle", "square", "star", "diamond")
    ]
    assert main(["data", "benchmark", "geneval", str(written(tmp_path, many)), "--out", str(rows)]) == 0
    text = rows.read_text().replace("How many", "how many").replace(" in the picture?", " there ?")
    lines = text.splitlines(keepends=True)
    file.write_text("".join(lines[:5]))
    train.write_text("".join(lines[5:]))
    settings = f"""
policy: {small_base}
steps: 2
seed: 3
data: {{source: jsonl, jsonl: {{train: {train}, validation: {file}}}, prompts_per_step: {{generate: 3}}}}
rollout: {{num_steps: 2, group_size: 4}}
rewards: [{{name: self_vqa}}]
advantages: {{std_floor: 1.0e-6}}
validation: {{every: 1, action: warn, prompts: {{generate: 4}}}}
checkpoint_every: 2
"""
    (tmp_path / "guarded.yaml").write_text(settings)
    code = main(["train", str(tmp_path / "guarded.yaml"), "--out", "run", "--no-evaluate"])
    assert code in (0, 3), capsys.readouterr().err  # so small a policy may regress, which is then said
    record = load_run(Path("run"))
    looks = [row for row in record.metrics.rows if "validation/generate" in row]
    assert [row["step"] for row in looks] == [0, 1, 2]
    scores = [found["generate"] for _, found in read_validations(Path("run"))]
    assert [len(each) for each in scores] == [4, 4, 4]
    prompts = JsonlPrompts(JsonlConfig(validation=file), "validation").prompts("generate", 4)
    policy = load_policy(small_base)
    sampling = replace(policy.default_sampling("generate"), group_size=1, temperature=0.0, num_steps=2)
    seeds = [derive_seed(3, "guard", prompt.id) for prompt in prompts]
    by_hand = SelfVQA().score(policy.sample(prompts, sampling, seeds), policy).values[:, 0]
    assert scores[0].tolist() == pytest.approx(by_hand.tolist(), abs=1e-5)
    assert looks[0]["validation/generate"] == pytest.approx(float(by_hand.mean()), abs=1e-5)
    kept = json.loads(Path("run/summary.json").read_text())["validation"]["best_step"]
    assert looks[kept]["validation/action"] == "kept best"
