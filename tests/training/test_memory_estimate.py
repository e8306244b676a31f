"""The memory of a run, foretold: what is counted by hand, what is alive at once, and a refusal before the load."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from estimates import measure_only
from torch._subclasses.fake_tensor import FakeTensorMode

from lvrpo.cli import main
from lvrpo.config import load_config
from lvrpo.errors import InputError
from lvrpo.policies.bagel.checkpoint import VAE
from lvrpo.policies.bagel.config import config_from_json
from lvrpo.policies.bagel.create import BagelSizes, create_bagel, train_tokenizer
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.loading import load_policy
from lvrpo.policies.mot.attention import Span, pack
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.training import memory
from lvrpo.training.config import TrainConfig
from lvrpo.training.dry_run import memory_needed
from lvrpo.training.memory import MemoryEstimate, require_memory
from lvrpo.training.memory_estimate import PROGRAM, LiveBytes
from lvrpo.training.trainer import Trainer

FEW = ["device=cpu", "data.prompts_per_step={generate: 2, understand: 2}", "rollout={group_size: 4, num_steps: 3}"]


WATCHING = "validation={prompts: {understand: 2}}"


@cache
def needed(folder: Path, *more: str, phases: tuple[str, ...] | None = None) -> MemoryEstimate:
    """Never change it: several tests read the same one. ``phases``: all are measured, or these alone."""
    with pytest.MonkeyPatch.context() as patch:
        if phases is not None:
            measure_only(patch, *phases)
        found = memory_needed(load_config(TrainConfig, None, [f"policy={folder}", *FEW, WATCHING, *more]))
    assert found is not None
    return found


def persistent(folder: Path, *more: str) -> MemoryEstimate:
    """Without what is measured."""
    return needed(folder, *more, phases=())


def test_peak_of_live_bytes() -> None:
    with FakeTensorMode():
        weight = torch.nn.Parameter(torch.empty(100, 100))
        x = torch.empty(50, 100)
        with LiveBytes([weight, x]) as live:
            y = x @ weight  # 20,000 bytes
            assert (live.now, live.peak) == (20_000, 20_000)
            z = y.view(100, 50).t()  # a view takes nothing
            assert live.now == 20_000
            w = torch.relu(y)
            del y, z
            assert live.now == 20_000  # relu keeps its result alone
            w.sum().backward()
            assert live.peak >= 40_000 + 40_000  # the activations, and the gradient of the weight
        assert weight.grad is not None


@pytest.mark.parametrize(("device", "copied"), [("cpu", 8), ("cuda", 8 + 4)])
def test_convolutions_count_with_what_their_kernels_copy(device: str, copied: int) -> None:
    with FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(1, 4, 16, 16), torch.empty(8, 4, 3, 3)
        plane = 4 * 16 * 16  # bytes of a channel
        with LiveBytes([x, weight], device) as live:
            y = torch.conv2d(x, weight, padding=1)
            assert (live.now, live.peak) == (8 * plane, (8 + copied) * plane)
            del y
        with LiveBytes([x, weight], device) as live:
            torch.conv2d(x, weight[:, :, :1, :1])
            assert live.peak == 8 * plane


def test_weights_copies_and_moments_by_hand(small_base: Path) -> None:
    policy = load_policy(small_base)
    assert isinstance(policy, MoTPolicy)
    weights = 4 * sum(tensor.numel() for tensor in policy.state_dict().values())
    trained = 4 * sum(p.numel() for p in policy.parameters())
    plain = persistent(small_base, "optimizer.kind=adamw")
    assert plain.persistent["weights"] == weights
    assert plain.persistent["frozen and averaged weights"] == 3 * weights
    assert plain.persistent["moments"] == 2 * trained
    assert plain.gradients == trained
    matrices = 4 * sum(p.numel() for name, p in policy.named_parameters() if ".layers." in name and p.ndim == 2)
    assert persistent(small_base).persistent["moments"] == 2 * trained - matrices
    assert persistent(small_base, "text.lr_scale=0.5").persistent["moments"] == 2 * (2 * trained - matrices)


def test_gradient_checkpointing_keeps_one_recorded_step(small_base: Path) -> None:
    recorded = [
        "data.prompts_per_step={generate: 1}",
        "rollout={sampler: flow_sde, window: {kind: full}, num_steps: 5}",
        "flow={kind: flow_grpo, kl: velocity, kl_coef: 2}",
    ]

    def replayed(again: bool) -> int:
        changes = [*recorded, "limits.microbatch_size=4", f"limits.gradient_checkpointing={again}"]
        return needed(small_base, *changes, phases=("replay of images",)).transient["replay of images"]

    assert replayed(again=True) < replayed(again=False) / 3


def test_an_unused_old_policy_takes_no_memory(small_base: Path) -> None:
    weights = persistent(small_base).persistent["weights"]
    clipped = persistent(small_base, "rollout.sampler=flow_sde", "flow={kind: flow_grpo, kl: velocity, kl_coef: 2}")
    assert clipped.persistent["frozen and averaged weights"] == 2 * weights


def test_a_refreshed_judge_has_its_own_weights(small_base: Path) -> None:
    weights = persistent(small_base).persistent["weights"]
    for judge, copies in (
        ("{}", 0),
        ("{refresh_every: 2}", 1),
        ("{kind: average}", 1),
        ("{kind: average, refresh_every: 2}", 2),
    ):
        assert persistent(small_base, f"judge={judge}").persistent["the judge's own weights"] == copies * weights


def test_an_adapter_costs_itself_three_times(small_base: Path) -> None:
    pytest.importorskip("peft")
    replays = ("replay of text", "replay of images")
    plain, adapted = persistent(small_base), needed(small_base, "adapter={rank: 2}", phases=replays)
    own = adapted.persistent["weights"] - plain.persistent["weights"]
    assert own > 0
    assert adapted.persistent["frozen and averaged weights"] == 2 * own
    assert adapted.gradients == own
    assert adapted.persistent["moments"] == 2 * own


def test_an_offloaded_run_leaves_one_policy_on_a_card(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(small_base)
    assert isinstance(policy, MoTPolicy)
    weights = 4 * sum(tensor.numel() for tensor in policy.state_dict().values())
    trained = 4 * sum(p.numel() for p in policy.parameters())
    options = "offload=true", "optimizer.kind=adamw"
    here, bare = (
        needed(small_base, *options),
        persistent(
            small_base, *options, "rollout.sampler=flow_sde", "flow={kind: flow_grpo, kl: velocity, kl_coef: 2}"
        ),
    )
    # live, its gradients, average, old, reference, two moments
    assert here.persistent["offloaded"] == 7 * trained
    assert bare.persistent["offloaded"] == 6 * trained
    assert here.persistent["weights"] == weights
    assert here.persistent["moments"] == here.persistent["frozen and averaged weights"] == 0
    assert here.gradients == trained  # all of a step's, before they are summed
    assert 0 < here.transient["replay: summing gradients"] < trained
    config = load_config(TrainConfig, None, [f"policy={small_base}", *FEW[1:], "device=auto", *options])
    measure_only(monkeypatch, "replay of text")
    card = memory_needed(config, torch.device("cuda"))
    assert card is not None
    assert card.persistent["offloaded"] == 0
    records = here.persistent["outputs of a step"] - card.persistent["outputs of a step"]  # in host memory
    assert 0 < records < 2**16
    assert card.host == 7 * trained + records
    offloaded = sum(here.persistent.values()) - sum(card.persistent.values())
    assert offloaded == 7 * trained + records + PROGRAM["cpu"] - PROGRAM["cuda"]
    assert any("in host memory" in line for line in card.lines())


def test_too_little_host_memory_is_refused(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = MemoryEstimate({"weights": 2**30}, 0, {"judge": 0}, host=8 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=6 * 2**30))
    message = r"^policy=p: offload=true needs about 8\.0 GiB of host memory, 6\.0 GiB are free: use more machines"
    with pytest.raises(InputError, match=message):
        require_memory(estimate, torch.device("cpu"), "policy=p")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    require_memory(estimate, torch.device("cpu"), "policy=p")


def test_smaller_parts_take_less(small_base: Path) -> None:
    phases = ("replay of images",)
    whole, parts = needed(small_base), needed(small_base, "limits.microbatch_size=1", phases=phases)
    assert parts.transient["replay of images"] < whole.transient["replay of images"] / 3
    assert parts.persistent == whole.persistent
    assert whole.peak > sum(whole.persistent.values())


def test_nothing_without_memory_is_left_behind(small_base: Path) -> None:
    needed.__wrapped__(small_base)
    assert type(pack([(Span("text", 3),)], torch.device("cpu")).rope_ids) is torch.Tensor


def test_too_little_memory_is_refused_before_the_load(
    small_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    monkeypatch.setattr("lvrpo.training.setup.load_policy", lambda *_: pytest.fail("loaded"))
    measure_only(monkeypatch, "replay of text")
    config = load_config(TrainConfig, None, [f"policy={small_base}", *FEW])
    with pytest.raises(InputError, match=r"policy=.*small: needs about 0\.\d GiB on cpu, 0\.0 GiB are free: "):
        Trainer.start(config, Path("run"))
    assert not Path("run").exists()
    assert main(["check", "quickstart", f"policy={small_base}", *FEW]) == 2
    assert "while it lasts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("persistent", "transient", "remedy"),
    [
        ({"weights": 10, "frozen and averaged weights": 30, "moments": 20}, {"replay": 5}, "train an adapter"),
        ({"weights": 50, "moments": 1}, {"replay": 5}, "precision.weights=bfloat16"),
        ({"weights": 10}, {"replay of text": 99}, "limits.microbatch_size"),
        ({"weights": 10}, {"rollout of images": 99, "replay of text": 1}, "rollout.group_size"),
    ],
)
def test_the_remedy_is_for_the_largest_part(persistent: dict[str, int], transient: dict[str, int], remedy: str) -> None:
    estimate = MemoryEstimate(
        {k: v << 50 for k, v in persistent.items()}, 0, {k: v << 50 for k, v in transient.items()}
    )
    with pytest.raises(InputError, match=remedy):
        require_memory(estimate, torch.device("cpu"), "policy=x")


def test_a_small_model_is_not_estimated(small_base: Path) -> None:
    assert not memory.is_large_model(small_base, torch.device("cpu"))


# --- before the weights are there ---

SIZES = {"width": 16, "depth": 2, "heads": 2, "key_heads": 1, "mlp_width": 16, "vit_width": 8, "vit_depth": 1}
REST = {"vit_heads": 2, "vit_mlp_width": 8, "image_size": 32, "read_side": 4, "latent_side": 4}
ASKED = "data.prompts_per_step={generate: 1, understand: 1}"


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """A small BAGEL without its weights: ``whole`` has them."""
    create_bagel(BagelSizes.model_validate(SIZES | REST), ["a red circle"]).save(tmp_path / "whole")
    (tmp_path / "described").mkdir()
    for file in (tmp_path / "whole").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path / "described")
    return tmp_path / "described"


def test_16_bit_gradients_leave_a_card_after_every_pass(described: Path) -> None:
    policy = load_policy(described.with_name("whole"))
    assert isinstance(policy, MoTPolicy)
    numbers = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    found = needed(
        described.with_name("whole"),
        *(ASKED, "offload=true", "optimizer.kind=adamw", "precision={compute: bfloat16}"),
        phases=("replay of text",),
    )
    assert found.gradients == 0
    assert found.transient["replay: summing gradients"] > 2 * numbers
    # live, its gradients, average, old, two moments; the reference as it was loaded
    assert found.persistent["offloaded"] == (6 * 4 + 2) * numbers


def test_json_files_tell_what_the_weights_tell(described: Path) -> None:
    settings = [*FEW[:1], *FEW[2:], ASKED, WATCHING]
    found = [
        memory_needed(load_config(TrainConfig, None, [f"policy={described.with_name(name)}", *settings]))
        for name in ("whole", "whole", "described")  # the first in a process counts tables that are made once
    ]
    assert found[1] == found[2]
    assert found[1] is not None


def test_published_json_files_tell_the_published_sizes(tmp_path: Path) -> None:
    """As they were published: config.json is no JSON, and no file tells of the autoencoder."""
    llm = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    llm |= {"num_key_value_heads": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "vocab_size": 152064}
    vit = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    (tmp_path / "llm_config.json").write_text(json.dumps(llm | {"max_position_embeddings": 32768}))
    (tmp_path / "vit_config.json").write_text(json.dumps(vit | {"patch_size": 14}))
    (tmp_path / "config.json").write_text("{'no': json}")
    config = config_from_json(tmp_path)
    assert (config.latent_side, config.vit.side, config.vit.depth, config.latent_patch) == (64, 70, 26, 2)
    with torch.device("meta"):
        policy = BagelPolicy(config, train_tokenizer(["a"], 512))
    weights = sum(t.numel() for name, t in policy.state_dict().items() if not name.startswith(VAE))
    assert weights * 2 == pytest.approx(29.2e9, rel=1e-3)  # in bfloat16


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("llm_config.json", '{"hidden_size": 16}', r"llm_config\.\w+=None: no number"),
        ("vit_config.json", "{", "not JSON"),
        ("config.json", '{"vae_config": {"ch": 5}}', "restore the json files"),
        ("config.json", '{"latent_patch_size": "two"}', "restore the json files"),
        ("config.json", '{"latent_patch_size": 0}', "restore the json files"),
    ],
)
def test_json_files_that_tell_nonsense_are_named(described: Path, file: str, content: str, message: str) -> None:
    (described / file).write_text(content)
    with pytest.raises(InputError, match=message):
        config_from_json(described)


def test_a_card_that_is_not_there_and_weights_that_are_not(
    described: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_only(monkeypatch, "replay of text")
    command = ["check", "quickstart", f"policy={described}", *FEW[2:], ASKED, WATCHING]
    assert main([*command, "--card", "78"]) == 0
    out = capsys.readouterr().out
    assert "at most, in the" in out
    assert out.endswith("of 78 GiB are left\n")
    assert main([*command, "--card", "0.01"]) == 2
    said = capsys.readouterr().err
    assert "on a card, 0.0 GiB are free" in said
    assert said.count("\n") == 1
    assert main([*command, "device=cpu", "--card", "78"]) == 2
    assert "device=cpu, and --card 78: leave one of them out" in capsys.readouterr().err
    for wrong in ("0", "nan", "large"):
        assert main([*command, "--card", wrong]) == 2
        assert "must be a number of GiB, such as 78, from 0.001 to 100000" in capsys.readouterr().err
    assert main([*command, "device=cpu"]) == 2
    assert "holds no ema.safetensors, the weights of BAGEL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reward", "judges"),
    [("self_vqa", True), ("edit_consistency, options: {ask: false}", False), ("scene_facts", False)],
)
def test_the_judge_counts_where_a_reward_asks_it(small_base: Path, reward: str, judges: bool) -> None:
    rewards = f"rewards=[{{name: exact_answer}}, {{name: {reward}}}]"
    estimate = needed(small_base, rewards, phases=("judge",))
    assert ("judge" in estimate.transient) == judges
