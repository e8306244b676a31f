"""What the processes of ``tests/test_distributed.py`` do."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import peft.tuners.lora  # pyright: ignore[reportMissingImports, reportUnusedImport]  # noqa: F401
import torch
import torch._dynamo  # what is imported at its first use: here once for all processes
from small_bagel import SMALL
from torch import nn

from lvrpo import distributed as d
from lvrpo.errors import ContractError, InputError, UnhealthyRunError
from lvrpo.policies.adapter import AdapterConfig, add_adapter
from lvrpo.policies.bagel.create import create_bagel
from lvrpo.policies.base import Sampling
from lvrpo.policies.loading import load_policy
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.training.optimizer import orthogonalize
from lvrpo.types import Example, Prompt

Batches = Sequence[str]
"""Micro-batches of a rank: "t0" is the first text, "d2" the third drawing."""
SIDES: Mapping[str, int] = {"tiny": 32, "bagel": 16}
ADAPTER = AdapterConfig(rank=4, modules=("attention", "mlp"))


def save_bagel(folder: Path) -> None:
    create_bagel(SMALL, ["what color red circle"] * 9).save(folder)


def policy(folder: Path, adapted: bool = False, dtype: str | None = None) -> Any:
    """A saved policy without layers of zeros."""
    loaded = cast(Any, load_policy(folder, dtype=dtype))
    _fill(loaded)
    if adapted:
        add_adapter(loaded, ADAPTER, str(folder))
        _fill(loaded)
    return loaded


def _fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            parameter.copy_(parameter.bfloat16())  # the same weights in whichever dtype they are loaded


def loss(model: Any, batch: str) -> torch.Tensor:
    """Of one micro-batch, whoever computes it."""
    kind, number = batch[0], int(batch[1:])
    side = SIDES["tiny" if isinstance(model, TinyPolicy) else "bagel"]
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(number))
    if kind == "t":
        prompt = Prompt(batch, "understand", (image, "what color"), ("text",))
        output: Any = ("red", "two", "blue circle")[number % 3]
    else:
        prompt = Prompt(batch, "generate", (("red circle", "blue square")[number % 2],), ("image",))
        output = image
    losses = model.supervised_losses([Example(prompt, (output,))], torch.Generator().manual_seed(number))
    return sum(losses.values(), torch.zeros(()))


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A whole copy."""
    tensor = tensor.detach()
    return (cast(Any, tensor).full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(p.detach()) for name, p in model.named_parameters() if p.requires_grad}


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """As a run has them: Muon for the transformer's matrices, AdamW for the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p.ndim == 2 and "layers." in name and ".lora_" not in name for name, p in named]
    matrices = [p for (_, p), chosen in zip(named, muon, strict=True) if chosen]
    others = [p for (_, p), chosen in zip(named, muon, strict=True) if not chosen]
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return [d.ShardedMuon(matrices, orthogonalize, lr=0.01), adamw] if matrices else [adamw]


# --- gradients ---


def gradients(
    folder: Path,
    dealt: Sequence[Batches],
    dtype: torch.dtype | None = None,
    reductions: int = 1,
    adapted: bool = False,
    offload: bool = False,
    loaded: str | None = None,
) -> dict[str, Any]:
    """Gradients of micro-batches that are dealt to the ranks, and the step that follows."""
    model = policy(folder, adapted, loaded)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    d.shard(model, dtype, offload)
    held = sum(d.local(p).numel() for p in model.parameters() if p.requires_grad)
    began, whole = time.perf_counter(), []
    for turn in range(reductions):
        with d.whole_weights(model, reduce=turn % 2 == 0):
            whole = [p.dtype for p in model.parameters() if p.requires_grad]
            for batch in dealt[d.rank()][turn::reductions]:
                loss(model, batch).backward()
            if turn % 2:
                d.reduce_gradients(model)
    found = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    norms = d.gradient_norms(cast(dict[str, list[nn.Parameter]], model.parameter_groups()))
    seconds = time.perf_counter() - began
    for optimizer in optimizers(model):
        optimizer.step()
    return {
        "gradients": found,
        "norms": norms,
        "weights": weights_of(model),
        "held": held,
        "trained": trained,
        "whole": set(whole),
        "frozen": {p.dtype for p in model.parameters() if not p.requires_grad},
        "seconds": seconds,
        "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def rollout(folder: Path) -> list[Any]:
    """Each rank samples its own prompts, some far longer than others; texts and images of all, in order."""
    model = policy(folder)
    d.shard(model)
    prompts = [
        Prompt("a", "understand", (torch.zeros(3, 32, 32), "what color"), ("text",)),
        *(Prompt(f"g{i}", "generate", ("red circle",), ("image",)) for i in range(4)),
    ]

    def sample(own: Sequence[Prompt]) -> list[Any]:
        found = []
        for prompt in own:  # one at a time: what goes together changes the last bits
            group = model.sample([prompt], Sampling(2, num_steps=3), [7])[0]
            found.append([t.text if t.image is None else t.image for t in group.trajectories])
        return found

    with d.whole_weights(model):
        own = sample(d.split_between_ranks(prompts))
    with d.whole_weights(model):  # and again, unevenly: rank 0 alone
        if d.is_main():
            sample(prompts[:2])
    parts = d.gather(own)
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(prompts))]


# --- weight sets ---


def weight_sets(folder: Path, adapted: bool, loaded: str | None, dtype: torch.dtype | None) -> dict[str, Any]:
    """What the module says with each set in place, and the weights that are then whole."""
    model = policy(folder, adapted, loaded)
    dtypes = d.shard(model, dtype)
    sets = d.WeightSets(model)
    sets.add_reference("reference", dtypes)
    sets.add("ema")
    unmoved = sets.differs_from("ema")
    with torch.no_grad():
        for p in sets.parameters.values():
            d.local(p.detach()).add_(0.01)
    sets.lerp("ema", 0.75)
    sets.add("old")
    with torch.no_grad():
        for p in sets.parameters.values():
            d.local(p.detach()).mul_(1.5)
    before = weights_of(model)
    said: dict[str, Any] = {}

    def speak(name: str) -> None:
        with d.whole_weights(model), torch.no_grad():
            said[name] = loss(model, "t0"), loss(model, "d0"), {n: p.clone() for n, p in model.named_parameters()}

    for name in ("policy", "ema", "old", "reference"):
        with sets.use(name):
            speak(name)
            with sets.use(name):  # the same again is nothing
                pass
    with sets.use_extrapolated("reference", 3.0):
        speak("farther")
    with d.whole_weights(model, reduce=True):  # the policy is trained as if nothing had been in its place
        loss(model, "t0").backward()
    try:
        with sets.use("ema"):
            raise InputError("while another set is active")
    except InputError:
        pass
    kept = {name: {key: t.dtype for key, t in kept.items()} for name, kept in sets.sets.items()}
    after = weights_of(model)
    held = sum(d.local(t).numel() * t.element_size() for kept in sets.sets.values() for t in kept.values())
    moved = sets.differs_from("ema"), sets.differs_from("reference")
    with torch.no_grad():
        sets.copy(d.POLICY, "ema")
    return {
        "said": said,
        "same": all(torch.equal(before[name], tensor) for name, tensor in after.items()),
        "policy": before,
        "dtypes": kept,
        "held": held,
        "moved": (unmoved, *moved, sets.differs_from("ema")),
    }


# --- matrices ---


class Matrices(nn.Module):
    """Of many shapes, fewer rows than ranks among them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(12, 8), (8, 12), (7, 5), (1, 6), (3, 3), (12, 8), (12, 8), (2, 9), (5, 16), (12, 8), (12, 8)]
        self.layers = nn.ModuleList(nn.ParameterList([torch.randn(s, generator=generator)]) for s in shapes)


