"""Mistakes that a port can make: each moves the reference section named beside it far beyond the gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lvrpo.errors import InputError
from lvrpo.policies import flow
from lvrpo.policies.bagel import encoders as encoders_module
from lvrpo.policies.bagel.create import position_table
from lvrpo.policies.convolutions import Downsample
from lvrpo.policies.mot import attention
from lvrpo.policies.mot.attention import RowLayout, Span
from lvrpo.policies.mot.model_runner import ModelRunner
from lvrpo.policies.mot.transformer import Layer
from lvrpo.sampling import PastStep, euler_step, shift_time

FAR = 1e-4
"""Five times the gate."""
Patch = pytest.MonkeyPatch


def half_the_latent_side(parity: Any, patch: Patch) -> None:
    config = parity.policy.config
    patch.setattr(parity.policy.encoders, "config", config.model_copy(update={"latent_side": config.latent_side // 2}))


def image_width_as_stride(parity: Any, patch: Patch) -> None:
    right = encoders_module.position_ids
    patch.setattr(encoders_module, "position_ids", lambda rows, columns, side: right(rows, columns, columns))


def swapped_experts(parity: Any, patch: Patch, noisy_only: bool, one: str, other: str) -> None:
    """Tokens of expert ``one`` are computed by ``other``, in flow steps alone or in context passes alone."""
    run = ModelRunner.run

    def mistaken(self: ModelRunner, rows: Any, cache: Any, noisy: Any = None, **how: Any) -> Any:
        layers = [layer for layer in self.transformer.layers if isinstance(layer, Layer)]
        kinds = {piece.span.kind for row in rows for piece in row}
        wrong = noisy is not None if noisy_only else kinds == {"clean"}
        with pytest.MonkeyPatch.context() as inner:
            for layer in layers if wrong else []:
                inner.setitem(layer._modules, one, layer._modules[other])
            return run(self, rows, cache, noisy, **how)

    patch.setattr(ModelRunner, "run", mistaken)


def markers_of_a_noisy_image_drawn(parity: Any, patch: Patch) -> None:
    swapped_experts(parity, patch, noisy_only=True, one="understanding", other="generation")


def clean_latents_read(parity: Any, patch: Patch) -> None:
    swapped_experts(parity, patch, noisy_only=False, one="generation", other="understanding")


def other_layout(patch: Patch, change: Callable[[tuple[Span, ...], RowLayout], RowLayout]) -> None:
    right = attention.row_layout
    attention.forget_packings()
    patch.setattr(attention, "row_layout", lambda spans, mask=True: change(spans, right(spans, mask)))


def one_rope_id_per_image_token(parity: Any, patch: Patch) -> None:
    def change(spans: tuple[Span, ...], layout: RowLayout) -> RowLayout:
        n = len(layout.rope_ids)
        return RowLayout(layout.generation, np.arange(n), layout.visible, n)

    other_layout(patch, change)


def causal_inside_images(parity: Any, patch: Patch) -> None:
    def change(spans: tuple[Span, ...], layout: RowLayout) -> RowLayout:
        return RowLayout(layout.generation, layout.rope_ids, np.tril(layout.visible), layout.rope_advance)

    other_layout(patch, change)


def noisy_images_seen_by_all(parity: Any, patch: Patch) -> None:
    def change(spans: tuple[Span, ...], layout: RowLayout) -> RowLayout:
        visible = layout.visible | np.tril(np.ones_like(layout.visible))
        return RowLayout(layout.generation, layout.rope_ids, visible, layout.rope_advance)

    other_layout(patch, change)


def channel_first_patches(parity: Any, patch: Patch) -> None:
    def patchify(images: torch.Tensor, p: int) -> torch.Tensor:
        return functional.unfold(images, p, stride=p).transpose(1, 2)

    patch.setattr(encoders_module, "patchify", patchify)


def thousandfold_time(parity: Any, patch: Patch) -> None:
    parity.policy.encoders.frequencies *= 1000


def sine_before_cosine(parity: Any, patch: Patch) -> None:
    weight = parity.policy.encoders.time_in.weight
    weight.data = weight.data.roll(weight.shape[1] // 2, dims=1)


def no_time_for_clean_latents(parity: Any, patch: Patch) -> None:
    encoders = parity.policy.encoders
    right = encoders.embed_latents

    def mistaken(latents: torch.Tensor, t: torch.Tensor, grid: Any) -> torch.Tensor:
        time = encoders.time_out(functional.silu(encoders.time_in(torch.cat([torch.ones(128), torch.zeros(128)]))))
        return right(latents, t, grid) - (time if not t.any() else 0)

    patch.setattr(encoders, "embed_latents", mistaken)


def wrong_sign(parity: Any, patch: Patch) -> None:
    def mistaken(x_t: torch.Tensor, v: torch.Tensor, t: Any, t_next: Any, past: Any) -> tuple[torch.Tensor, PastStep]:
        return euler_step(x_t, -v, t, t_next, past)

    patch.setattr(flow, "SOLVERS", {"euler": mistaken})


def one_step_more(parity: Any, patch: Patch) -> None:
    patch.setattr(flow, "timestep_grid", lambda n, shift: shift_time(torch.linspace(1, 0, n + 2), shift)[: n + 1])


def guided_outside_the_interval(parity: Any, patch: Patch) -> None:
    patch.setattr(flow.Guidance, "active", lambda self, t: True)


def padding_above_and_left(parity: Any, patch: Patch) -> None:
    patch.setattr(Downsample, "forward", lambda self, x: self.conv(functional.pad(x, (1, 0, 1, 0))))


def mean_instead_of_the_draw(parity: Any, patch: Patch) -> None:
    vae = parity.policy.encoders.latent_vae
    right = vae.encode
    patch.setattr(vae, "encode", lambda pixels, noise: right(pixels, torch.zeros_like(noise)))


def table_computed_anew(parity: Any, patch: Patch) -> None:
    encoders, config = parity.policy.encoders, parity.policy.config
    encoders.latent_position = position_table(config.latent_side, config.transformer.width)


def rows_before_columns(parity: Any, patch: Patch) -> None:
    table = parity.policy.encoders.latent_position
    parity.policy.encoders.latent_position = table.roll(table.shape[1] // 2, dims=1)


def no_norm_after_the_reading_tower(parity: Any, patch: Patch) -> None:
    parity.policy.encoders.vit.post_layernorm = nn.Identity()


def exact_gelu(parity: Any, patch: Patch) -> None:
    right = functional.gelu
    patch.setattr(functional, "gelu", lambda x, approximate="none": right(x))


def base_of_other_models(parity: Any, patch: Patch) -> None:
    inv_freq = parity.policy.transformer.inv_freq
    other = parity.policy.config.transformer.rope_theta / 100
    wrong = other ** (-torch.arange(0, len(inv_freq), 2) / len(inv_freq))
    inv_freq.copy_(torch.cat([-wrong, wrong]))


MISTAKES: list[tuple[Callable[[Any, Patch], None], str]] = [
    (half_the_latent_side, "velocities"),
    (image_width_as_stride, "understanding"),
    (image_width_as_stride, "velocities"),
    (markers_of_a_noisy_image_drawn, "velocities"),
    (clean_latents_read, "velocities"),
    (one_rope_id_per_image_token, "understanding"),
    (one_rope_id_per_image_token, "velocities"),
    (causal_inside_images, "velocities"),
    (noisy_images_seen_by_all, "training"),
    (channel_first_patches, "understanding"),
    (channel_first_patches, "velocities"),
    (thousandfold_time, "velocities"),
    (sine_before_cosine, "velocities"),
    (no_time_for_clean_latents, "velocities"),
    (wrong_sign, "trajectories"),
    (one_step_more, "trajectories"),
    (guided_outside_the_interval, "trajectories"),
    (padding_above_and_left, "autoencoder"),
    (mean_instead_of_the_draw, "velocities"),
    (table_computed_anew, "velocities"),
    (rows_before_columns, "velocities"),
    (no_norm_after_the_reading_tower, "understanding"),
    (exact_gelu, "understanding"),
    (base_of_other_models, "text"),
]


def always_guided(parity: Any) -> bool:
    """Whether no step of a trajectory lies outside its interval of guidance."""
    ref, about = parity.vectors("d_traj"), parity.meta["d_traj"]
    return all(
        row["cfg_interval"][0] < float(t) <= row["cfg_interval"][1] or row["cfg_text_scale"] <= 1
        for name, row in about.items()
        for t in ref[f"{name}_timesteps"]
    )


@pytest.mark.parametrize(("mistake", "section"), MISTAKES, ids=[f"{m.__name__}-{s}" for m, s in MISTAKES])
def test_mistake_is_caught(mistake: Callable[[Any, Patch], None], section: str, parity: Any) -> None:
    if mistake is guided_outside_the_interval and always_guided(parity):
        pytest.skip("the trajectories are guided at every step")
    try:
        with pytest.MonkeyPatch.context() as patch:
            mistake(parity, patch)
            try:
                errors = parity.training(1) if section == "training" else getattr(parity, section)()
            except (AssertionError, InputError):
                return  # integers, lengths or shapes differ, or it does not fit at all
        print(f"{mistake.__name__}, {section}: {max(errors.values()):.1e}")
        assert not all(value <= FAR for value in errors.values())  # nan is far
    finally:
        attention.forget_packings()


def test_stored_tables_are_the_formula_rounded(parity: Any) -> None:
    if not parity.whole:
        pytest.skip("the excerpt has the tables' first rows alone")
    config, encoders = parity.policy.config, parity.policy.encoders
    for table, side in ((encoders.latent_position, config.latent_side), (encoders.vit_position, config.vit.side)):
        expected = position_table(side, config.transformer.width)
        assert float((table - expected.bfloat16().float()).abs().max()) < 1e-2
        assert float((table - expected).abs().max()) <= 2**-8
