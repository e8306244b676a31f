"""Whatever a user gets wrong: one line that says what, the right exit code, and nothing overwritten."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lvrpo.cli import main

REWARDS = """
import torch
from lvrpo.rewards.base import Scores

class Base:
    def applies(self, prompt):
        return True

class NotANumber(Base):
    def score(self, groups, judge):
        return Scores(torch.full((len(groups), len(groups[0])), float("nan")))

class WrongShape(Base):
    def score(self, groups, judge):
        return Scores(torch.zeros(len(groups), 1 + len(groups[0])))

class Constant(Base):
    def score(self, groups, judge):
        return Scores(torch.ones(len(groups), len(groups[0])))

class Failing(Base):
    def score(self, groups, judge):
        raise RuntimeError("the server is away")

class Silent:
    pass

class Unmade(Base):
    def __init__(self):
        raise ValueError("no server")

    def score(self, groups, judge): ...
"""
SMALL = (
    "steps=2",
    "device=cpu",
    "data.prompts_per_step={generate: 2, understand: 4, edit: 0, reason: 2}",
    "rollout={group_size: 4, num_steps: 3}",
    "rewards=[{name: own_vqa}, {name: exact_answer}]",
    "advantages.std_floor=1e-6",
    "guard.prompts={generate: 2, understand: 4, reason: 2}",
)
SMALL_TRAIN = ("train", "quickstart", "policy=small", *SMALL)


@pytest.fixture(scope="module")
def shelf(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the cases name, made once: policies, a finished run, pictures, rows."""
    shelf = tmp_path_factory.mktemp("shelf")
    here = Path.cwd()
    os.chdir(shelf)
    try:
        shutil.copytree(small_base, "small")
        assert main([*SMALL_TRAIN, "--out", "finished", "--no-evaluate"]) == 0
        shutil.copytree("finished", "unfinished")
        for name in ("summary.json", "policy.json"):
            (shelf / "unfinished" / name).unlink()
        shutil.copytree("unfinished", "damaged")
        state = max(shelf.glob("damaged/checkpoints/step_*")) / "state" / "state.safetensors"
        state.write_bytes(state.read_bytes()[:1000])
        shutil.copytree("unfinished", "startless")
        shutil.rmtree("startless/start")
        shutil.copytree("finished", "oddsummary")
        Path("oddsummary/summary.json").write_text("{")
        shutil.copytree("finished", "unscored")
        shutil.rmtree("unscored/scores")
        shutil.copytree("finished", "oddscores")
        scores = Path("oddscores/scores/step_000002.npz")
        scores.write_bytes(scores.read_bytes()[:200])
        policies()
        pictures()
        tables()
    finally:
        os.chdir(here)
    return shelf


