"""Any image-text-to-text model of ``transformers`` as a policy that answers: Qwen-VL, Idefics3, SmolVLM and others.

Letters: R rows, P distinct prompts, L tokens of a prompt, A tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn import functional
from torch.utils.weak import TensorWeakRef

from lvrpo.errors import InputError
from lvrpo.images import to_pil
from lvrpo.policies.adapter import Modules
from lvrpo.policies.base import Sampling, TokenCounts, announce, with_seeds
from lvrpo.policies.decoding import Decoder, generate_text, text_segment
from lvrpo.policies.defaults import with_behavior_logprobs
from lvrpo.policies.tokenizer_files import StoredFiles, stored_files
from lvrpo.policies.transformers_checkpoint import line_of, load_model, read_config, require_same_images, save_model
from lvrpo.policies.transformers_library import quiet_loading, transformers_library
from lvrpo.policies.transformers_policy import THINK_THEN_ANSWER, TransformersPolicy, by_length, require_room
from lvrpo.sampling import derive_seed, token_logprobs, token_scores, uniform_noise
from lvrpo.types import (
    SEGMENT_KINDS,
    Group,
    Parts,
    Prompt,
    SegmentKind,
    SegmentLogprobs,
    TaskKind,
    TextSegment,
    Trajectory,
    segments_through,
)

KIND = "an image-text-to-text model"
KEPT_BYTES = 512 << 20
"""Size limit of the cache of processed prompts."""
FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "processor_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "generation_config.json"),
)
"""Files of a folder besides config.json and the weights, saved unchanged."""
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id")
"""Fields of a configuration that name tokens in whose places features are put; an answer never holds them."""


@dataclass(frozen=True, eq=False)
class ReadPrompt:
    """A prompt as the processor made it."""

    given: tuple[str | TensorWeakRef, ...]
    """Its parts; images are not kept alive."""
    ids: torch.Tensor
    """int64 (L,)."""
    kinds: Mapping[str, torch.Tensor]
    """int64 (L,) by name of an input: the kind of each token."""
    images: Mapping[str, torch.Tensor]
    """Inputs of the vision encoder by name."""

    @property
    def parts(self) -> Parts:
        """Texts and images, for as long as somebody holds these."""
        found = [part if isinstance(part, str) else part() for part in self.given]
        return tuple(part for part in found if part is not None)

    @property
    def nbytes(self) -> int:
        """Its size."""
        tensors = (self.ids, *self.kinds.values(), *self.images.values())
        return sum(len(part) for part in self.given if isinstance(part, str)) + sum(each.nbytes for each in tensors)


_reading = threading.Lock()
"""A rollout engine reads prompts while the policy trains (``rollout.steps_ahead``)."""


class Chat(StoredFiles):
    """A processor of transformers with its chat template; never changed after it is made."""

    def __init__(self, processor: Any, files: Mapping[str, bytes], folder: Path) -> None:
        """``files``: as in ``FILES``, by name. Any: of an optional package."""
        self.processor, self.files, self.folder = processor, files, folder
        self.tokenizer = processor.tokenizer
        self.markers = sorted(
            {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        )
        self._kept: OrderedDict[Hashable, ReadPrompt] = OrderedDict()
        self._bytes = 0

    def read(self, parts: Parts) -> ReadPrompt:
        """A user's message and the start of the answer, by the chat template."""
        key = tuple(part if isinstance(part, str) else id(part) for part in parts)
        with _reading:
            found = self._kept.pop(key, None)
            if found is None or len(found.parts) < len(parts):  # another image has the identity of one that is gone
                self._bytes -= 0 if found is None else found.nbytes
                found = self._read(parts)
                self._bytes += found.nbytes
            self._kept[key] = found
            while len(self._kept) > 1 and self._bytes > KEPT_BYTES:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found

    def _read(self, parts: Parts) -> ReadPrompt:
        made = dict(self.render(parts, tokenize=True, return_dict=True, return_tensors="pt"))
        ids = made.pop("input_ids")
        made.pop("attention_mask", None)
        kinds = {name: made.pop(name)[0] for name, value in [*made.items()] if value.shape == ids.shape}
        for name, value in made.items():
            if value.shape[:2] == ids.shape:
                raise InputError(f"{self.folder}: its processor gives {name} for every token: this is not supported")
        given = tuple(part if isinstance(part, str) else TensorWeakRef(part) for part in parts)
        return ReadPrompt(given, ids[0], kinds, made)

    def answer(self, parts: Parts, text: str) -> list[int]:
        """Ids of a text that answers a prompt, set apart as the chat template does, without the end token."""
        self.check_text(text)
        start, whole = self.render(parts), self.render(parts, text)
        if whole.startswith(start) and text in (rest := whole[len(start) :]):
            text = rest[: rest.index(text) + len(text)]
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def end_of_answer(self) -> int | None:
        """The token that the chat template puts after an answer, which need not be the tokenizer's own end."""
        try:
            rest = self.render(("a",), "yes").rpartition("yes")[2].strip()
        except InputError:  # a template that renders no answers
            return None
        return next(iter(self.tokenizer.encode(rest, add_special_tokens=False)), None)

    def render(self, parts: Parts, answer: str | None = None, **options: Any) -> Any:
        """A user's message in the chat template, and the start or the whole of the answer.

        Any: text, or the processor's inputs where ``options`` ask for them.
        """
        for part in parts:
            if isinstance(part, str):
                self.check_text(part)
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": to_pil(part)}
            for part in parts
        ]
        chat: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        try:
            return self.processor.apply_chat_template(chat, add_generation_prompt=answer is None, **options)
        except Exception as error:  # a template and a processor may fail in any way
            raise InputError(f"{self.folder}: its processor refuses a prompt: {line_of(error)}") from None

    def check_text(self, text: str) -> None:
        """Raises InputError where a text holds a marker of the model."""
        if found := next((marker for marker in self.markers if marker in text), None):
            raise InputError(f"{text[:40]!r}: holds {found}, a marker of the model: leave it out")

    @classmethod
    def load(cls, folder: Path, template: str | None = None) -> Self:
        """Raises InputError, one line, where files are missing or damaged, or there is no chat template.

        ``template``: that of a folder that has none.
        """
        transformers = transformers_library(KIND)
        for names in (("tokenizer.json", "tokenizer.model", "vocab.json"),
                      ("preprocessor_config.json", "processor_config.json")):  # fmt: skip
            if not any((folder / name).is_file() for name in names):
                raise InputError(f"{folder}: holds no {names[0]}: copy it from the published folder")
        try:
            with quiet_loading(transformers):
                processor = transformers.AutoProcessor.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False
                )
        except ImportError as error:
            need = "torchvision" if "orchvision" in str(error) else line_of(error)
            raise InputError(f"{folder}: its processor needs {need}: pip install 'lvrpo[vlm]'") from None
        except Exception as error:  # transformers checks its files in many ways
            raise InputError(
                f"{folder}: its processor cannot be loaded ({line_of(error)}): restore the files"
            ) from None
        if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
            raise InputError(f"{folder}: its processor reads no images: copy the processor's files from the Hub")
        processor.chat_template = processor.chat_template or template
        if not processor.chat_template:
            raise InputError(
                f"{folder}: has no chat template: copy chat_template.jinja (or .json) from a fine-tuned model of chats"
            )
        return cls(processor, stored_files(folder, FILES), folder)


