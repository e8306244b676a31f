"""The tokenizer of tiles, by itself and in a Janus and a Show-o."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lvrpo.cli import main
from lvrpo.commands import models
from lvrpo.data.scenes import COLORS, GROUNDS, SHAPES, Scene, SceneObject, crowded, read, render
from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.janus.policy import JanusPolicy
from lvrpo.policies.loading import load_policy
from lvrpo.policies.showo.policy import ShowoPolicy
from lvrpo.policies.tile_codebook import FILE, TileCodebook
from lvrpo.types import Image, Prompt

pytest.importorskip("transformers")


def flat(*levels: float) -> torch.Tensor:
    """Tiles of one level each."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 2, 2).clone()


def image(*levels: float) -> Image:
    """4 x 4 pixels of four flat tiles, in raster order."""
    return TileCodebook(flat(*levels)).decode(torch.arange(4)[None])[0]


def test_codes_are_the_nearest_tiles_in_raster_order() -> None:
    shown = image(0.0, 0.25, 0.5, 1.0)
    assert shown[:, :2, :2].eq(0).all()
    assert shown[:, :2, 2:].eq(0.25).all()
    assert shown[:, 2:, :2].eq(0.5).all()
    codebook = TileCodebook(flat(1.0, 0.1, 0.4))
    codes = codebook.encode([shown, image(1.0, 1.0, 0.0, 0.3)])
    assert codes.tolist() == [[1, 1, 2, 0], [0, 0, 1, 2]] or codes.tolist() == [[1, 2, 2, 0], [0, 0, 1, 2]]
    wide = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    own = TileCodebook(wide)
    drawn = own.decode(torch.tensor([[4, 0, 1, 3]]))
    assert torch.equal(drawn[0, :, :4, 4:], wide[0])
    assert own.encode(list(drawn)).tolist() == [[4, 0, 1, 3]]


def test_k_means_keeps_frequent_tiles_and_averages_the_rest() -> None:
    images = [image(0.0, 0.0, 1.0, 1.0), image(0.0, 1.0, 0.5, 0.54)]
    codebook = TileCodebook.learn(images, 3, 2)
    levels = codebook.tiles[:, 0, 0, 0]
    assert sorted(round(float(level), 4) for level in levels) == [0.0, 0.52, 1.0]
    with pytest.raises(InputError, match="codes=5: the images have 4 different tiles: use fewer"):
        TileCodebook.learn(images, 5, 2)


def test_embeddings_are_principal_components() -> None:
    codebook = TileCodebook(torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0)))
    found = codebook.embeddings(3)
    assert found.shape == (6, 3)
    assert float(found.std()) == pytest.approx(1, abs=1e-5)
    spread = found.T @ found
    assert torch.allclose(spread, spread.diag().diag(), atol=1e-4)
    assert codebook.embeddings(20)[:, 12:].eq(0).all()


def test_every_shape_in_every_color_survives_tiles_of_crowded_images() -> None:
    assert torch.equal(crowded(3), crowded(3))
    assert not torch.equal(crowded(3), crowded(4))
    codebook = TileCodebook.learn([crowded(i) for i in range(500)], 512, 8)
    shown = [(s, c, g) for s in SHAPES for c in COLORS for g in GROUNDS]  # held-out pairs are among them
    images = [render(Scene(g, (SceneObject(s, c, 1, 2),))) for s, c, g in shown]
    for (shape, color, ground), reading in zip(shown, read(codebook.decode(codebook.encode(images))), strict=True):
        assert reading.ground == ground
        assert [(o.shape, o.color, o.row, o.col) for o in reading.objects] == [(shape, color, 1, 2)]


@pytest.fixture(scope="module", params=["janus", "showo"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    where = tmp_path_factory.mktemp("tiles") / request.param
    sizes = ["width=32", "codes=64"] if request.param == "janus" else ["width=32", "bits=6"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "CROWDED", 100)
        patch.setattr(models, "MEASURED", 20)
        assert main(["init", f"{request.param}-tiny", str(where), "--tile-codebook", *sizes]) == 0
        yield where


def test_a_model_reads_and_draws_tiles(folder: Path, tmp_path: Path) -> None:
    policy = load_policy(folder)
    assert isinstance(policy, JanusPolicy | ShowoPolicy)
    tiles = policy.tiles
    assert tiles is not None
    assert tiles.tiles.shape == (64, 3, 8, 8)
    prompt = Prompt("g", "generate", ("a red circle",), ("image",))
    (group,) = policy.sample([prompt], Sampling(group_size=2, num_steps=4, guidance_scale=2.0), [0])
    for trajectory in group.trajectories:
        (segment,) = trajectory.segments
        assert torch.equal(segment.image, tiles.decode(segment.tokens[None])[0])  # type: ignore[union-attr]
        assert torch.equal(policy.encode_image(segment.image).flatten(), segment.tokens)  # type: ignore[union-attr]
    copy = policy.make_reference()
    copy.save(tmp_path / "copy")
    again = load_policy(tmp_path / "copy")
    assert isinstance(again, JanusPolicy | ShowoPolicy)
    assert again.tiles is not None
    assert torch.equal(again.tiles.tiles, tiles.tiles)


def test_bad_files_and_options_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    load_policy(folder).save(copy)
    save_file({"tiles": torch.zeros(64, 3, 4, 4)}, copy / FILE)
    with pytest.raises(InputError, match=r"tiles of shape \[64, 3, 4, 4\], config.json says \[64, 3, 8, 8\]"):
        load_policy(copy)
    (copy / FILE).write_bytes(b"damaged")
    with pytest.raises(InputError, match="restore the file"):
        load_policy(copy)
    for command, words in (
        (
            ["init", "bagel-tiny", str(tmp_path / "x"), "--tile-codebook"],
            "applies to janus-tiny, showo-tiny, mmada-tiny, not to bagel",
        ),
        (["init", "janus-tiny", str(tmp_path / "x"), "--tile-codebook", "image_size=24"], "image_size=24: scenes have"),
        (["init", "janus-tiny", str(tmp_path / "x"), "--tile-codebook", "codes=90000"], "different tiles: use fewer"),
    ):
        assert main(command) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