def policies() -> None:
    for name in ("truncated", "foreign", "oddconfig", "oddtokens", "othersize"):
        shutil.copytree("small", name)
    weights = Path("truncated/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    Path("foreign/config.json").write_text(json.dumps({"model_type": "llama"}))
    config = json.loads(Path("small/config.json").read_text())
    Path("oddconfig/config.json").write_text(json.dumps({**config, "wings": 2}))
    Path("othersize/config.json").write_text(json.dumps({**config, "tower_width": 32}))
    Path("oddtokens/tokenizer.json").write_text("{}")
    Path("hollow").mkdir()
    Path("notes").mkdir()
    Path("notes/todo.txt").write_text("mine\n")


def pictures() -> None:
    red = Image.new("RGB", (32, 32), "red")
    red.save("red.png")
    Path("broken.png").write_bytes(Path("red.png").read_bytes()[:60])
    Path("text.png").write_text("no picture")
    red.save("moving.gif", save_all=True, append_images=[Image.new("RGB", (32, 32), "blue")], duration=50)
    Image.new("1", (9000, 8000)).save("huge.png")
    Path("inside").mkdir()
    red.save("inside/red.png")


def tables() -> None:
    question = {"task": "understand", "prompt": "what color is the circle ?", "images": ["red.png"], "answer": "red"}
    files = {
        "empty": "",
        "noanswer": json.dumps({k: v for k, v in question.items() if k != "answer"}),
        "noimage": f"{json.dumps(question)}\n{json.dumps({k: v for k, v in question.items() if k != 'images'})}",
        "unknownfield": json.dumps({**question, "anwser": "red"}),
        "unknowntask": json.dumps({**question, "task": "undrstand"}),
        "outside": json.dumps({**question, "images": ["../secret.png"]}),
        "absent": json.dumps({**question, "images": ["absent.png"]}),
        "broken": json.dumps({**question, "images": ["text.png"]}),
        "animated": json.dumps({**question, "images": ["moving.gif"]}),
        "huge": json.dumps({**question, "images": ["huge.png"]}),
        "notjson": json.dumps(question) + "\n{",
        "drawing": json.dumps({"task": "generate", "prompt": "a red circle"}),
        "questions": json.dumps({"image": "red.png", "question": "what color is the circle ?"}),
        "noquestion": json.dumps({"image": "red.png"}),
    }
    for name, text in files.items():
        Path(f"{name}.jsonl").write_text(text + "\n" if text else "")
    Path("inside/leaves.jsonl").write_text(json.dumps({"image": "../red.png", "question": "what ?"}) + "\n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    Path("blank.txt").write_text("\n\n")
    Path("broken.yaml").write_text("steps: [1\n")
    Path("list.yaml").write_text("- steps\n")
    Path("twice.yaml").write_text("steps: 3\nsteps: 4\n")
    Path("loop.yaml").write_text("extends: loop.yaml\n")
    Path("bad_rewards.py").write_text(REWARDS)
    Path("broken_rewards.py").write_text("class Reward(:\n    pass\n")
    Path("leaving_rewards.py").write_text("import sys\nsys.exit(3)\n")


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.name != ".lock"}


def train(*changes: str) -> tuple[str, ...]:
    return (*SMALL_TRAIN, *changes, "--out", "new")


def imported_from(module: str) -> tuple[str, ...]:
    return train(f"rewards=[{{name: '{module}:Reward'}}]", f"allow_code=[{module}]")


def rewarded_by(name: str, more: str = "") -> tuple[str, ...]:
    return train(f"rewards=[{{name: 'bad_rewards:{name}'{more}}}]", "allow_code=[bad_rewards]")


Case = tuple[tuple[str, ...], int, str]
COMMAND_LINE: list[Case] = [
    (("trian",), 2, "did you mean train?"),
    (("--hlep",), 2, "did you mean --help?"),
    (("data", "previw"), 2, "use lvrpo data preview"),
    (("data", "preview", "--split", "tset"), 2, "invalid choice: 'tset'"),
    (("data", "preview", "--out", "red.png"), 2, "red.png: exists already"),
    (("report", "finished", "unfinished"), 2, "argument 'unfinished': one too many"),
    (("evaluate", "small", "--benchmrak", "edit"), 2, "did you mean --benchmark?"),
    (("evaluate", "small", "--n", "0"), 2, "must be >= 1"),
    (("evaluate", "small", "--seed", "-1"), 2, "--seed"),
    (("evaluate", "small", "--n", "many"), 2, "must be a whole number"),
    (("evaluate", "small", "--json"), 2, "expected one argument"),
    (("evaluate",), 2, "MODEL"),
    (("train", "quickstart", "--seed", "3"), 2, "written section.key=value, without dashes"),
]
CONFIGURATION: list[Case] = [
    (("train",), 2, "CONFIG is missing"),
    (("train", "quickstrat"), 2, "did you mean quickstart?"),
    (("train", "steps=3"), 2, "an override stands where CONFIG belongs"),
    (("train", "missing.yaml"), 2, "missing.yaml: no such file"),
    (("train", "broken.yaml"), 2, "not valid YAML"),
    (("train", "list.yaml"), 2, "list.yaml:1"),
    (("train", "twice.yaml"), 2, "stands twice"),
    (("train", "loop.yaml"), 2, "extends itself"),
    (("train", "notes"), 2, "is a folder: give a YAML file"),
    (train("stpes=3"), 2, "did you mean steps?"),
    (train("rollout.grup_size=3"), 2, "did you mean rollout.group_size?"),
    (train("steps"), 2, "an override is written section.key=value"),
    (train("steps=0"), 2, "steps=0: must be >= 1"),
    (train("steps=many"), 2, "steps=many: must be a whole number"),
    (train("steps=1.5"), 2, "steps=1.5: must be a whole number"),
    (train("flow.kind=flow_grppo"), 2, "did you mean flow_grpo?"),
    (train("flow.kind=grpo"), 2, "flow.kind=grpo: is called flow_grpo"),
    (train("data.source=scnes"), 2, "did you mean scenes?"),
    (train("data.source=jsonl"), 2, "set data.jsonl.train"),
    (train("rewards=[{name: exact_anwser}]"), 2, "did you mean exact_answer?"),
    (train("rewards=[{name: scene_facts, options: {mood: all}}]"), 2, "mood"),
    (train("rewards=[{name: own_vqa}, {name: own_vqa}]"), 2, "two entries are called 'own_vqa'"),
    (train("rewards=[{name: 'no_such_package:Reward'}]"), 2, "is code of no_such_package, not of lvrpo"),
    ((*train("rewards=[{name: 'no_such_package:Reward'}]"), "--allow-code"), 2, "no module 'no_such_package'"),
    (train("rewards=[{name: own_vqa, weight: 0}]"), 2, "every weight is 0"),
    (train("rewards=[{name: own_vqa, weight: -1}]"), 2, "must be >= 0"),
    (train("rewards=[{name: own_vqa, max_failed: 2}]"), 2, "must be <= 1"),
    (train("health.max_failed=-1"), 2, "health.max_failed=-1: must be >= 0"),
    (
        train("rewards=[{name: 'broken_rewards:Reward'}]", "allow_code=[broken_rewards]"),
        2,
        "broken_rewards cannot be imported: SyntaxError",
    ),
    (
        train("rewards=[{name: 'leaving_rewards:Reward'}]", "allow_code=[leaving_rewards]"),
        2,
        "leaving_rewards cannot be imported: SystemExit: 3",
    ),
    (rewarded_by("Unmade"), 2, "bad_rewards:Unmade cannot be made: ValueError: no server"),
    (train("optimizer.betas=[1,2]"), 2, "optimizer.betas.0=1: must be < 1"),
    (train("optimizer.betas=[0.9,-0.5]"), 2, "optimizer.betas.1=-0.5: must be >= 0"),
    (train("optimizer.betas=[.nan,0.5]"), 2, "must be a finite number"),
    (train("optimizer.adamw_lr=.inf"), 2, "must be a finite number"),
    (train("optimizer.expert_lr={generate: -1}"), 2, "optimizer.expert_lr.generate=-1: must be >= 0"),
    (train("guard.prompts={generate: -3}"), 2, "guard.prompts.generate=-3: must be >= 0"),
    (train("rollout.image_size=[0,32]"), 2, "rollout.image_size.0=0: must be >= 1"),
    (train("rollout.guidance_interval=[0.9,0.1]"), 2, "must be [low, high] with 0 <= low < high <= 1"),
    (("pretrain", "pretrain", "policy.transformer.rope_theta=0"), 2, "rope_theta=0: must be > 0"),
    (("pretrain", "pretrain", "held_out={generate: -1}"), 2, "held_out.generate=-1: must be >= 0"),
    (rewarded_by("Silent"), 2, "has no method 'applies'"),
    (train("device=gpu"), 2, "use auto, cpu or cuda"),
    (("pretrain", "pretrain", "corpus.scene_shares={one: 1, tow: 2}"), 2, "tow"),
    (("pretrain", "pretrain", "init=nowhere"), 2, "no such folder"),
    (("pretrain", "pretrain", "corpus.edits=0"), 2, "batch.edit=20"),
    (("pretrain", "pretrain", "corpus.questions_per_scene=0"), 2, "batch.question=64"),
    (("pretrain", "pretrain", "batch={generate: 0}"), 2, "at least one kind"),
    (("pretrain", "pretrain", "batch={generate: -1}"), 2, "batch.generate=-1"),
    (("pretrain", "pretrain", "condition_dropout=0.9", "picture_dropout=0.2"), 2, "picture_dropout=0.2"),
    (("pretrain", "quickstart"), 2, "is an alignment configuration"),
    (train("text.kind=nft"), 2, "text.kind=nft: trains drawings, and this section is for text: set flow.kind"),
    (train("text.lr=1e-5"), 2, "text.lr=1e-05: was a multiplier of the learning rates: set optimizer.muon_lr and "),
    (train("flow.lr=1"), 2, "or the multipliers optimizer.expert_lr (by expert) and flow.lr_scale"),
    (train("tokens={lr: 0.8}"), 2, "tokens.lr=0.8: was a multiplier"),
    (train("optimizer.lr=1e-5"), 2, "another: set optimizer.muon_lr and optimizer.adamw_lr"),
    (train("text.lr_scale=11"), 2, "text.lr_scale=11: must be <= 10"),
    (train("text.kind=clip"), 2, "text.kind=clip: is called grpo"),
    (train("text.kind=flow_grpo"), 2, "text.kind=flow_grpo: trains a flow, and this section is for tokens"),
    (train("advantages.kind=group_relative"), 2, "advantages.kind=group_relative: is called grpo"),
    (train("advantages.kind=leave_one_out"), 2, "advantages.kind=leave_one_out: is called rloo"),
    (train("text.kind=cipso"), 2, "did you mean cispo?"),
    (train("flow.kind=clip"), 2, "flow.kind=clip: trains tokens, and a flow has none: set text.kind"),
    (
        train("flow.kind=flow_grpo"),
        2,
        "needs rollout.sampler=flow_sde, dance_sde or cps: set that, or extend flow_grpo",
    ),
    (train("flow.kind=dance_grpo", "rollout.sampler=cps"), 2, "flow.kind=dance_grpo needs rollout.sampler=dance_sde: "),
    (train("flow.kind=mix_grpo", "rollout.sampler=cps"), 2, "and rollout.window.kind=sliding, random or decaying: set"),
    (train("text.clip_low=-0.1"), 2, "text.clip_low=-0.1: must be > 0"),
    (train("flow.clip_high=-1e-4"), 2, "flow.clip_high=-0.0001: must be > 0"),
    (train("flow={kind: flow_grpo, clip_low: 1}"), 2, "must be < 1"),
    (
        train("flow.kind=flow_grpo", "rollout.sampler=cps", "rollout.window={size: 3}"),
        2,
        "num_steps=3 but window size is 3",
    ),
    (train("flow.kind=flow_grpo", "rollout.sampler=cps", "rollout.window.kind=slidng"), 2, "did you mean sliding?"),
    (train("rollout.guidance_scale=2", "rollout.guidance_renorm=global"), 2, "guided by rollout.guidance_scale alone"),
    (train("rollout.image_guidance_scale=2"), 2, "has no effect while rollout.guidance_scale=1"),
    (train("rollout.group_size=1"), 2, "rollout.group_size=1: must be >= 2"),
    (train("flow.keep=3"), 2, "best and worst must fit into rollout.group_size=4"),
    (train("flow.ratio=guard"), 2, "flow.kind=nft has no ratio"),
    (train("flow.kl=gaussian"), 2, "flow.kind=nft has none: use velocity"),
    (train("rollout.policy=reference"), 2, "text.kind=grpo learns from its own outputs only"),
    (train("advantages.std=batch"), 2, "std=batch has no meaning for kind=gdpo"),
    (train("advantages={kind: grpo, joint: [generate, understand]}"), 2, "with as many prompts each"),
    (train("text.weight=0", "flow.weight=0"), 2, "nothing would be trained: give one a positive weight"),
    (train("task_weights={generate: 0, understand: 0, reason: 0}"), 2, "has weight 0: nothing would be trained"),
    (train("mini_updates=9"), 2, "a step has only 8 prompts to deal"),
    (train("gradient_mixing=pcgrd"), 2, "did you mean pcgrad?"),
    (
        train("gradient_mixing=pcgrad", "text.lr_scale=0.5"),
        2,
        "gradients never meet: give both one lr_scale, or use gradient_mixing=sum",
    ),
    (train("rewards=[{name: own_vqa, tasks: [generate]}]"), 2, "every reward is for other tasks only"),
    (train("rewards=[{name: exact_answer}]"), 2, "data.prompts_per_step.generate=2: no reward scores these prompts"),
    (train("rewards=[{name: own_vqa, segments: []}]"), 2, "must have at least 1 entries"),
    (("pretrain", "pretrain", "representation.weight=0.5"), 2, "needs a reading side that has learned to read"),
    (("pretrain", "continued", "init=small", "representation={weight: 1, layer: 9}"), 2, "the policy has 2 layers"),
    (("check", "quickstart", "steps=0"), 2, "must be >= 1"),
    (("check", "quickstart", "policy=nowhere"), 2, "no such folder"),
    (("quickstart", "--steps", "0"), 2, "must be >= 1"),
    (("quickstart", "--policy", "nowhere", "--out", "new"), 2, "no such folder"),
]
MODELS_AND_RUNS: list[Case] = [
    (("evaluate", "smal"), 2, "did you mean small?"),
    (("evaluate", "tinny"), 2, "did you mean tiny?"),
    (("evaluate", "nobody/nothing"), 2, "no such folder, and not in the local Hub cache"),
    (("evaluate", "red.png"), 2, "is a file"),
    (("evaluate", "hollow"), 2, "holds no config.json"),
    (("evaluate", "truncated"), 2, "truncated or damaged"),
    (("evaluate", "foreign"), 2, "a model of type 'llama'"),
    (("evaluate", "oddconfig"), 2, "wings"),
    (("evaluate", "othersize"), 2, "weights do not fit config.json"),
    (("evaluate", "oddtokens"), 2, "tokenizer.json"),
    (train("policy=truncated"), 2, "truncated or damaged"),
    ((*SMALL_TRAIN, "--out", "finished"), 2, "holds this run already"),
    ((*SMALL_TRAIN, "seed=9", "--out", "finished"), 2, "another configuration (seed=0 against 9)"),
    ((*SMALL_TRAIN, "--out", "notes"), 2, "is no run and holds todo.txt"),
    ((*SMALL_TRAIN, "--out", "red.png"), 2, "is a file"),
    (("train", "--resume", "nowhere"), 2, "is not a run directory"),
    (("train", "--resume", "finished"), 2, "has finished"),
    (("train", "--resume", "damaged"), 2, "state.safetensors: has 1000 of"),
    (("train", "--resume", "startless"), 2, "startless/start"),
    ((*SMALL_TRAIN, "seed=9", "--resume", "unfinished"), 2, "another configuration"),
    (("train", "--resume", "unfinished", "--out", "new"), 2, "a resumed run stays where it is"),
    (("quickstart", "--resume", "finished", "--seed", "1"), 2, "--seed: a resumed run keeps its own"),
    (("quickstart", "--quick", "--policy", "small", "--out", "finished"), 2, "another configuration"),
    (("pretrain", "--resume", "unfinished"), 2, "unknown key"),
    (("report", "nowhere"), 2, "is not a run directory"),
    (("report", "notes"), 2, "is not a run directory"),
    (("report", "oddsummary"), 2, "summary.json: not JSON at column 2"),
    (("audit",), 2, "RUN"),
    (("audit", "nowhere"), 2, "nowhere: is not a run directory"),
    (("audit", "notes"), 2, "notes: is not a run directory"),
    (("audit", "unscored"), 2, "unscored: holds no scores of training steps"),
    (("audit", "oddscores"), 2, "step_000002.npz: is not a whole record of scores: delete it"),
    (("report", "oddscores"), 2, "oddscores/scores/step_000002.npz: is not a whole"),
    (("audit", "finished", "--json", "red.png"), 2, "red.png: exists already"),
    (("audit", "finished", "--jsn", "x.json"), 2, "did you mean --json?"),
    (("compare",), 2, "RUN"),
    (("compare", "unfinished"), 2, "no run has results: wait until one has finished"),
]
DATA: list[Case] = [
    (("evaluate", "small", "--benchmark", "genrate"), 2, "did you mean generate?"),
    (("evaluate", "small", "--benchmark", "edit,"), 2, "write NAME or NAME,NAME"),
    (("evaluate", "small", "--json", "red.png"), 2, "red.png: exists already"),
    (("evaluate", "small", "--benchmark", "nothing.jsonl"), 2, "no such file"),
    (("evaluate", "small", "--benchmark", "empty.jsonl"), 2, "empty.jsonl: no rows"),
    (("evaluate", "small", "--benchmark", "noanswer.jsonl"), 2, "give it an 'answer'"),
    (("evaluate", "small", "--benchmark", "noimage.jsonl"), 2, "noimage.jsonl:2: task 'understand' needs a picture"),
    (("evaluate", "small", "--benchmark", "unknownfield.jsonl"), 2, "unknownfield.jsonl:1: unknown field 'anwser'"),
    (("evaluate", "small", "--benchmark", "unknowntask.jsonl"), 2, "undrstand"),
    (("evaluate", "small", "--benchmark", "outside.jsonl"), 2, "outside.jsonl:1: picture '../secret.png' lies outside"),
    (("evaluate", "small", "--benchmark", "absent.jsonl"), 2, "absent.jsonl:1: absent.png: no such picture file"),
    (("evaluate", "small", "--benchmark", "broken.jsonl"), 2, "not a picture that can be read"),
    (("evaluate", "small", "--benchmark", "animated.jsonl"), 2, "animated"),
    (("evaluate", "small", "--benchmark", "huge.jsonl"), 2, "more than 64 megapixels"),
    (("evaluate", "small", "--benchmark", "notjson.jsonl"), 2, "notjson.jsonl:2: not JSON"),
    (("evaluate", "small", "--benchmark", "drawing.jsonl"), 2, "cannot be scored"),
    (train("data={source: jsonl, jsonl: {train: empty.jsonl}}"), 2, "empty.jsonl: no rows"),
    (train("data={source: jsonl, jsonl: {train: drawing.jsonl}}"), 2, "has no rows of task 'understand'"),
    (("generate", "small", "--out", "new"), 2, "give --prompt TEXT or --prompts FILE"),
    (("generate", "small", "--prompt", "a", "--prompts", "blank.txt", "--out", "new"), 2, "one of the two"),
    (("generate", "small", "--prompt", "a red circle"), 2, "--out"),
    (("generate", "small", "--prompt", " ", "--out", "new"), 2, "the text is blank"),
    *((("generate", "small", "--prompt", p, "--out", "new"), 2, "the text is blank") for p in (",", " .!", "\u200b…")),
    (("ask", "small", "--image", "red.png", "?"), 2, "the text is blank"),
    (("generate", "small", "--prompt", "red " * 5000, "--out", "new"), 2, "5002 tokens, the limit is 4096: shorten it"),
    (("ask", "small", "--image", "red.png", "red " * 5000), 2, "5020 tokens, the limit is 4096: shorten it"),
    (
        ("generate", "small", "--prompt", "a" * 1_000_001, "--out", "new"),
        2,
        "has 1000001 characters, more than 1000000",
    ),
    (("generate", "small", "--prompt", "two red circels", "--out", "new"), 2, "did you mean 'circles'?"),
    (("generate", "small", "--prompt", "a red circle", "--out", "red.png"), 2, "red.png"),
    (
        ("generate", "small", "--prompt", "a red circle", "--guidance", "0.5", "--out", "new"),
        2,
        "must be a number >= 1",
    ),
    (("generate", "small", "--prompt", "a red circle", "--num-steps", "0", "--out", "new"), 2, "must be >= 1"),
    (("generate", "small", "--prompts", "missing.txt", "--out", "new"), 2, "missing.txt: no such file"),
    (("generate", "small", "--prompts", "blank.txt", "--out", "new"), 2, "blank.txt: is empty"),
    (("generate", "small", "--prompts", "bytes.txt", "--out", "new"), 2, "not UTF-8"),
    (("generate", "small", "--prompts", "questions.jsonl", "--out", "new"), 2, "questions.jsonl:1: field 'prompt'"),
    (("ask", "small"), 2, "give --image FILE QUESTION, or --questions FILE.jsonl"),
    (("ask", "small", "what color is the circle ?"), 2, "give --image FILE QUESTION"),
    (("ask", "small", "--image", "absent.png", "what ?"), 2, "no such picture file"),
    (("ask", "small", "--image", "broken.png", "what ?"), 2, "damaged picture"),
    (("ask", "small", "--image", "moving.gif", "what ?"), 2, "animated"),
    (("ask", "small", "--image", "huge.png", "what ?"), 2, "more than 64 megapixels"),
    (("ask", "small", "--image", "red.png", "what colour is the circle ?"), 2, "did you mean 'color'?"),
    (("ask", "small", "--questions", "noquestion.jsonl"), 2, "noquestion.jsonl:1: field 'image' is of an older format"),
    (("ask", "small", "--questions", "inside/leaves.jsonl"), 2, "lies outside"),
    (("ask", "small", "--questions", "questions.jsonl", "--out", "red.png"), 2, "red.png: exists already"),
    (("edit", "small", "remove the circle", "--out", "new.png"), 2, "--image"),
    (("edit", "small", "remove the circle", "--image", "red.png", "--out", "new.jpg"), 2, "end the name in .png"),
    (("edit", "small", "remove the circle", "--image", "red.png", "--out", "red.png"), 2, "exists already"),
]
REWARD_CONTRACT: list[Case] = [
    (rewarded_by("NotANumber"), 1, "the score is nan"),
    (rewarded_by("WrongShape"), 1, "returned shape (8, 5) for 8 groups of 4"),
    (rewarded_by("Constant"), 1, "groups with signal"),
    (rewarded_by("Failing"), 1, "the server is away"),
    (rewarded_by("Failing", ", on_failure: stop"), 1, "failed on prompt"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [pytest.param(*case, id=case[2]) for case in COMMAND_LINE + CONFIGURATION + MODELS_AND_RUNS + DATA],
)
def test_wrong_input_is_one_line_and_changes_nothing(
    arguments: tuple[str, ...],
    code: int,
    fragment: str,
    shelf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(shelf)
    monkeypatch.syspath_prepend(shelf)
    before = contents(shelf)
    assert main(arguments) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert fragment in lines[0]
    assert contents(shelf) == before


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"), [pytest.param(*case, id=case[2]) for case in REWARD_CONTRACT]
)
def test_a_broken_reward_stops_the_run_before_its_first_step(
    arguments: tuple[str, ...],
    code: int,
    fragment: str,
    shelf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(shelf / "small", "small")
    monkeypatch.syspath_prepend(shelf)
    assert main([*arguments, "--no-evaluate"]) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert fragment in lines[0]
    assert not Path("new/checkpoints").exists()


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lvrpo.training import checkpoint

    shutil.copytree(shelf / "small", "small")
    save = checkpoint.write_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if "step_000000" not in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    assert main([*SMALL_TRAIN, "--out", "new", "--no-evaluate"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "the disk is full" in line
    assert [path.name for path in Path("new/checkpoints").iterdir()] == ["step_000000"]
    monkeypatch.setattr(checkpoint, "write_tensors", save)
    assert main(["train", "--resume", "new", "--no-evaluate"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [case[0] for case in CONFIGURATION if case[0][0] == "train"],
    ids=[c[2] for c in CONFIGURATION if c[0][0] == "train"],
)
def test_a_wrong_configuration_is_found_before_any_model_loads(
    arguments: tuple[str, ...], shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lvrpo.training import run

    def never(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(shelf)
    monkeypatch.syspath_prepend(shelf)
    monkeypatch.setattr(run, "load_policy", never)
    if "device=gpu" not in arguments:
        assert main(arguments) == 2


def test_debug_shows_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "missing.yaml", "--debug"]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.splitlines()[-1].startswith("error: missing.yaml: no such file")


def test_the_unexpected_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import lvrpo.report

    def broken(run: Path) -> Path:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(lvrpo.report, "build_report", broken)
    assert main(["report", "run"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "error: ZeroDivisionError: division by zero (unexpected: --debug shows where)"


@pytest.mark.parametrize("arguments", [("train", "quickstrat"), ("generate", "nowhere", "--prompt", "a", "--out", "x")])
def test_the_installed_command_behaves_the_same(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "lvrpo", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert list(Path().iterdir()) == []


def test_the_table_is_long_and_every_case_stands_once() -> None:
    cases = COMMAND_LINE + CONFIGURATION + MODELS_AND_RUNS + DATA + REWARD_CONTRACT
    assert len(cases) == len({case[0] for case in cases}) >= 40
