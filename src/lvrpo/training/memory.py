"""How much memory a run will need, before anything is loaded.

What stays (weights, moments, copies) is counted. What comes and goes is found by running the parts of a step on tensors
without memory, at the sizes of the run's own prompts, and adding up what would be alive at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lvrpo.errors import InputError
from lvrpo.policies import POLICIES
from lvrpo.policies.loading import DTYPES, model_type, pick_device, policy_folder
from lvrpo.policies.mot import drawing
from lvrpo.policies.mot.adapter import has_adapter, inject_adapter
from lvrpo.policies.mot.context import Piece, Row
from lvrpo.policies.mot.folder import FolderPolicy
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.policies.mot.sequence import Span, forget_packings
from lvrpo.policies.mot.towers import Grid
from lvrpo.policies.mot.transformer import Cache, Hidden
from lvrpo.registry import resolve
from lvrpo.sampling import guide
from lvrpo.training.config import TrainConfig
from lvrpo.training.objective import MICRO_BATCH
from lvrpo.types import Prompt

JUDGED = ("own_vqa", "agreement", "caption_back", "preference", "mutual", "edit_consistency")
"""Rewards that ask the reading side."""
SMALL_MOMENTS = 4096
"""Parameters of fewer numbers keep moments of 32 bits in ``adamw_8bit``."""
RUNTIME = 96 << 20
"""What the program itself takes beside tensors: measured, with the data of the built-in world."""
WORTH_A_LOOK = 64
"""A model of less than this share of the free memory is trained without asking."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes."""

    stays: Mapping[str, int]
    """Weights and whatever else is there all the time."""
    gradients: int
    """Of the trained weights: there while a step is replayed."""
    passes: Mapping[str, int]
    """What the parts of a step take at their worst; they come one after another."""

    @property
    def peak(self) -> int:
        """The most that is there at once."""
        return sum(self.stays.values()) + max(
            (size + (self.gradients if name.startswith("replay") else 0) for name, size in self.passes.items()),
            default=0,
        )

    @property
    def worst(self) -> str:
        """The part of a step in which that is."""
        sizes = {n: size + (self.gradients if n.startswith("replay") else 0) for n, size in self.passes.items()}
        return max(sizes, key=lambda name: sizes[name])

    def lines(self) -> list[str]:
        """For the terminal, in GiB."""
        rows = [*self.stays.items(), ("gradients", self.gradients)]
        rows += [(f"{name}, while it lasts", size) for name, size in self.passes.items()]
        return [f"{size / 2**30:9.3f}  {name}" for name, size in rows if size >= 2**16]


def estimate_memory(
    config: TrainConfig, prompts: Sequence[Prompt], guard: Sequence[Prompt] = ()
) -> MemoryEstimate | None:
    """The memory of a run on its device, from the sizes in the policy's folder alone.

    ``prompts`` are those of a step, ``guard`` the held-out ones. Texts are taken to be as long as they may be. The
    kernels are those of the CPU; on a card what its libraries keep for themselves comes on top.
    None for a policy of another kind than the Mixture-of-Transformers. Raises InputError for an adapter.
    """
    folder = policy_folder(config.policy)
    if has_adapter(folder):
        raise InputError(f"policy={config.policy}: is an adapter: make one model of it with `lvrpo export` first")
    kind = resolve("model type", model_type(folder), POLICIES)
    if not issubclass(kind, MoTPolicy):
        return None
    forget_packings()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            policy = kind.skeleton(folder, pick_device(config.device), DTYPES.get(config.precision.weights or ""))
        return estimate_policy(policy, config, prompts, guard)
    finally:
        forget_packings()


def estimate_policy(
    policy: MoTPolicy, config: TrainConfig, prompts: Sequence[Prompt], guard: Sequence[Prompt] = ()
) -> MemoryEstimate:
    """As ``estimate_memory``, of a policy on the meta device, which is changed."""
    whole = _bytes(policy.state_dict().values())
    with torch.device("meta"):
        if config.adapter is not None:
            inject_adapter(policy, config.adapter)
    with FakeTensorMode():
        for module in policy.modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                setattr(module, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))
        return _Estimator(policy, config, whole).estimate(prompts, guard)


