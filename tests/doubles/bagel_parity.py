"""What lvrpo's BAGEL makes of the inputs of the reference vectors, and how far it is from the published model's."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file

from lvrpo.images import to_uint8
from lvrpo.policies.bagel.checkpoint import official_name
from lvrpo.policies.bagel.encoders import position_ids
from lvrpo.policies.bagel.policy import (
    BagelPolicy,
    PackedLosses,
    TrainedPiece,
    TrainedRow,
    dropped,
    find_targets,
    noisy_piece,
    packed_losses,
)
from lvrpo.policies.base import Sampling
from lvrpo.policies.flow import Guidance, guidance_of
from lvrpo.policies.mot import flow_sampler, generate
from lvrpo.policies.mot.attention import Span, pack, row_layout
from lvrpo.policies.mot.model_runner import Piece, Row
from lvrpo.policies.mot.transformer import Cache, Hidden
from lvrpo.policies.patches import patchify, unpatchify
from lvrpo.sampling import shift_time
from lvrpo.types import Image

DEVICE = os.environ.get("LVRPO_TEST_DEVICE", "cpu")
"""Where parity is tested: cpu or cuda."""

GATE = 2e-5
"""max|difference| / max|reference| in float32."""
Errors = dict[str, float]
PACKER = Path(__file__).resolve().parents[1] / "policies" / "bagel" / "vectors" / "pack.py"


def _packer() -> ModuleType:
    """The script beside the excerpt, which is in no package."""
    spec = importlib.util.spec_from_file_location("vectors_pack", PACKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pack_script = _packer()


@dataclass
class Parity:
    """Our outputs against the reference, one method per section: name of the tensor -> error. Integers must agree."""

    folder: Path
    policy: BagelPolicy
    whole: bool = True
    """Whether these are all vectors, not the excerpt: then none may be missing."""

    @cached_property
    def known(self) -> bool:
        """Whether it is the set that limits were measured on, or the excerpt of it; others have other sizes."""
        return not self.whole or pack_script.is_source(self.folder)

    @cached_property
    def meta(self) -> Any:
        return json.loads((self.folder / "io" / "meta.json").read_text())

    def vectors(self, section: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "io" / f"{section}.safetensors", device=str(self.policy.device))

    def errors(self, got: Mapping[str, torch.Tensor], ref: Mapping[str, torch.Tensor], prefix: str = "") -> Errors:
        """Of the tensors that the set has, by name."""
        missing = [name for name in got if prefix + name not in ref]
        assert not (self.whole and missing), missing
        return {name: error(value, ref[prefix + name]) for name, value in got.items() if name not in missing}

    # ---------------------------------------------------------------- sections
    def images(self) -> Errors:
        ref, encoders, out = self.vectors("preproc"), self.policy.encoders, {}
        settings = self.policy.config.settings
        for k in (1, 2):
            raw = image(ref[f"image{k}_uint8"])
            small = settings.latent_resize.apply(raw)
            exact(torch.from_numpy(to_uint8(small)), ref[f"image{k}_vae_resized_uint8"])
            got = {
                "vae_pixels": (small - 0.5) / 0.5,
                "vit_pixels_from_vae_resized": encoders.read_pixels(raw),
                "vit_pixels_direct": (settings.read_resize.apply(raw) - 0.5) / 0.5,
            }
            out |= self.errors({f"image{k}_{name}": value for name, value in got.items()}, ref)
        return out

    @torch.no_grad()
    def text(self) -> Errors:
        ref, about, runner = self.vectors("a_text"), self.meta["a_text"], self.policy.runner
        row = runner.row((about["prompt"],), draws=False)
        exact(torch.tensor(row[0].ids), ref["prompt_ids"])
        exact(torch.from_numpy(row_layout((row[0].span,)).rope_ids), ref["position_ids"])
        hidden = runner.run([row], runner.transformer.empty_cache(1))
        last = len(runner.transformer.layers) - 1
        self.check_context(hidden.cache, about["ctx"])
        two = runner.prefill([runner.row((about["prompt"], about["second_text"]), draws=False)])
        self.check_context(two, about["ctx_two_turn"])
        got = {
            "prefill_hidden": hidden.understanding,
            "prefill_logits": self.policy.encoders.text_logits(hidden.understanding),
            **{f"k_cache_layer{i}": hidden.cache.layer(i)[0][0] for i in (0, last)},
            **{f"v_cache_layer{i}": hidden.cache.layer(i)[1][0] for i in (0, last)},
        }
        turns = self.decode(two, ref, "two_turn_") if "two_turn_decode_logits" in ref else {}
        assert turns or not self.whole
        return self.errors(got, ref) | self.decode(hidden.cache, ref, "") | turns

    @torch.no_grad()
    def understanding(self) -> Errors:
        ref, about, runner = self.vectors("b_und"), self.meta["b_und"], self.policy.runner
        encoders, config = self.policy.encoders, self.policy.config
        last = config.transformer.depth - 1
        one, two = self.source(1), self.source(2)
        pixels = encoders.read_pixels(one)[None].to(self.policy.device)
        rows, columns = encoders.vision_grid(one)
        places = position_ids(rows, columns, config.vit.side)
        exact(places, ref["vit_position_ids"])
        features = encoders.vit(patchify(pixels, config.vit.patch_size), places.to(pixels.device))[0]
        with_places = encoders.read_embed(pixels)[0]
        piece = runner.image(one, "read")
        exact(torch.tensor([piece.ids[0], piece.ids[-1]]), ref["packed_text_ids"])
        exact(torch.from_numpy(row_layout((piece.span,)).rope_ids), ref["packed_position_ids"])
        image = runner.prefill([(piece,)])
        self.check_context(image, about["after_image"])
        asked = runner.prefill([runner.row((one, about["question"]), draws=False)])
        self.check_context(asked, about["after_question"])
        system = self.meta["tokenizer"][4]["text"]
        several = runner.prefill([runner.row((system, one, two, about["question"]), draws=False)])
        self.check_context(several, about["think2img_ctx"])
        return {
            "vit_tokens": error(patchify(pixels, config.vit.patch_size)[0], ref["vit_tokens"]),
            "vit_features": error(features, ref["vit_features"]),
            "connector_out": error(with_places - encoders.vit_position[places], ref["connector_out"]),
            "vit_embed_with_pos": error(with_places, ref["vit_embed_with_pos"]),
            "image_k_cache_layer0": error(image.layer(0)[0][0], ref["image_k_cache_layer0"]),
            "image_v_cache_last": error(image.layer(last)[1][0], ref["image_v_cache_last"]),
            **self.decode(asked, ref, ""),
            **self.decode(several, ref, "think2img_"),
        }

    @torch.no_grad()
    def velocities(self) -> Errors:
        ref, runner, out = self.vectors("c_flow"), self.policy.runner, {}
        encoders, config = self.policy.encoders, self.policy.config
        last = config.transformer.depth - 1
        source = self.source(1)
        latent = encoders.encode_pixels(ref["edit_vae_pixels"], ref["edit_vae_eps"])
        reference = patchify(ref["edit_vae_latent"], config.latent_patch)
        out["edit_vae_latent"] = error(latent, reference)
        exact(position_ids(*encoders.latent_grid(source), config.latent_side), ref["edit_vae_position_ids"])
        encoders.posterior_noise = lambda image, shape: ref["edit_vae_eps"][0].reshape(shape)
        alone = runner.prefill([(runner.image(source, "clean"),)])
        out["edit_vae_k_cache_layer0"] = error(alone.layer(0)[0][0], ref["edit_vae_k_cache_layer0"])
        out["edit_vae_v_cache_last"] = error(alone.layer(last)[1][0], ref["edit_vae_v_cache_last"])
        tags = sorted(name.removesuffix("_x_t") for name in ref if name.endswith("_x_t"))
        assert len(tags) >= (4 if self.whole else 1)
        for tag in tags:
            scenario, time = tag.split("_t", 1)
            grid, caches = self.scenario(scenario)
            noise = runner.noise(grid)
            exact(torch.tensor(noise.ids), ref[f"{scenario}_packed_text_ids"])
            exact(position_ids(*grid, config.latent_side), ref[f"{scenario}_latent_position_ids"])
            x_t, t = ref[f"{tag}_x_t"][None], torch.tensor(float(time), device=self.policy.device)
            for name, cache in (("cond", caches.full), ("no_text", caches.no_text), ("no_image", caches.no_image)):
                assert cache is not None
                v = flow_sampler.velocity(runner, cache, x_t, t[None], grid)[0]
                out[f"{tag}_v_{name}"] = error(v, ref[f"{tag}_v_{name}"])
            for name in (name for name in ref if name.startswith(f"{tag}_cfg_")):
                guidance = guidance_named(name.removeprefix(f"{tag}_cfg_"))
                v = flow_sampler.guided_velocity(runner, caches, x_t, t, guidance, grid)[0]
                out[name] = error(v, ref[name])
        return out

    @torch.no_grad()
    def trajectories(self) -> Errors:
        ref, runner, out = self.vectors("d_traj"), self.policy.runner, {}
        for name, about in self.meta["d_traj"].items():
            sampling, grid, caches = self.trajectory(name)
            assert sampling.num_steps == about["model_steps"] == len(ref[f"{name}_v"])
            drawn = flow_sampler.integrate(runner, caches, sampling, ref[f"{name}_noise"][None], None, grid)
            got = {
                "timesteps": drawn.timesteps[:-1],
                "final_tokens": drawn.latents[0],
                "final_latent_nchw": unpatchify(drawn.latents, self.policy.config.latent_patch, *grid),
                "decoded_float": self.policy.encoders.decode_pixels(drawn.latents, grid),
            }
            out |= self.errors({f"{name}_{key}": value for key, value in got.items()}, ref)
            image = self.policy.encoders.decode_latents(drawn.latents, grid)[0]
            exact_pixels(torch.from_numpy(to_uint8(image)), ref[f"{name}_decoded_uint8"])
            guidance = guidance_of(sampling)
            for i, t in enumerate(drawn.timesteps[:-1]):
                x_t = ref[f"{name}_x"][i][None]
                v = flow_sampler.guided_velocity(runner, caches, x_t, t, guidance, grid)
                x_next = x_t + (drawn.timesteps[i + 1] - t) * v
                out[f"{name}_v[{i}]"] = error(v[0], ref[f"{name}_v"][i])
                out[f"{name}_x[{i + 1}]"] = error(x_next[0], ref[f"{name}_x"][i + 1])
        return out

    @torch.no_grad()
    def autoencoder(self) -> Errors:
        ref, encoders = self.vectors("e_vae"), self.policy.encoders
        mean, log_variance = encoders.latent_vae.moments(ref["pixels"])
        z = encoders.latent_vae.encode(ref["pixels"], ref["eps"])
        got = {
            "moments": torch.cat([mean, log_variance], dim=1),
            "z": z,
            "z_mean_scaled": encoders.latent_vae.encode(ref["pixels"], torch.zeros_like(ref["eps"])),
            "z_tokens": encoders.encode_pixels(ref["pixels"], ref["eps"])[0],
            "recon": encoders.latent_vae.decode(ref["z"]),
        }
        if self.whole:
            got["random_z_decoded"] = encoders.latent_vae.decode(ref["random_z"])
        return self.errors(got, ref)

    def training(self, shift: int) -> Errors:
        """Forward and gradients of one packed batch."""
        ref, about, policy = self.vectors("f_train"), self.meta["f_train"], self.policy
        patch = policy.config.vit.patch_size
        out: Errors = {}
        if self.whole:
            padded = policy.encoders.latent_vae.encode(ref["padded_images"], ref["vae_eps"])
            out["padded_latent"] = error(padded, ref["padded_latent"])
        policy.encoders.vision_grid = lambda image: (image.shape[1] // patch, image.shape[2] // patch)
        policy.encoders.read_pixels = lambda image: (image - 0.5) / 0.5  # the vectors give pixels at their final sizes
        rows = self.training_rows(shift)
        self.check_packing(rows)
        spans = [tuple(trained.piece.span for trained in row) for row in rows]
        seen: list[Hidden] = []
        hook = policy.transformer.register_forward_hook(lambda module, given, hidden: seen.append(hidden))
        policy.zero_grad(set_to_none=True)
        losses: PackedLosses = packed_losses(policy.runner, rows)
        hook.remove()
        ce, mse = losses.cross_entropy.mean(), losses.squared_error.mean()
        (ce + mse).backward()
        gradients = {official_name(n): p.grad for n, p in policy.named_parameters() if p.grad is not None}
        policy.zero_grad(set_to_none=True)
        weights = losses.targets.label_weights
        key = f"shift{shift}_"
        reweighted = (losses.cross_entropy * weights).sum() / weights.sum()
        got = {
            "ce_per_token": losses.cross_entropy,
            "mse_per_element": losses.squared_error,
            "last_hidden": in_row_order(seen[0], spans),
            "loss_ce": ce,
            "loss_mse": mse,
            "loss_ce_reweighted": reweighted,
        }
        out |= self.errors(got, ref, key)
        for name, value in ref.items():
            if name.startswith(key + "grad.") and not zero_in_theory(name):
                out[name] = error(gradients[name.removeprefix(key + "grad.")], value)
        norms = about[f"shift{shift}_grad_norm_per_parameter"]
        for name, norm in norms.items():
            if not zero_in_theory(name) and norm > 0:
                got = float(gradients[name].norm()) if name in gradients else 0.0
                out[f"norm of {name}"] = abs(got - norm) / norm
        assert not [n for n in about[f"shift{shift}_no_grad_parameters"] if n in gradients and gradients[n].any()]
        return out

    @torch.no_grad()
    def dropped_conditions(self) -> Errors:
        patch = self.policy.config.vit.patch_size
        self.policy.encoders.vision_grid = lambda image: (image.shape[1] // patch, image.shape[2] // patch)
        rows = self.training_rows(1, drop=True)
        expected = self.meta["f_train"]["all_conditions_dropped"]
        layouts = [row_layout(tuple(trained.piece.span for trained in row)) for row in rows]
        assert [len(layout.rope_ids) for layout in layouts] == expected["sample_lens"]
        assert torch.cat([torch.from_numpy(x.rope_ids) for x in layouts]).tolist() == expected["packed_position_ids"]
        ids = [i for row in rows for trained in row for i in trained.piece.ids if i >= 0]
        assert ids == expected["packed_text_ids"]
        return {"exact": 0.0}

    # ---------------------------------------------------------------- pieces of sections
    def trajectory(self, name: str) -> tuple[Sampling, tuple[int, int], flow_sampler.GuidanceCaches]:
        """How a recorded trajectory was sampled."""
        about = self.meta["d_traj"][name]
        grid, caches = self.scenario(name)
        sampling = Sampling(
            num_steps=about["num_timesteps"] - 1,
            timestep_shift=about["timestep_shift"],
            solver="euler",
            guidance_scale=about["cfg_text_scale"],
            image_guidance_scale=about["cfg_img_scale"],
            guidance_renorm=about["cfg_renorm_type"],
            guidance_renorm_min=about["cfg_renorm_min"],
            guidance_interval=tuple(about["cfg_interval"]),
        )
        return sampling, grid, caches

    def source(self, k: int) -> Image:
        """A raw image, which the policy brings to the sizes that it reads and draws at."""
        return image(self.vectors("preproc")[f"image{k}_uint8"])

    def check_context(self, cache: Cache, expected: Mapping[str, int]) -> None:
        assert (cache.lengths[0], int(cache.rope)) == (expected["kv_len"], expected["rope"])

    def decode(self, cache: Cache, ref: Mapping[str, torch.Tensor], prefix: str) -> Errors:
        """Feeds the recorded tokens one by one; each but the first must be the most likely one before it."""
        runner, logits, start = self.policy.runner, [], cache
        fed = ref[f"{prefix}decode_input_tokens"].tolist()
        assert fed[0] == runner.tokenizer.bos_id
        for token in fed:
            hidden = runner.run([(Piece(Span("text", 1), (token,)),)], cache)
            logits.append(self.policy.encoders.text_logits(hidden.understanding)[0])
            cache = hidden.cache
        got = torch.stack(logits)
        exact(got.argmax(dim=-1)[:-1], torch.tensor(fed[1:]))
        (text,) = generate.generate_text(
            runner, start, [0], torch.zeros(1, len(fed) - 1, device=got.device), temperature=0.0
        )
        assert list(text.tokens) == fed[1:]
        return {f"{prefix}decode_logits": error(got, ref[f"{prefix}decode_logits"])}

    def scenario(self, name: str) -> tuple[tuple[int, int], flow_sampler.GuidanceCaches]:
        """The grid that is drawn and the three contexts, checked against their recorded lengths."""
        about, runner, encoders = self.meta["c_flow"], self.policy.runner, self.policy.encoders
        texts, expected = about["prompts"], about["scenarios"][name]
        eps = self.vectors("c_flow")["edit_vae_eps"][0]
        encoders.posterior_noise = lambda image, shape: eps.reshape(shape)
        parts = {
            "t2i": (texts["t2i"],),
            "edit": (self.source(1), texts["edit"]),
            "think": (texts["think_system"], texts["t2i"]),
        }[name]
        row = runner.row(parts, draws=True)
        whole: Row = (*row, *runner.row((texts["think_text"],), draws=True)) if name == "think" else row
        guidance = Guidance(2.0, 2.0, "none")
        caches = flow_sampler.prefill_guidance(runner, runner.prefill([whole]), [row], guidance)
        assert caches.no_text is not None
        assert caches.no_image is not None
        self.check_context(caches.full, expected["gen_ctx"])
        self.check_context(caches.no_text, expected["cfg_text_ctx"])
        self.check_context(caches.no_image, expected["cfg_img_ctx"])
        return encoders.default_grid(tuple(expected["image_hw"])), caches

    def training_rows(self, shift: int, drop: bool = False) -> list[TrainedRow]:
        """The packed batch of the vectors from its plans; with ``drop`` every droppable condition is left out."""
        ref, runner, config = self.vectors("f_train"), self.policy.runner, self.policy.config
        logits = ref["packed_timesteps_logit"]
        rows: list[TrainedRow] = []
        latent = offset = patch = 0
        for plan in self.meta["f_train"]["plans"]:
            row: list[TrainedPiece] = []
            for part in plan:
                if part["type"] == "text":
                    piece = runner.text(runner.tokenizer.encode(part["text"]))
                    next_id = part["special_token_label"] if part["special_token_loss"] else None
                    trained = TrainedPiece(piece, bool(part["loss"]), next_id)
                elif part["type"] == "vit_image":
                    size = part["image_chw"][1:]
                    p = config.vit.patch_size
                    n = size[0] // p * (size[1] // p)
                    tokens = ref["packed_vit_tokens"][patch : patch + n]
                    patch += n
                    image = unpatchify(tokens[None], p, size[0] // p, size[1] // p)[0] * 0.5 + 0.5
                    trained = TrainedPiece(runner.image(image, "read"))
                else:
                    h, w = ref["latent_shapes"][latent].tolist()
                    z = ref["padded_latent"][
                        latent : latent + 1, :, : h * config.latent_patch, : w * config.latent_patch
                    ]
                    clean = patchify(z, config.latent_patch)[0]
                    t = shift_time(torch.sigmoid(logits[offset]), float(shift))
                    noise = ref["noise"][offset : offset + h * w]
                    latent, offset = latent + 1, offset + h * w
                    if part["loss"]:
                        trained = noisy_piece(runner.noise((h, w)), clean, noise, t)
                    else:
                        assert float(t) == 0
                        span = Span("clean", h * w + 2)
                        trained = TrainedPiece(Piece(span, runner.noise((h, w)).ids, None, (h, w), (clean, t)))
                if drop and part["enable_cfg"]:
                    left = dropped(trained)
                    row += [] if left is None else [left]
                else:
                    row.append(trained)
            rows.append(row)
        return rows

    def check_packing(self, rows: list[TrainedRow]) -> None:
        """Ids, positions, masks, labels and their places, exactly."""
        ref = self.vectors("f_train")
        spans = [tuple(trained.piece.span for trained in row) for row in rows]
        layouts = [row_layout(row) for row in spans]
        exact(torch.tensor([len(layout.rope_ids) for layout in layouts]), ref["sample_lens"])
        exact(torch.cat([torch.from_numpy(layout.rope_ids) for layout in layouts]), ref["packed_position_ids"])
        visible = torch.block_diag(*[torch.from_numpy(layout.visible).int() for layout in layouts])
        exact(visible, ref["attention_allowed"].int())
        is_drawing = torch.cat([torch.from_numpy(layout.generation) for layout in layouts])
        exact(is_drawing.nonzero()[:, 0], ref["packed_vae_token_indexes"])
        pieces = [trained.piece for row in rows for trained in row]
        ids = torch.tensor([i for piece in pieces for i in piece.ids])
        understanding = (~is_drawing).nonzero()[:, 0]
        exact(ids[ids >= 0], ref["packed_text_ids"])
        exact(understanding[ids >= 0], ref["packed_text_indexes"])
        exact(understanding[ids < 0], ref["packed_vit_token_indexes"])
        config = self.policy.config
        latent = [position_ids(*p.grid, config.latent_side) for p in pieces if p.span.kind in ("clean", "noise")]
        exact(torch.cat(latent), ref["packed_latent_position_ids"])
        read = [position_ids(*p.grid, config.vit.side) for p in pieces if p.span.kind == "read"]
        exact(torch.cat(read), ref["packed_vit_position_ids"])
        targets = find_targets(rows, config.channels, self.policy.device)
        exact(targets.labels, ref["packed_label_ids"])
        exact(understanding[targets.label_rows.cpu()], ref["ce_loss_indexes"])
        exact(is_drawing.nonzero()[:, 0][targets.velocity_rows.cpu()], ref["mse_loss_indexes"])
        assert error(targets.label_weights, ref["ce_loss_weights"]) < 1e-6


def error(got: torch.Tensor, ref: torch.Tensor) -> float:
    assert got.shape == ref.shape, (got.shape, ref.shape)
    got, ref = got.detach().cpu().double(), ref.cpu().double()
    if not ref.any():
        return float("inf") if got.any() else 0.0
    return float((got - ref).abs().max() / ref.abs().max())


def exact(got: torch.Tensor, ref: torch.Tensor) -> None:
    assert torch.equal(got.cpu().to(ref.dtype), ref.cpu())


def exact_pixels(got: torch.Tensor, ref: torch.Tensor) -> None:
    """8-bit values may differ by 1 in under a thousandth of the places."""
    distance = (got.cpu().int() - ref.cpu().int()).abs()
    assert int(distance.max()) <= 1
    assert float((distance > 0).float().mean()) < 1e-3


def image(pixels: torch.Tensor) -> Image:
    """uint8 (H, W, 3) -> (3, H, W) in [0, 1]."""
    return pixels.cpu().permute(2, 0, 1).float() / 255


def guidance_named(name: str) -> Guidance:
    """Of a tensor such as text4_img2_global_min0.6."""
    if name == "img_only_is_ignored":
        return Guidance(1.0, 2.0, "global")
    name, _, least = name.partition("_min")
    for prefix, image_scale in (("text_only_", 1.0), ("text4_img2_", 2.0)):
        if name.startswith(prefix):
            return Guidance(4.0, image_scale, name.removeprefix(prefix), float(least or 0))  # type: ignore[arg-type]
    raise AssertionError(name)


def in_row_order(hidden: Hidden, spans: list[tuple[Span, ...]]) -> torch.Tensor:
    """The two blocks as one packed sequence (N, D)."""
    packing = pack(spans, hidden.understanding.device)
    grid = torch.cat([hidden.understanding, hidden.generation]).index_select(0, packing.grid_source)
    valid = torch.arange(packing.length, device=grid.device) < packing.lengths[:, None]
    return grid[valid.flatten()]


def zero_in_theory(name: str) -> bool:
    """The softmax does not move when all keys are shifted alike, and the vision tower has no rotation."""
    return "vit_model" in name and name.endswith("k_proj.bias")