def matrices(steps: int) -> dict[str, Any]:
    """Muon on gradients that are the same however many ranks there are."""
    model = Matrices()
    d.shard(model)
    calls: list[tuple[int, ...]] = []

    def counted(matrices: torch.Tensor) -> torch.Tensor:
        calls.extend([tuple(matrices.shape[1:])] * len(matrices))
        return orthogonalize(matrices)

    optimizer = d.ShardedMuon(list(model.parameters()), counted, lr=0.1, weight_decay=0.01)
    for step in range(steps):
        gradient(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"weights": list(weights_of(model).values()), "calls": d.gather(calls)}


def gradient(model: nn.Module, step: int) -> None:
    """A gradient of a step, the sum over ranks being the same."""
    generator = torch.Generator().manual_seed(step)
    with d.whole_weights(model, reduce=True):
        for parameter in model.parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if d.is_main():
                parameter.grad = value


# --- checkpoints ---


class Odd(nn.Module):
    """Parameters that no number of ranks divides, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(2))
        self.head = nn.Parameter(torch.zeros(1, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)


def state_of(model: nn.Module, sets: d.WeightSets, found: Sequence[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in model.named_parameters()}
    moments = {
        f"moments.{i}.{names[id(p)]}.{key}": value
        for i, optimizer in enumerate(found)
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state[p].items()
    }
    weights = {f"{name}.{key}": t for name in (d.POLICY, *sets.sets) for key, t in sets[name].items()}
    return {**weights, **moments}


def train_and_keep(folder: Path, begin: int, steps: int, background: bool = False) -> dict[str, Any]:
    """Goes on from the checkpoint of ``begin``, if there is one, and saves after so many steps."""
    model = Odd()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape) + i)
    dtypes = d.shard(model)
    sets, found = d.WeightSets(model), optimizers(model)
    sets.add("ema", dict.fromkeys(dtypes, torch.bfloat16))
    sets.add("old")
    if begin:
        gradient(model, 0)  # the optimizers then have a state to read into
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        d.load_sharded(folder / str(begin), state_of(model, sets, found))
    for step in range(begin, begin + steps):
        gradient_of_trainable(model, step)
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        sets.lerp("old", 0.5)
    at = folder / str(begin + steps)
    d.on_main(lambda: at.mkdir(parents=True))
    gradient_of_trainable(model, 98)  # what is saved may have a gradient
    state = state_of(model, sets, found)
    expected = {name: full(t) for name, t in state.items()}
    seconds = time.perf_counter()
    if background:
        saving = d.save_sharded_async(at, state)
        seconds = time.perf_counter() - seconds
        gradient_of_trainable(model, 99)  # training goes on
        for optimizer in found:
            optimizer.step()
        saving.wait()
    else:
        d.save_sharded(at, state)
        seconds = time.perf_counter() - seconds
    return {"state": expected, "files": sorted(path.name for path in at.iterdir()), "seconds": seconds}


def gradient_of_trainable(model: nn.Module, step: int) -> None:
    """As ``gradient``, of what is trained."""
    generator = torch.Generator().manual_seed(step)
    with d.whole_weights(model, reduce=True):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            value = torch.randn(parameter.shape, generator=generator)
            if d.is_main():
                parameter.grad = value


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    found = {n: torch.empty(entry.size, dtype=entry.properties.dtype) for n, entry in d.stored_tensors(folder).items()}
    d.load_sharded(folder, found)
    return found


def save_where_one_cannot(folder: Path, background: bool) -> str:
    """Rank 1's disk is full."""
    import torch.distributed.checkpoint.filesystem as files

    model = Odd()
    d.shard(model)
    if d.rank() == 1:
        create = files.FileSystem.create_stream

        def failing(self: Any, path: Any, mode: str) -> Any:
            if "w" in mode:
                raise OSError(28, os.strerror(28), str(path))
            return create(self, path, mode)

        cast(Any, files.FileSystem).create_stream = failing
    state = dict(model.named_parameters())
    try:
        if background:
            d.save_sharded_async(folder, state).wait()
        else:
            d.save_sharded(folder, state)
    except InputError as error:
        assert d.gather(d.rank()) == list(range(d.world_size()))  # the group is as good as before
        return str(error)
    return ""