class ImageTextToTextPolicy(TransformersPolicy):
    """A model that ``AutoModelForImageTextToText`` maps; reads images and writes, draws nothing.

    Answers are sampled from the whole distribution at the temperature: what a folder's generation_config.json says of
    top-k, top-p and penalties is not applied; of it only the end tokens count. Members of a group share their prompt,
    which goes through the model once, in the rollout and in every replay; with gradient checkpointing, and in models
    that keep a state beside the keys and values, a replay has one whole row per member.
    """

    segment_kinds: tuple[SegmentKind, ...] = ("text",)
    tasks: tuple[TaskKind, ...] = ("understand", "reason")
    adapter_patterns: ClassVar[Mapping[Modules, str]] = {
        "attention": r"model\.model\.(?P<expert>language_model|text_model)\.layers\.\d+\.self_attn\.[qkvo]_proj",
        "mlp": r"model\.model\.(?P<expert>language_model|text_model)\.layers\.\d+\.mlp\.(gate|up|down)_proj",
        "connector": r"model\.model\.(?P<expert>connector|multi_modal_projector|visual)\."
        r"((?<=visual\.)(merger|deepstack_merger_list)|(?<!visual\.)).*",
        "head": r"model\.(?P<expert>lm_head)",
        "tower": r"model\.model\.(?P<expert>visual|vision_model|vision_tower)\.(?!merger|deepstack_merger_list).+",
    }

    def __init__(self, model: Any, chat: Chat) -> None:
        """Raises InputError where no token ends a text. Any: of an optional package."""
        super().__init__(model)
        self.chat = chat
        config, ends = model.config, model.generation_config.eos_token_id
        ends = chat.tokenizer.eos_token_id if ends is None else ends
        self.end_ids = frozenset(ends if isinstance(ends, list) else [ends])
        if None in self.end_ids:
            raise InputError(f"{chat.folder}: names no end token: give generation_config.json its eos_token_id")
        ends = chat.end_of_answer(), chat.tokenizer.eos_token_id, min(self.end_ids)
        self.end_id: int = next(token for token in ends if token is not None and token in self.end_ids)
        self.shares_prompts = not model._is_stateful
        allowed = torch.ones(config.get_text_config().vocab_size, dtype=torch.bool)
        placeholders = (getattr(config, name, None) for name in PLACEHOLDERS)
        allowed[[i for i in placeholders if isinstance(i, int) and 0 <= i < len(allowed)]] = False
        self.register_buffer("allowed", allowed, persistent=False)

    allowed: torch.Tensor
    """bool (V,): the tokens that an answer may contain."""

    def default_sampling(self, task: TaskKind) -> Sampling:
        """Temperature 1; texts of up to 512 tokens, or of half the positions of a small model."""
        return Sampling(max_new_tokens=self.longest_text)

    def check_text(self, text: str) -> None:
        """Raises InputError where a text holds a marker of the model."""
        self.chat.check_text(text)

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """See ``Policy.count_tokens``."""
        text = sum(len(segment.tokens) for segment in trajectory.segments if isinstance(segment, TextSegment))
        context = len(self.read_prompt(trajectory.prompt).ids)
        return TokenCounts(context, text, 0) if self._shares() else TokenCounts(0, context + text, 0)

    # --- rollout ---

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """Samples a group of answers for every prompt; see ``Policy.sample``. Raises InputError for an image."""
        size, members, new = sampling.group_size, [], sampling.max_new_tokens
        for prompt, seed in with_seeds(prompts, seeds):
            self.check_prompt(prompt, sampling)
            members += [(prompt, self.read_prompt(prompt), m, derive_seed(seed, m)) for m in range(size)]
        drawn: list[Trajectory] = []
        read: Decoder | None = None
        parts = self.cut([len(row.ids) + new for _, row, _, _ in members])
        with self.autocast():
            for part in parts:
                some = [members[i] for i in part]
                u = uniform_noise([derive_seed(seed, "text") for *_, seed in some], (new,)).to(self.device)
                rows = [row for _, row, _, _ in some]
                read = self._read(rows)
                decoder, owner = read.copy(), _places(rows)
                decoder.reserve(new)
                same = nn.Identity()  # the decoder takes ids and gives logits
                texts = generate_text(decoder, owner, same, same, self.end_ids, u, sampling.temperature, self.allowed)
                for (prompt, _, m, seed), ids in zip(some, texts, strict=True):
                    segment = self.make_segment(ids, sampling.temperature)
                    drawn.append(Trajectory(prompt, m, (segment,), seed))
                announce(drawn[-len(some) :])
        reused = read if len(parts) == 1 else None  # only then a replay reads the same batch of prompts
        replayed = self._replay(drawn, entropy=False, read=reused)
        scored = [with_behavior_logprobs(t, found) for t, found in zip(drawn, replayed, strict=True)]
        return [Group(prompt, tuple(scored[p * size : (p + 1) * size])) for p, prompt in enumerate(prompts)]

    def make_segment(self, ids: Sequence[int], temperature: float) -> TextSegment:
        """A sampled text, with log-probs of 0."""
        decode = self.chat.tokenizer.decode
        return text_segment(ids, self.end_ids, temperature, lambda own: decode(own, skip_special_tokens=True))

    def check_prompt(self, prompt: Prompt, sampling: Sampling) -> None:
        """Raises InputError for a prompt that asks for an image or is too long."""
        if prompt.output != ("text",):
            raise InputError(f"prompt {prompt.id!r}: this model reads images and does not draw them: ask for a text")
        require_room(prompt, len(self.read_prompt(prompt).ids), sampling.max_new_tokens, self.positions)

    def read_prompt(self, prompt: Prompt) -> ReadPrompt:
        """The prompt as the processor made it, after the instruction to think where the task is ``reason``."""
        think = prompt.task == "reason"
        return self.chat.read((THINK_THEN_ANSWER, *prompt.parts) if think else prompt.parts)

    # --- the model ---

    def _shares(self) -> bool:
        return self.shares_prompts and not self.checkpointed

    def _inputs(self, prompts: Sequence[ReadPrompt], cache: Any, after: torch.Tensor | None = None) -> dict[str, Any]:
        """The model's arguments, prepared as its own ``generate`` does; prompts are padded on the left.

        ``after``: tokens (R, n) that follow. Any: arguments of classes of an optional package.
        """
        most, pad = max(len(prompt.ids) for prompt in prompts), self.chat.tokenizer.pad_token_id or self.end_id

        def row(values: torch.Tensor, fill: int) -> torch.Tensor:
            return functional.pad(values, (most - len(values), 0), value=fill)

        columns = {name: [row(p.kinds[name], 0) for p in prompts] for name in prompts[0].kinds}
        columns["input_ids"] = [row(p.ids, pad) for p in prompts]
        columns["attention_mask"] = [row(torch.ones_like(p.ids), 0) for p in prompts]
        tokens = {name: torch.stack(rows).to(self.device) for name, rows in columns.items()}
        if after is not None:
            filled = {"input_ids": after, "attention_mask": torch.ones_like(after)}
            tokens = {k: torch.cat([v, filled.get(k, torch.zeros_like(after))], dim=1) for k, v in tokens.items()}
        names = dict.fromkeys(name for prompt in prompts for name in prompt.images)
        images = {name: _stack([p.images[name] for p in prompts if name in p.images]) for name in names}
        given = {**tokens, **{name: value.to(self.device) for name, value in images.items()}}
        ids, mask = given.pop("input_ids"), given["attention_mask"]
        places = self.model._prepare_position_ids_for_generation(ids, dict(given))
        given |= {"attention_mask": None if bool(mask.all()) else mask, "position_ids": places}
        ready = self.model.prepare_inputs_for_generation(
            ids, past_key_values=cache, use_cache=cache is not None, is_first_iteration=True, **given
        )
        return {**ready, "mask": mask}

    def _read(self, prompts: Sequence[ReadPrompt]) -> Decoder:
        """Reads every different prompt once, in order: a row each."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        inputs = self._inputs(list({id(prompt): prompt for prompt in prompts}.values()), cache)
        mask = inputs.pop("mask")
        logits = self.model(**inputs, logits_to_keep=1).logits
        return Decoder(self._forward, cache, mask, inputs["position_ids"][..., -1:], logits[:, -1])

    def _forward(self, x: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        out = self.model(
            input_ids=x, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return out.logits

    def _logits(
        self, prompts: Sequence[ReadPrompt], tokens: torch.Tensor, read: Decoder | None, places: Sequence[int]
    ) -> list[torch.Tensor]:
        """Logits that tokens (R, A) are sampled from, in pieces (R, a, V) along A.

        ``read``: different prompts as ``_read`` leaves them, ``places``: which of them each row's is; None: rows are
        read whole.
        """
        if read is None:
            inputs = self._inputs(prompts, None, tokens[:, :-1])
            del inputs["mask"]
            return [self.model(**inputs, logits_to_keep=tokens.shape[1]).logits]
        decoder = read.copy()
        decoder.select(places)
        first = decoder.last[:, None]
        return [first] if tokens.shape[1] == 1 else [first, decoder.extend(tokens[:, :-1])]

    # --- replay and judging ---

    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        """Differentiable replay, one pass per batch of rows of one temperature; see ``Policy.logprobs``."""
        return self._replay(trajectories, kinds)

    def _replay(
        self,
        trajectories: Sequence[Trajectory],
        kinds: Collection[SegmentKind] = SEGMENT_KINDS,
        entropy: bool = True,
        read: Decoder | None = None,
    ) -> list[list[SegmentLogprobs]]:
        out: list[list[SegmentLogprobs]] = [[] for _ in trajectories]
        alike: dict[float, list[tuple[int, TextSegment]]] = {}
        for i, t in enumerate(trajectories):
            for segment in segments_through(t, kinds):  # at most one
                assert isinstance(segment, TextSegment)
                alike.setdefault(segment.temperature, []).append((i, segment))
        for temperature, same in alike.items():
            prompts = [self.read_prompt(trajectories[i].prompt) for i, _ in same]
            scored = self._score(prompts, [segment.tokens for _, segment in same], temperature, entropy, read)
            for (i, _), found in zip(same, scored, strict=True):
                out[i] = [found]
        return out

    def _score(
        self,
        prompts: Sequence[ReadPrompt],
        tokens: Sequence[torch.Tensor],
        temperature: float,
        entropy: bool = False,
        read: Decoder | None = None,
    ) -> list[SegmentLogprobs]:
        keys = [(id(prompt), tuple(ids.tolist())) for prompt, ids in zip(prompts, tokens, strict=True)]
        different = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))  # the first of equal answers
        chosen = [i for i, key in enumerate(keys) if different[key] == i]
        found: dict[int, SegmentLogprobs] = {}
        lengths = [len(prompts[i].ids) + len(tokens[i]) for i in chosen]
        self.require_positions(length - 1 for length in lengths)  # the last token is not read
        with self.autocast(), self.checkpointing():
            for part in self.cut(lengths):
                rows = [chosen[k] for k in part]
                own, answers = [prompts[i] for i in rows], [tokens[i].to(self.device) for i in rows]
                before = (read or self._read(own)) if self._shares() else None
                scored = self._score_part(own, answers, before, temperature, entropy)
                found.update(zip(rows, scored, strict=True))
        return [found[different[key]] for key in keys]

    def _score_part(
        self,
        prompts: Sequence[ReadPrompt],
        answers: Sequence[torch.Tensor],
        read: Decoder | None,
        temperature: float,
        entropy: bool,
    ) -> list[SegmentLogprobs]:
        """Different answers after prompts that were ``read``, those of about one length together."""
        places = _places(prompts)
        out: dict[int, SegmentLogprobs] = {}
        for alike in by_length([len(ids) for ids in answers]):
            rows = [answers[k] for k in alike]
            whole = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.end_id)
            pieces = self._logits([prompts[k] for k in alike], whole, read, [places[k] for k in alike])
            split = whole.split([piece.shape[1] for piece in pieces], dim=1)
            among = temperature, self.allowed
            columns = [
                token_scores(logits, ids, *among) if entropy else (token_logprobs(logits, ids, *among),)
                for logits, ids in zip(pieces, split, strict=True)
            ]
            joined = [torch.cat(parts, dim=1) for parts in zip(*columns, strict=True)]
            for k, row, ids in zip(alike, range(len(rows)), rows, strict=True):
                out[k] = SegmentLogprobs(*(column[row, : len(ids)] for column in joined))
        return [out[k] for k in range(len(answers))]

    @torch.no_grad()
    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """Mean log-prob per token of each text as the answer to its context; see ``Judge.text_logprob``."""
        pairs = list(zip(contexts, texts, strict=True))
        tokens = [torch.tensor([*self.chat.answer(parts, text), self.end_id]) for parts, text in pairs]
        rows = self._score([self.chat.read(parts) for parts in contexts], tokens, 1.0)
        return torch.stack([row.logprobs.mean().cpu() for row in rows]) if pairs else torch.zeros(0)

    # --- files ---

    def save_model(self, folder: Path) -> None:
        """Writes a folder that ``AutoModelForImageTextToText.from_pretrained`` reads too."""
        save_model(self.model, folder)
        self.chat.save(folder)

    @classmethod
    def read_folder(cls, folder: Path, dtype: torch.dtype, *, weights: bool) -> Self:
        """See ``TransformersPolicy.read_folder``."""
        config = read_config(folder, KIND)
        if config.is_encoder_decoder:
            raise InputError(
                f"{folder}: a model of type {config.model_type!r} answers by a decoder with an encoder of its own: use "
                "one that continues its prompt, such as a Qwen-VL"
            )
        chat = Chat.load(folder)
        require_same_images(folder, chat.processor, config)
        return cls(load_model(folder, dtype, KIND, weights=weights), chat)


def _places(prompts: Sequence[ReadPrompt]) -> list[int]:
    """Maps each item to its index among the distinct prompts."""
    order = {key: i for i, key in enumerate(dict.fromkeys(map(id, prompts)))}
    return [order[id(prompt)] for prompt in prompts]


def _stack(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after another along the first dimension; the others are filled with zeros at their ends, as processors do."""
    most = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    ends = [[most[i] - value.shape[1 + i] for i in reversed(range(len(most)))] for value in values]
    return torch.cat([
        functional.pad(value, [n for end in sizes for n in (0, end)]) for value, sizes in zip(values, ends, strict=True)
    ])  # fmt: skip
