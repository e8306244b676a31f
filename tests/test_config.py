from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from lvrpo.config import (
    MAX_NUMBER,
    Config,
    config_differences,
    config_sha256,
    default_kind,
    dump_config,
    load_config,
    parse_section,
)
from lvrpo.errors import InputError
from lvrpo.strict_yaml import dump_yaml, parse_yaml
from lvrpo.training.config import TrainConfig


class Adam(Config):
    kind: Literal["adam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.99)


class Early(Config):
    kind: Literal["early"] = "early"
    steps: int = Field(1, ge=1)
    share: float = 0.0
    only_early: int = 0


class Late(Config):
    hints: ClassVar[Mapping[str, str]] = {"kind=last": "is called late"}
    kind: Literal["late", "latest"] = "late"
    steps: int = Field(5, ge=1)
    share: float = 0.5
    only_late: bool = False


Stage = Annotated[Early | Late, Field(discriminator="kind"), default_kind("early")]


class Training(Config):
    hints: ClassVar[Mapping[str, str]] = {
        "step_count": "is called {section}.steps",
        "mode=ppo": "is called clip",
    }
    steps: int = Field(10, ge=1)
    lr: float = Field(1e-3, gt=0)
    clip: float | None = None
    guard: bool = True
    mode: Literal["off", "nft", "clip"] = "nft"
    name: str = "run"
    adam: Adam = Adam()
    stages: Stage | None = None


class Sampling(Config):
    num_steps: int = Field(8, ge=1)
    window: tuple[int, ...] = (0, 1)
    base: Path = Path("assets/base")
    weights: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _window_fits(self) -> Sampling:
        if self.window and self.window[-1] >= self.num_steps:
            raise ValueError(f"num_steps={self.num_steps} but window ends at {self.window[-1]}: use a shorter window")
        return self


class Root(Config):
    training: Training = Training()
    sampling: Sampling = Sampling()
    judge: Sampling | None = None
    seed: int = 0


class Needy(Config):
    data: str


def error_of(cls: type[Config], path: Path | None, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(cls, path, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_file_and_overrides_in_rising_order(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("training:\n  steps: 20\n  lr: 1e-4\n  mode: off\nseed: 3\n")
    config = load_config(Root, file, ["training.steps=30", "sampling.window=[2, 3]", "judge.num_steps=4"])
    assert config.training == Training(steps=30, lr=1e-4, mode="off")
    assert config.sampling.window == (2, 3)
    assert config.judge == Sampling(num_steps=4)
    assert config.seed == 3
    assert load_config(Root) == Root()


def test_text_may_look_like_anything_on_the_command_line() -> None:
    assert load_config(Root, None, ["training.name=2024"]).training.name == "2024"
    assert load_config(Root, None, ["training.name=true"]).training.name == "true"
    assert load_config(Root, None, ["sampling.base=12"]).sampling.base == Path("12")
    assert load_config(Root, None, ["training.name=[1]"]).training.name == "[1]"
    assert load_config(Root, None, ["training.name=a=b"]).training.name == "a=b"
    assert load_config(Root, None, ["training.clip=null"]).training.clip is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=-3", "training.steps=-3: must be >= 1"),
        ("training.lr=0", "training.lr=0: must be > 0"),
        ("training.steps=3.0", "training.steps=3.0: must be a whole number"),
        ("training.steps=3.5", "training.steps=3.5: must be a whole number"),
        ("training.steps=true", "training.steps=true: must be a whole number"),
        ("training.steps='3'", "training.steps='3': must be a whole number"),
        ("training.steps=ten", "training.steps=ten: must be a whole number"),
        ("training.steps=", "training.steps=null: must be a whole number"),
        ("training.lr=.nan", "training.lr=NaN: must be a finite number"),
        ("training.lr=fast", "training.lr=fast: must be a number"),
        ("training.lr='1'", "training.lr='1': must be a number"),
        ("training.clip=abc", "training.clip=abc: must be a number"),
        ("training.guard=yes", "training.guard='yes': must be true or false"),
        ("training.guard=1", "training.guard=1: must be true or false"),
        ("training.name=", "training.name=null: must be text: put it in quotes"),
        ("training.mode=nfd", "training.mode=nfd: must be 'off', 'nft' or 'clip': did you mean nft?"),
        ("training.mode=zzz", "training.mode=zzz: must be 'off', 'nft' or 'clip'"),
        ("training=3", "training=3: must be a section of 'key: value' lines"),
        (
            "training.adam.betas=[0.9]",
            "training.adam.betas=[0.9]: must have more entries",
        ),
        ("sampling.window=3", "sampling.window=3: must be a list [a, b]"),
        ("sampling.window=[1, a]", "sampling.window.1=a: must be a whole number"),
        ("sampling.window=[1, '2']", "sampling.window.1='2': must be a whole number"),
        ("sampling.weights.x=a", "sampling.weights.x=a: must be a number"),
        ("sampling.num_steps=1", "sampling: num_steps=1 but window ends at 1: use a shorter window"),
        ("training.step_count=3", "training.step_count=3: is called training.steps"),
        ("training.mode=ppo", "training.mode=ppo: is called clip"),
        ("training.stpes=3", "training.stpes: unknown key: did you mean training.steps?"),
        ("training.adam.beta=3", "training.adam.beta: unknown key: did you mean training.adam.betas?"),
        ("judge.num_step=3", "judge.num_step: unknown key: did you mean judge.num_steps?"),
        ("steps=3", "steps: unknown key: did you mean training.steps?"),
        ("trainig.steps=3", "trainig: unknown key: did you mean training?"),
        ("zzzz=1", "zzzz: unknown key: there are training, sampling, judge, seed"),
        (
            "training.zzzz=1",
            "training.zzzz: unknown key: training has steps, lr, clip, guard, mode, name, adam, stages",
        ),
        ("seed", "'seed': an override is written section.key=value"),
        ("=3", "'=3': an override is written section.key=value"),
        ("training..steps=3", "'training..steps=3': an override is written section.key=value"),
        ("training.name=[1", "'training.name=[1': the value is not valid YAML: put it in quotes"),
    ],
)
def test_a_wrong_override_gets_one_line(override: str, message: str) -> None:
    assert error_of(Root, None, override) == message


def test_a_renamed_key_or_value_of_a_file_gets_its_new_name(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    for line, message in (
        ("step_count: 3", "step_count=3: is called training.steps"),
        ("mode: ppo", "mode=ppo: is called clip"),
    ):
        file.write_text(f"training: {{{line}}}\n")
        assert error_of(Root, file) == f"{file}: training.{message}"
    with pytest.raises(InputError, match=r"^here\.mode=ppo: is called clip$"):
        parse_section(Training, {"mode": "ppo"}, "here")


def test_a_kind_chooses_the_class_of_a_section(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training: {stages: {share: 0.25, only_early: 3}}\n")
    assert load_config(Root, file).training.stages == Early(share=0.25, only_early=3)
    late = load_config(Root, file, ["training.stages.kind=late"])
    assert late.training.stages == Late(share=0.25)  # what only the other kind has is not inherited
    assert load_config(Root, file, ["training.stages.only_late=true", "training.stages.kind=latest"]) == load_config(
        Root, file, ["training.stages={kind: latest, share: 0.25, only_late: true}"]
    )
    file.with_name("late.yaml").write_text("extends: run.yaml\ntraining: {stages: {kind: late}}\n")
    assert load_config(Root, file.with_name("late.yaml")) == late
    again = load_config(Root, file.with_name("late.yaml"), ["training.stages.kind=early"])
    assert again.training.stages == Early(share=0.25)
    whole = load_config(Root, file, ["training.stages={kind: late, steps: 1}"])
    assert whole.training.stages == Late(steps=1)
    later = load_config(Root, file, ["training.stages.kind=late", "training.stages={share: 0.1}"])
    assert later.training.stages == Early(share=0.1)  # in the order of the command line
    asked = "training.stages.only_early: applies to training.stages.kind=early, not to late: set that, or leave it out"
    assert error_of(Root, file, "training.stages.only_early=1", "training.stages.kind=late") == asked
    file.write_text(dump_config(late))
    assert load_config(Root, file) == late


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "{kind: late, only_early: 3}",
            ".only_early: applies to training.stages.kind=early, not to late: set that, or leave it out",
        ),
        (
            "{only_late: true}",
            ".only_late: applies to training.stages.kind=late or latest, not to early: set one of them, or leave it "
            "out",
        ),
        ("{kind: latr}", ".kind=latr: must be 'early', 'late' or 'latest': did you mean late?"),
        ("{kind: last}", ".kind=last: is called late"),
        ("{kind: [late]}", ".kind=[\"late\"]: must be 'early', 'late' or 'latest'"),
        ("{kind: null}", ".kind=null: must be 'early', 'late' or 'latest'"),
        ("{kind: 3}", ".kind=3: must be 'early', 'late' or 'latest'"),
        ("{kind: late, only_lat: 3}", ".only_lat: unknown key: did you mean training.stages.only_late?"),
        ("{kind: late, steps: '3'}", ".steps='3': must be a whole number"),
        ("{kind: late, steps: 0}", ".steps=0: must be >= 1"),
        ("late", "=late: must be a section of 'key: value' lines"),
    ],
)
def test_what_is_not_of_a_kind_is_refused(given: str, message: str) -> None:
    assert error_of(Root, None, f"training.stages={given}") == f"training.stages{message}"


def test_an_inherited_unknown_key_is_refused_with_any_kind(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training: {stages: {shaer: 0.25}}\n")
    assert "stages.shaer: unknown key: did you mean" in error_of(Root, file, "training.stages.kind=late")


def test_an_override_into_a_value_names_the_value(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("seed: 3\n")
    assert error_of(Root, file, "seed.x=1") == "seed.x=1: seed is 3, not a section: set seed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  steps: -3\n", "{file}: training.steps=-3: must be >= 1"),
        ("training:\n  stpes: 3\n", "{file}: training.stpes: unknown key: did you mean training.steps?"),
        (
            "training:\n  steps: 3\n  steps: 4\n",
            "{file}:3: not valid YAML (key 'steps' stands twice): correct this line",
        ),
        (
            "a: 1\nb: [1, 2\n",
            "{file}:3: not valid YAML (expected ',' or ']', but got '<stream end>'): correct this line",
        ),
        ("- 1\n- 2\n", "{file}:1: holds [1, 2]: a configuration is 'key: value' lines"),
        ("training: &a\n  adam: *a\n", "{file}:1: not valid YAML (holds itself, by an alias): correct this line"),
        ("training:\n  extra: &a [*a]\n", "{file}:2: not valid YAML (holds itself, by an alias): correct this line"),
        ("1: 2\n", None),
        ("extends: 3\n", "{file}: extends=3: must be the path of a YAML file"),
        ("!!python/object:os.system x\n", None),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path: Path, text: str, message: str | None) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    said = error_of(Root, file)
    assert said.startswith(str(file))
    assert message is None or said.startswith(message.format(file=file))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text("seed: 1\n")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert error_of(Root, tmp_path / "quik.yaml") == (
        f"{tmp_path / 'quik.yaml'}: no such file: did you mean {tmp_path / 'quick.yaml'}?"
    )
    assert error_of(Root, tmp_path / "no" / "x.yaml") == f"{tmp_path / 'no' / 'x.yaml'}: no such file: check the path"
    assert "byte 6 is not UTF-8" in error_of(Root, tmp_path / "latin.yaml")
    assert "is a folder, not a regular file" in error_of(Root, tmp_path)


def test_a_missing_key_says_how_to_set_it(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert error_of(Needy, None) == "data: is missing: set it, in the file or as data=VALUE"
    assert error_of(Needy, tmp_path / "empty.yaml", "dta=x") == "dta: unknown key: did you mean data?"


def test_extends_merges_deep_over_several_levels(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("training: {steps: 1, lr: 0.5}\nseed: 1\n")
    (tmp_path / "sub" / "middle.yaml").write_text(
        "extends: ../base.yaml\ntraining: {lr: 0.25}\nsampling: {window: []}\n"
    )
    (tmp_path / "top.yaml").write_text("extends: sub/middle.yaml\nseed: 2\n")
    config = load_config(Root, tmp_path / "top.yaml", ["training.name=x"])
    assert config.training == Training(steps=1, lr=0.25, name="x")
    assert config.sampling.window == ()
    assert config.seed == 2


def test_extends_refuses_a_cycle_and_names_a_missing_parent(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert "extends itself (a.yaml -> b.yaml -> a.yaml): remove one 'extends'" in error_of(Root, tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("extends: c.yaml\n")
    assert error_of(Root, tmp_path / "a.yaml").startswith(f"{tmp_path / 'b.yaml'}: extends=c.yaml: no such file")


@pytest.mark.parametrize("text", ["\x85", "a\u2028b", " \u2029 ", "\n\x85", "é", "\ufeff"])
def test_a_text_of_any_separator_is_dumped_and_read(text: str) -> None:
    assert parse_yaml(dump_yaml({"name": text, text: [text]}), "x") == {"name": text, text: [text]}


@given(
    steps=st.integers(1, MAX_NUMBER),
    lr=st.floats(1e-300, 1e18),
    name=st.text(st.characters(codec="utf-8")),
    window=st.lists(st.integers(-(10**6), 7)).map(tuple),
    weights=st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), st.floats(-1e9, 1e9)),
)
def test_a_dump_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory,
    steps: int,
    lr: float,
    name: str,
    window: tuple[int, ...],
    weights: dict[str, float],
) -> None:
    config = Root(
        training=Training(steps=steps, lr=lr, name=name), sampling=Sampling(window=window, weights=weights), judge=None
    )
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(Root, file) == config


@pytest.mark.parametrize(
    "name", ["1e-4", "off", "null", "12", "0x10", "2024-01-01", "~", "", "<<", ".inf", "1_000", "a: b"]
)
def test_text_that_looks_like_another_type_survives_a_dump(tmp_path: Path, name: str) -> None:
    config = Training(name=name)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(Training, tmp_path / "c.yaml") == config


def test_dump_keeps_the_declared_order_and_the_fingerprint_ignores_it() -> None:
    lines = [line for line in dump_config(Root()).splitlines() if not line.startswith((" ", "-"))]
    assert lines == ["training:", "sampling:", "judge: null", "seed: 0"]
    one = Sampling(weights={"a": 1.0, "b": 2.0})
    assert config_sha256(one) == config_sha256(Sampling(weights={"b": 2.0, "a": 1.0}))
    assert config_sha256(one) != config_sha256(Sampling(weights={"a": 1.0, "b": 2.5}))


def test_differences_name_both_values() -> None:
    one, other = Root().model_dump(mode="json"), Root(seed=4, judge=Sampling()).model_dump(mode="json")
    assert config_differences(one, one) == []
    assert config_differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}}) == ["a.b=1 against 3", "c=2 against unset"]
    assert config_differences(one, other)[:2] == ["judge=null against unset", "seed=0 against 4"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("schedule: {points: [[0, 1], [9, 0]]}", "at step 9 every reward"),
        ("schedule: {kind: step, points: [[0, 1], [7, 0], [9, 1]]}", "at step 7 every reward"),
        ("schedule: {points: [[1000000000, 0]]}", "at step 0 every reward"),
        ("clip: [1, 0]", "low < high"),
        ("normalise: group", "did you mean rewards.0.normalize"),
        ("schedule: {kind: cosine, points: [[0, 1]]}", "schedule.kind"),
    ],
)
def test_rows_of_the_reward_table_that_do_not_fit_are_one_line(row: str, message: str) -> None:
    from lvrpo.training.config import TrainConfig

    overrides = [f"rewards=[{{name: self_vqa, {row}}}]", "data.prompts_per_step={generate: 4}"]
    with pytest.raises(InputError, match=message):
        load_config(TrainConfig, None, overrides)


def test_a_value_inside_an_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\n")
    with pytest.raises(InputError, match=r"^rewards\.0\.weight=-1"):
        load_config(TrainConfig, path, ["rewards=[{name: exact_answer, weight: -1}]"])