def load_another(folder: Path) -> str:
    """A checkpoint of other weights."""
    model = Matrices()
    d.shard(model)
    try:
        d.load_sharded(folder, {f"policy.{name}": p for name, p in model.named_parameters()})
    except InputError as error:
        return str(error)
    return ""


# --- errors and ends ---

ERRORS: dict[str, Callable[[], Exception]] = {
    "input": lambda: InputError("too long: shorten it"),
    "contract": lambda: ContractError("a promise was broken"),
    "not_well": lambda: UnhealthyRunError("diverged"),
    "other": lambda: ValueError("a\nb"),
}


def fail(kind: str, ranks: Sequence[int], where: str) -> dict[str, Any]:
    """An error on some ranks: what each raises, who reports it, and whether the group works afterwards."""
    model = Odd()
    d.shard(model)

    def work() -> None:
        if d.rank() in ranks:
            raise ERRORS[kind]()

    found: dict[str, Any] = {"raised": None}
    try:
        if where == "relay_errors":
            with d.relay_errors():
                work()
        elif where == "main":
            d.on_main(work)
        else:
            with d.whole_weights(model, reduce=True):
                model.head.sum().backward()
                work()
    except Exception as error:
        found = {"raised": f"{type(error).__name__}: {error}", "reports": d.should_print(cast(Any, error))}
    found["left"] = [p.grad is None for p in model.parameters()]
    with d.whole_weights(model, reduce=True):
        (model.head.sum() * (1 + d.rank())).backward()
    found["after"] = full(cast(Any, model.head.grad)).tolist()
    return found


def collectives() -> dict[str, Any]:
    own, size = d.rank(), d.world_size()
    items = list(range(7))
    return {
        "gather": d.gather({"rank": own}),
        "sum": d.sum_over_ranks(torch.full((2,), own + 1.0)).tolist(),
        "dealt": d.split_between_ranks(items),
        "main": d.on_main(lambda: [d.rank(), size]),
        "is_main": d.is_main(),
    }


def wait_to_be_left(folder: Path, where: str) -> None:
    """Says that it is there, then works with the others for ever."""
    model = Odd()
    d.shard(model)
    for turn in range(10_000):
        if turn == 3:
            (folder / f"ready_{d.rank()}").touch()
        if where == "collective":
            d.gather(turn)
            time.sleep(0.01)
        else:
            with d.whole_weights(model, reduce=True):
                model.head.sum().backward()
                time.sleep(0.01 * (1 + d.rank()))
