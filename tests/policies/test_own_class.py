"""Policies of somebody else: the class of the guide, and one with the required members alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from discrete_policy import DiscretePolicy

from lvrpo.cli import main
from lvrpo.errors import InputError
from lvrpo.policies.base import Judge, Policy, RolloutPolicy, SavedPolicy, check_text
from lvrpo.policies.loading import load_policy
from lvrpo.registry import allow_code, isolated_permissions
from lvrpo.rewards.agreement import judged_votes
from lvrpo.training.microbatches import LimitsConfig
from lvrpo.types import Prompt


@pytest.fixture(autouse=True)
def consent() -> Iterator[None]:
    with isolated_permissions():
        yield


def test_the_class_of_the_guide_is_a_policy(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (root / "docs/guides/your_model.md").read_text()
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/policy.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    allow_code(["my_package"])
    from my_package.policy import BigramPolicy  # type: ignore[import-not-found]

    BigramPolicy().save(tmp_path / "model")
    policy = load_policy(tmp_path / "model")
    assert isinstance(policy, Policy)
    white = torch.ones(3, 4, 4)
    prompts = [
        Prompt("g", "generate", ("draw white",), ("image",)),
        Prompt("u", "understand", (white, "draw"), ("text",)),
        Prompt("r", "reason", ("draw black",), ("text", "image")),
    ]
    drawing = ["generate", str(tmp_path / "model"), "--out", str(tmp_path / "drawn"), "--allow-code=my_package"]
    assert main([*drawing, "--prompt", "draw blue"]) == 2
    assert "'blue': not among the words of this model: use draw, black, white" in capsys.readouterr().err
    for scale in (1.0, 3.0):
        sampling = replace(policy.default_sampling("generate"), group_size=2, guidance_scale=scale)
        trajectories = [t for group in policy.sample(prompts, sampling, [1, 2, 3]) for t in group.trajectories]
        for trajectory, rows in zip(trajectories, policy.logprobs(trajectories), strict=True):
            for segment, row in zip(trajectory.segments, rows, strict=True):
                assert torch.equal(row.logprobs, segment.behavior_logprobs)
    assert policy.image_logprob([("draw white",)], [white], 1, [0]).shape == (1, 1)
    with pytest.raises(InputError, match="BigramPolicy: has no method 'velocity': write it, or configure the run"):
        policy.velocity(trajectories, white, torch.ones(1))
    for name in ("my_package.policy", "my_package"):
        del sys.modules[name]


class Required(torch.nn.Module):
    """The members of ``RolloutPolicy`` and ``SavedPolicy`` alone."""

    segment_kinds, image_size, compute_dtype = ("text", "tokens"), None, torch.float32

    def __init__(self, policy: DiscretePolicy) -> None:
        super().__init__()
        self.policy = policy

    def save(self, folder: Path) -> None:
        self.policy.save(folder)
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace("discrete_policy:DiscretePolicy", f"{__name__}:Required"))

    @classmethod
    def load(cls, *given: Any) -> Required:
        return cls(DiscretePolicy.load(*given))


def delegate(name: str) -> Callable[..., Any]:
    return lambda self, *given: getattr(self.policy, name)(*given)


for method in ("default_sampling", "sample", "logprobs", "count_tokens", "parameter_groups", "make_reference"):
    setattr(Required, method, delegate(method))


def test_a_class_with_the_required_members_loads_and_what_needs_more_names_the_method(tmp_path: Path) -> None:
    Required(DiscretePolicy()).save(tmp_path)
    allow_code([__name__])
    policy: Any = load_policy(tmp_path)
    assert isinstance(policy, RolloutPolicy)
    assert isinstance(policy, SavedPolicy)
    assert not isinstance(policy, Judge)
    prompt = Prompt("u", "understand", ("say red",), ("text",))
    (group,) = policy.sample([prompt], replace(policy.default_sampling("understand"), group_size=2), [0])
    LimitsConfig().apply(policy)
    check_text(policy, "any text")
    with pytest.raises(InputError, match=r"Required: has no method 'limit_tokens': .* without limits.forward_tokens$"):
        LimitsConfig(forward_tokens=64).apply(policy)
    with pytest.raises(InputError, match="Required: has no method 'text_logprob': write it, or configure the run"):
        judged_votes([group], [["red", "blue"]], policy)


def test_a_class_that_lacks_a_required_member_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Required(DiscretePolicy()).save(tmp_path)
    allow_code([__name__])
    monkeypatch.delattr(Required, "count_tokens")
    with pytest.raises(InputError, match="its class Required lacks count_tokens: write them, or derive it from"):
        load_policy(tmp_path)