def require_memory(estimate: MemoryEstimate | None, device: torch.device, what: str) -> None:
    """Raises InputError, with what to change, where less is free than a run will need."""
    if estimate is None:
        return
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if estimate.peak > free:
        raise InputError(
            f"{what}: needs about {estimate.peak / 2**30:.1f} GiB on {device}, {free / 2**30:.1f} GiB are free: "
            f"{_remedy(estimate)}"
        )


def worth_a_look(folder: Path, device: torch.device) -> bool:
    """Whether a model is so large that its memory should be estimated before it is loaded."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) * WORTH_A_LOOK > free


def _remedy(estimate: MemoryEstimate) -> str:
    """What to change about the largest part."""
    stays = dict(estimate.stays)
    copies = stays.get("old, reference and average weights", 0) + stays.get("moments", 0) + estimate.gradients
    largest = max(stays.get("weights", 0), copies, max(estimate.passes.values(), default=0))
    if largest == copies:
        return "train an adapter (adapter.rank=16), or set optimizer.kind=adamw_8bit"
    if largest == stays.get("weights", 0):
        return "set precision.weights=bfloat16 with an adapter, or use a larger device"
    if estimate.worst.startswith("replay"):
        return "set micro_batch to a smaller number, flow.noise_draws or rollout.max_new_tokens too"
    return "set rollout.group_size, data.prompts_per_step, rollout.max_new_tokens or the size of pictures lower"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that are still alive; ``peak`` is the most so far."""

    def __init__(self, not_counted: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in not_counted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any: what torch passes to a mode."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Estimator:
    """The parts of a step, run without memory; see ``estimate_memory``."""

    def __init__(self, policy: MoTPolicy, config: TrainConfig, whole: int) -> None:
        self.policy, self.config = policy, config
        self.whole = whole
        if config.precision.compute is not None:
            policy.compute_in(DTYPES[config.precision.compute])
        self.contexts = policy.contexts
        self.trained = [p for p in policy.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.grad = torch.empty_like(parameter)

    def estimate(self, prompts: Sequence[Prompt], guard: Sequence[Prompt]) -> MemoryEstimate:
        config, group_size = self.config, self.config.rollout.group_size
        gradients = _bytes(self.trained)
        mixed = bool(config.gradient_audit.every) or config.gradient_mixing != "sum"
        tasks = {prompt.task for prompt in prompts}
        copies = 2 * gradients if config.adapter is not None else 3 * self.whole
        passes: dict[str, int] = {}
        if isinstance(self.policy, FolderPolicy):
            passes["load"] = max(0, self.whole - copies)  # the file is read whole beside the policy
        for name, asked, size in (("rollout", prompts, group_size), ("guard", guard, 1)):
            for alike in self._alike(asked):
                at_once = max(1, self.policy._max_rows(self._grid(alike[0])) // size)
                batch = alike[:at_once]
                self._note(passes, f"{name} of {_kind(batch)}", lambda b=batch, s=size: self._rollout(b, s), False)
        for alike in self._alike(prompts):
            if "text" in alike[0].output and config.text.weight:
                self._note(passes, "replay of text", lambda a=alike: self._replay_text(a), True)
            if "image" in alike[0].output and config.flow.weight:
                self._note(passes, "replay of drawings", lambda a=alike: self._replay_drawing(a), True)
        if any(reward.name in JUDGED for reward in config.rewards):
            drawn = [prompt for prompt in prompts if "image" in prompt.output]
            if drawn:
                self._note(passes, "judge", lambda: self._judge(drawn), False)
        stays = {
            "weights": _bytes(self.policy.state_dict().values()),
            "old, reference and average weights": copies,
            "moments": self._moments() * len(config.phases),
            "gradients by task": gradients * (len(tasks) + 1) if mixed else 0,
            "outputs of a step": 2 * sum(self._recorded(prompt) * group_size for prompt in prompts),
            "program": RUNTIME,
        }
        return MemoryEstimate(stays, gradients, passes)

    def _note(self, passes: dict[str, int], name: str, run: Callable[[], None], gradient: bool) -> None:
        """Runs a part and remembers what it took at its worst."""
        kept = [
            *self.policy.parameters(),
            *self.policy.buffers(),
            *(p.grad for p in self.trained if p.grad is not None),
        ]
        with LiveBytes(kept) as live, torch.set_grad_enabled(gradient), self._precision():
            run()
        passes[name] = max(passes.get(name, 0), live.peak)

    def _precision(self) -> AbstractContextManager[object]:
        weights = self.policy.transformer.reading_norm.weight.dtype
        if self.policy.compute_dtype == weights:
            return nullcontext()
        return torch.autocast("cpu", dtype=self.policy.compute_dtype)

    def _moments(self) -> int:
        kind, total = self.config.optimizer.kind, 0
        for name, parameter in self.policy.named_parameters():
            if not parameter.requires_grad:
                continue
            each = 8
            if kind == "adamw_8bit" and parameter.numel() >= SMALL_MOMENTS:
                each = 2
            if kind == "muon" and parameter.ndim == 2 and ".layers." in name and self.config.adapter is None:
                each = 4
            total += each * parameter.numel()
        return total

    def _recorded(self, prompt: Prompt) -> int:
        """Of one trajectory."""
        if "image" not in prompt.output:
            return 0
        grid = self._grid(prompt)
        latent = 4 * grid[0] * grid[1] * self.policy.towers.channels
        steps = len(self._window())
        return latent * (1 + 3 * steps) + 12 * self._pixels(grid)

    def _pixels(self, grid: Grid) -> int:
        height, width = grid
        side = self.policy.image_size
        return side * side if side is not None else height * width * self.policy.config.token_pixels**2  # type: ignore[attr-defined]  # BAGEL

    def _grid(self, prompt: Prompt) -> Grid:
        return self.policy._grid(prompt, self.config.rollout.sampling(self.config.seed, 0))

    def _window(self) -> tuple[int, ...]:
        return self.config.rollout.sampling(self.config.seed, 0).window

    def _alike(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """The prompts by task, kind of output and size, the longest contexts first."""
        classes: dict[object, list[Prompt]] = {}
        for prompt in prompts:
            classes.setdefault((prompt.task, prompt.output, self._grid(prompt)), []).append(prompt)
        return [sorted(same, key=lambda p: -_length(self.policy._row(p))) for same in classes.values()]

    # ---------------------------------------------------------------- parts of a step
    def _prefill(self, rows: Sequence[Row]) -> Cache:
        empty = self.policy.transformer.empty_cache(len(rows))
        if not any(rows):
            return empty
        return self._run([_without_pictures(self.contexts.words.bos_id, row) for row in rows], empty).cache

    def _run(self, rows: Sequence[Row], cache: Cache) -> Hidden:
        latents = self.policy.towers.channels
        given = [
            tuple(
                Piece(p.span, p.ids, grid=p.grid, state=(torch.empty(p.grid[0] * p.grid[1], latents), torch.empty(())))
                if p.span.kind == "clean"
                else p
                for p in row
            )
            for row in rows
        ]
        return self.contexts.run(given, cache)

    def _rollout(self, prompts: Sequence[Prompt], group_size: int) -> None:
        rows = [self.policy._row(prompt) for prompt in prompts]
        self._towers(rows)
        cache = self._prefill(rows)
        owner = torch.arange(len(rows)).repeat_interleave(group_size)
        output = prompts[0].output
        if "text" in output:
            self._write(cache, owner)
            cache, owner = self._score(cache, owner, closed=len(output) > 1), torch.arange(len(owner))
        if "image" in output:
            grid = self._grid(prompts[0])
            latents = self._draw(cache.select(owner), rows, owner, grid, guided=True)
            self.policy.towers.decode_latents(latents, grid)

    def _towers(self, rows: Sequence[Row]) -> None:
        """The reading of all pictures of the contexts, and the encoding of one."""
        pieces = [piece for row in rows for piece in row]
        read = {id(piece.image): piece for piece in pieces if piece.span.kind == "read"}
        if read:
            piece = next(iter(read.values()))
            towers: Any = self.policy.towers  # Any: the pixels of the reading tower are BAGEL's own
            if hasattr(towers, "read_embed"):
                patch = self.policy.config.vit.patch_size  # type: ignore[attr-defined]  # BAGEL
                towers.read_embed(torch.empty(len(read), 3, piece.grid[0] * patch, piece.grid[1] * patch))
        clean = {id(piece.image): piece for piece in pieces if piece.span.kind == "clean"}
        if clean and isinstance(getattr(self.policy.towers, "latent_vae", None), torch.nn.Module):
            grid = next(iter(clean.values())).grid
            towers, pixels = self.policy.towers, self.policy.config.token_pixels  # type: ignore[attr-defined]  # BAGEL
            size = (len(clean), 3, grid[0] * pixels, grid[1] * pixels)
            f = self.policy.config.vae.downsample  # type: ignore[attr-defined]  # BAGEL
            z = (len(clean), self.policy.config.vae.channels, size[2] // f, size[3] // f)  # type: ignore[attr-defined]
            towers.encode_pixels(torch.empty(size), torch.empty(z))  # type: ignore[attr-defined]

    def _write(self, cache: Cache, owner: torch.Tensor) -> None:
        """The last token of the longest texts, no two members alike."""
        tokens = self.config.rollout.max_new_tokens
        words = self.contexts.words
        texts = [(self.contexts.open_text([words.bos_id] * max(0, tokens - 2)),)] * len(owner)
        before = self._run(texts, cache.select(owner)).cache
        hidden = self._run([(Piece(Span("text", 1), (words.bos_id,)),)] * len(owner), before)
        logits = self.policy.towers.text_logits(hidden.reading)
        torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
        hidden.cache.select(torch.arange(len(owner)))

    def _score(self, cache: Cache, owner: torch.Tensor, closed: bool, keep: list[torch.Tensor] | None = None) -> Cache:
        """As ``writing.score``, with texts as long as they may be."""
        tokens = self.config.rollout.max_new_tokens
        ids = [self.contexts.words.bos_id] * (tokens - 1)
        piece = self.contexts.text(ids) if closed else self.contexts.open_text(ids)
        hidden = self._run([(piece,)] * len(owner), cache.select(owner))
        places = torch.arange(tokens * len(owner))
        logits = self.policy.towers.text_logits(hidden.reading.index_select(0, places))
        forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool)
        logits = logits.masked_fill(forbidden, -torch.inf)
        distribution = torch.log_softmax(logits.float() / 1.0, dim=-1)
        chosen = distribution.gather(1, places[:, None])[:, 0]
        entropy = -(distribution.exp() * distribution.masked_fill(distribution == -torch.inf, 0)).sum(-1)
        if keep is not None:
            keep += [chosen, entropy]
        return hidden.cache.select(torch.arange(len(owner))) if closed else hidden.cache

    def _draw(self, full: Cache, rows: Sequence[Row], owner: torch.Tensor, grid: Grid, guided: bool) -> torch.Tensor:
        """One step of a drawing with all its branches."""
        sampling = self.config.rollout
        cut: list[Callable[[Row], Row]] = []
        if guided and sampling.guidance_scale != 1:
            cut = [self.contexts.without_text]
            cut += [self.contexts.without_images] if sampling.image_guidance_scale != 1 else []
        branches = [full]
        for shortened in cut:
            each = self._prefill([shortened(row) for row in rows])
            branches.append(each.select(torch.arange(len(owner)) % len(rows)))
        x_t, t = torch.empty(len(owner), grid[0] * grid[1], self.policy.towers.channels), torch.empty(len(owner))
        v, *others = [drawing.velocity(self.contexts, cache, x_t, t, grid) for cache in branches]
        if others:
            v = guide(
                v,
                others[0],
                others[1] if len(others) > 1 else None,
                guidance_scale=sampling.guidance_scale,
                image_guidance_scale=sampling.image_guidance_scale,
                renorm=sampling.guidance_renorm,
            )
        return x_t - v

    def _replay_text(self, prompts: Sequence[Prompt]) -> None:
        group_size = self.config.rollout.group_size
        members = min(8 * (self.config.micro_batch or MICRO_BATCH), len(prompts) * group_size)
        rows = [self.policy._row(prompt) for prompt in prompts][: -(-members // group_size)]
        owner = torch.arange(members) // group_size
        terms: list[torch.Tensor] = []
        self._towers(rows)
        closed = len(prompts[0].output) > 1
        after = self._score(self._prefill(rows), owner, closed, terms)
        if closed and self.config.flow.kind == "grpo":
            terms.append(self._draw(after, rows, owner, self._grid(prompts[0]), guided=True))
        if self.config.text.kl_coef:
            with torch.no_grad():
                self._score(self._prefill(rows), owner, closed)
        torch.stack([term.float().sum() for term in terms]).sum().backward()

    def _replay_drawing(self, prompts: Sequence[Prompt]) -> None:
        flow, group_size = self.config.flow, self.config.rollout.group_size
        chosen = min(2 * flow.keep, group_size) if flow.kind in ("nft", "grpo") else max(2, flow.keep)
        members = min(self.config.micro_batch or MICRO_BATCH, len(prompts) * chosen)
        prompt_rows = [self.policy._row(prompt) for prompt in prompts][: -(-members // chosen)]
        self._towers(prompt_rows)
        grid, thought = self._grid(prompts[0]), len(prompts[0].output) > 1
        ids = [self.contexts.words.bos_id] * self.config.rollout.max_new_tokens
        rows = [(*row, self.contexts.text(ids)) if thought else row for row in prompt_rows]
        draws = 1 if flow.kind == "grpo" else flow.noise_draws
        owner = (torch.arange(members * draws) // (chosen * draws)) % len(rows)

        def velocity() -> torch.Tensor:
            return self._draw(self._prefill(rows).select(owner), prompt_rows, owner, grid, guided=False)

        if flow.kind == "grpo":
            cache = self._prefill(rows).select(owner)
            terms = [self._draw(cache, prompt_rows, owner, grid, guided=True) for _ in self._window()]
            if flow.kl_coef and flow.kl == "velocity":
                terms += [velocity() for _ in self._window()]
        else:
            terms = [velocity()]
        with torch.no_grad():
            others = [velocity() for _ in range((flow.kind == "nft") + bool(flow.kl_coef or flow.kind == "dpo"))]
        for other in others:
            terms.append((terms[0] - other).square())
        torch.stack([term.square().mean() for term in terms]).sum().backward()

    def _judge(self, prompts: Sequence[Prompt]) -> None:
        """Questions about all drawings, a picture being read once for its questions."""
        rows: list[Row] = []
        pictures = 0
        for prompt in prompts:
            side = self._grid(prompt)
            n = self._read_tokens(side)
            for _ in range(self.config.rollout.group_size):
                pictures += 1
                questions = max(1, len(prompt.facts))
                ids = (self.contexts.words.bos_id,)
                head = Piece(Span("text", n + 2), ids * (n + 2))
                rows += [(head, self.contexts.text(ids * 8))] * questions
        rows = rows[: self.policy._judged_at_once(rows)]
        heads = -(-len(rows) * pictures // sum(max(1, len(p.facts)) * self.config.rollout.group_size for p in prompts))
        cache = self._run([row[:1] for row in rows[:heads]], self.policy.transformer.empty_cache(heads)).cache
        cache = cache.select(torch.arange(len(rows)) % heads)
        cache = self._run([row[1:] for row in rows], cache).cache
        hidden = self._run([(self.contexts.open_text(ids),)] * len(rows), cache.select(torch.arange(len(rows))))
        torch.log_softmax(self.policy.towers.text_logits(hidden.reading).float(), dim=-1).exp()

    def _read_tokens(self, grid: Grid) -> int:
        """Tokens of the reading tower for a drawing of this grid."""
        side = self.policy.image_size
        if side is not None:
            return grid[0] * grid[1]
        pixels = self.policy.config.token_pixels  # type: ignore[attr-defined]  # BAGEL
        rows, columns = self.policy.towers.read_grid(torch.empty(3, grid[0] * pixels, grid[1] * pixels))
        return rows * columns


def _kind(prompts: Sequence[Prompt]) -> str:
    return " and ".join({"text": "text", "image": "drawings"}[kind] for kind in prompts[0].output)


def _length(row: Row) -> int:
    return sum(piece.span.length for piece in row)


def _without_pictures(filler: int, row: Row) -> Row:
    """The row with the tokens of its read pictures as so many words: their tower is run by itself."""
    return tuple(_as_words(piece, filler) for piece in row)


def _as_words(piece: Piece, filler: int) -> Piece:
    if piece.span.kind != "read":
        return piece
    return Piece(Span("text", piece.span.length), (filler,) * piece.span.length)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
