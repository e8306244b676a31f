"""Supervised training of BAGEL in one packed pass: what is predicted where, and condition dropout.

A row is a list of pieces; text with a loss predicts its ids and its end, a picture being drawn its velocity. Whatever
comes after a noisy picture does not see it, so one row may teach several drawings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from lvrpo.policies.mot.context import Contexts, Piece
from lvrpo.policies.mot.sequence import Span


@dataclass(frozen=True, eq=False)
class TrainedPiece:
    """A piece of a supervised row."""

    piece: Piece
    loss: bool = False
    """Text: whether its ids and its end are predicted. A noisy picture: whether its velocity is."""
    next_id: int | None = None
    """What the closing token predicts, such as the begin of a picture; nothing by default."""
    noise: torch.Tensor | None = None
    """(N, C): the noise of a noisy picture."""
    clean: torch.Tensor | None = None
    """(N, C): the latent of a noisy picture."""


TrainedRow = Sequence[TrainedPiece]


@dataclass(frozen=True)
class Targets:
    """What a packed batch is asked, as rows of its two blocks."""

    labels: torch.Tensor
    """int64 (n,): the tokens to predict."""
    label_rows: torch.Tensor
    """int64 (n,): rows of the reading block that predict them."""
    label_weights: torch.Tensor
    """float32 (n,): 1 / sqrt(predicted tokens of the text)."""
    velocity_rows: torch.Tensor
    """int64 (m,): rows of the drawing block with a flow loss."""
    velocities: torch.Tensor
    """float32 (m, C): noise - latent."""


@dataclass(frozen=True)
class PackedLosses:
    """Losses before any mean."""

    cross_entropy: torch.Tensor
    """(n,)."""
    squared_error: torch.Tensor
    """(m, C)."""
    targets: Targets


def noisy_piece(piece: Piece, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> TrainedPiece:
    """A picture to be drawn at time t (): x_t = (1 - t) clean + t noise; clean and noise are (N, C)."""
    x_t = (1 - t) * clean + t * noise
    return TrainedPiece(replace(piece, state=(x_t, t)), loss=True, noise=noise, clean=clean)


def dropped(trained: TrainedPiece) -> TrainedPiece | None:
    """A condition left out: a picture keeps its rope id, a text leaves nothing."""
    if trained.piece.span.kind == "text":
        return None
    return TrainedPiece(Piece(Span("dropped", 0), ()))


def find_targets(rows: Sequence[TrainedRow], channels: int, device: torch.device) -> Targets:
    """Where the losses of a packed batch stand; tokens of the two blocks are counted in row order."""
    labels: list[int] = []
    label_rows: list[int] = []
    weights: list[float] = []
    velocity_rows: list[int] = []
    velocities: list[torch.Tensor] = []
    reading = drawing = 0
    for trained in (trained for row in rows for trained in row):
        piece = trained.piece
        ids = len(piece.ids)
        if trained.loss and piece.span.kind == "text":
            labels += piece.ids[1:]
            label_rows += range(reading, reading + ids - 1)
            weights += [(ids - 1) ** -0.5] * (ids - 1)
        if trained.next_id is not None:
            labels.append(trained.next_id)
            label_rows.append(reading + ids - 1)
            weights.append(1.0)
        reading += ids
        tokens = piece.span.length - ids
        if trained.loss and trained.noise is not None and trained.clean is not None:
            velocity_rows += range(drawing, drawing + tokens)
            velocities.append(trained.noise - trained.clean)
        drawing += tokens
    return Targets(
        labels=torch.tensor(labels, dtype=torch.int64, device=device),
        label_rows=torch.tensor(label_rows, dtype=torch.int64, device=device),
        label_weights=torch.tensor(weights, dtype=torch.float32, device=device),
        velocity_rows=torch.tensor(velocity_rows, dtype=torch.int64, device=device),
        velocities=torch.cat(velocities) if velocities else torch.zeros(0, channels, device=device),
    )


def packed_losses(contexts: Contexts, rows: Sequence[TrainedRow]) -> PackedLosses:
    """One pass over whole rows, without a cache, and the losses of all their targets."""
    pieces = [tuple(trained.piece for trained in row) for row in rows]
    hidden = contexts.run(pieces, contexts.transformer.empty_cache(len(rows)), extend=False)
    towers = contexts.towers
    targets = find_targets(rows, towers.channels, hidden.reading.device)
    logits = towers.text_logits(hidden.reading.index_select(0, targets.label_rows)).float()
    drawn = hidden.drawing.index_select(0, targets.velocity_rows)
    still = targets.velocities.new_zeros(0)
    velocity = towers.velocity(drawn, still, still)
    return PackedLosses(
        cross_entropy=functional.cross_entropy(logits, targets.labels, reduction="none"),
        squared_error=(velocity - targets.velocities).square(),
        targets=targets,
    )
