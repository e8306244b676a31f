from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.published import Semantic
from lvrpo.rewards.table import build_rewards
from lvrpo.types import Group, Image, Prompt

CUBE = Prompt("cube", "generate", ("draw red cube",), ("image",))


class Reads:
    """A policy whose states are known: of a text one row per word, of an image its four corners (two numbers each)."""

    image_size = 4
    words = {"red": (1.0, 0.0), "cube": (0.0, 1.0)}  # noqa: RUF012

    def hidden_states(self, parts: Sequence[str | Image], layer: int) -> list[torch.Tensor]:
        self.layer = layer
        self.asked = [part for part in parts if isinstance(part, str)]
        return [
            torch.tensor([self.words[w] for w in p.split()])
            if isinstance(p, str)
            else p[:2, ::3, ::3].flatten(1).T.contiguous()
            for p in parts
        ]


def corners(*states: tuple[float, float]) -> Image:
    """An image with these states."""
    image = torch.zeros(3, 4, 4)
    image[:2, ::3, ::3] = torch.tensor(states).T.view(2, 2, 2)
    return image


def score(group: Callable[..., Group], images: Sequence[Image], **options: Any) -> Any:
    return Semantic(**options).score([group(CUBE, [[image] for image in images])], Reads())  # type: ignore[arg-type]


def test_the_global_form_is_the_cosine_of_the_means(group: Callable[..., Group]) -> None:
    images = [
        corners((1, 1), (1, 1), (1, 1), (1, 1)),
        corners((1, 0), (1, 0), (1, 0), (1, 0)),
        corners(*[(-1, -1)] * 4),
    ]
    assert score(group, images, form="global").values[0].tolist() == pytest.approx([1, 1 / math.sqrt(2), -1])


def test_the_dense_form_is_the_mean_of_the_best_patches_of_every_word(group: Callable[..., Group]) -> None:
    image = corners((1, 0), (0, 3), (-1, 0), (0, -1))
    # of each word the four cosines are 1, 0, 0, -1
    for top, expected in ((1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.0), (9, 0.0)):
        assert score(group, [image], top=top).values.item() == pytest.approx(expected, abs=1e-6)


def test_one_patch_satisfies_the_maximum_and_not_the_mean_of_the_top(group: Callable[..., Group]) -> None:
    honest, trick = corners(*[(1, 1)] * 4), corners((1, 0), (0, 1), (-1, -1), (-1, -1))
    assert score(group, [honest, trick], top=1).values[0].argmax() == 1
    assert score(group, [honest, trick], top=4).values[0].argmax() == 0


def test_prompts_are_taken_as_captions_and_read_once(group: Callable[..., Group]) -> None:
    judge = Reads()
    image = corners(*[(1, 1)] * 4)
    Semantic(layer=3).score([group(CUBE, [[image], [image]])], judge)  # type: ignore[arg-type]
    assert judge.asked == ["red cube"]
    assert judge.layer == 3


def test_images_that_cannot_be_judged(group: Callable[..., Group]) -> None:
    image = corners(*[(1, 1)] * 4)
    scores = score(group, [image, image * math.nan, torch.zeros(3, 8, 6)])
    assert scores.values[0, 0].isfinite()
    assert scores.failures == {
        (0, 1): "the image holds values that are no numbers",
        (0, 2): "an image of 6 x 8: the judge reads 4 x 4",
    }
    assert score(group, [torch.zeros(3, 8, 8)]).values.isnan().all()


def test_of_texts_it_is_masked_and_says_so_once() -> None:
    reward = Semantic()
    text = Prompt("t", "understand", (torch.zeros(3, 4, 4), "what ?"), ("text",))
    with pytest.warns(UserWarning, match="semantic: of texts .* is one number for the whole group, and masked"):
        assert not reward.applies(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not reward.applies(text)
        assert reward.applies(CUBE)
        assert reward.applies(Prompt("r", "reason", ("draw one",), ("text", "image")))
        assert not reward.applies(Prompt("e", "edit", (torch.zeros(3, 4, 4), "make it red"), ("image",)))


def test_the_tiny_policy_reads_texts_and_images_alone(group: Callable[..., Group]) -> None:
    sizes = MoTConfig(width=32, depth=2, heads=2, key_heads=2, mlp_width=32)
    policy = TinyPolicy.from_vocabulary(TinyConfig(image_size=16, tower_width=16, transformer=sizes), ("red", "cube"))
    for parameter in policy.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    images = [torch.rand(3, 16, 16) for _ in range(3)]
    for layer in (0, 1, 2):
        states = policy.hidden_states([images[0], "red cube", images[1], "cube"], layer)
        assert [tuple(s.shape) for s in states] == [(4, 32), (2, 32), (4, 32), (1, 32)]
        alone = policy.hidden_states([images[1]], layer)[0]
        assert torch.allclose(states[2], alone, atol=1e-6)
        assert torch.allclose(alone[None], policy.image_features([images[1]], layer), atol=1e-6)
        assert not states[0].requires_grad
    prompt = Prompt("p", "generate", ("draw red cube",), ("image",))
    values = Semantic().score([group(prompt, [[image] for image in images])], policy).values
    assert values.isfinite().all()
    assert values.unique().numel() == 3
    with pytest.raises(InputError, match="layer=3: the policy has 2 layers: use 0 to 2"):
        Semantic(layer=3).score([group(prompt, [[images[0]]])], policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "sparse"}, "semantic.options.form=sparse: must be 'dense' or 'global'"),
        ({"top": 0}, "semantic.options.top=0: must be >= 1"),
        ({"top": 1.5}, "semantic.options.top=1.5: must be a whole number"),
        ({"layer": -1}, "semantic.options.layer=-1: must be >= 0"),
        ({"source": "nowhere"}, "options.source=nowhere: no folder with a config.json: give a local folder, or own"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_rewards([RewardConfig(name="semantic", options=options)])


def test_a_folder_without_a_tower_is_refused(group: Callable[..., Group], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for content, message in (
        ("{", "not JSON at column 2"),
        ("[]", "model_type=None: use a folder of siglip, siglip2 or clip"),
        ('{"model_type": "bert"}', "model_type='bert'"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(InputError, match=message) as caught:
            build_rewards([RewardConfig(name="semantic", options={"source": str(tmp_path)})])
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    groups = [group(CUBE, [[torch.zeros(3, 4, 4)]])]
    reward = Semantic(source=str(tmp_path))
    with pytest.raises(InputError, match="AutoModel cannot be loaded") as caught:
        reward.score(groups, Reads())  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
