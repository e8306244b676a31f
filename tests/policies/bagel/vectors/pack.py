"""The excerpt of the reference vectors that lives beside this file: how it is cut, checked and unpacked.

python tests/policies/bagel/vectors/pack.py FOLDER           writes excerpt.xz from the whole set
python tests/policies/bagel/vectors/pack.py FOLDER --check   compares excerpt.xz with the whole set, bit by bit
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save, save_file

EXCERPT = Path(__file__).with_name("excerpt.xz")
SOURCE = Path(__file__).with_name("source.sha256")
"""Of io/meta.json of the set that the excerpt was cut from."""
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
USED_SIDE = 6
"""Rows of tables of positions beyond so many rows and columns are zero: no image of the excerpt reaches them."""
WHOLE = ("b_und",)
KEPT = {
    "a_text": ("decode_", "k_cache", "position_ids", "prompt_ids"),
    "c_flow": ("edit_vae", "t2i_"),
    "d_traj": ("edit_",),
    "e_vae": ("pixels", "moments", "eps", "z", "recon"),
    "f_train": ("attention", "ce_", "latent_shapes", "mse_", "noise", "packed", "padded_latent", "sample_", "shift1_"),
    "preproc": ("image1", "image2_uint8", "image2_vae_resized"),
}
"""Prefixes of the tensors of the other sections."""
LEFT_OUT = {
    "c_flow": ("t2i_t1.0",),
    "f_train": ("shift1_last_hidden",),
    "d_traj": ("edit_decoded_float",),
    "preproc": ("image1_vit_pixels_direct",),
}


def cut(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the excerpt, by FILE/NAME."""
    out: dict[str, torch.Tensor] = {}
    for name in ("checkpoint/ae", "checkpoint/ema", *(f"io/{section}" for section in (*WHOLE, *KEPT))):
        section = name.removeprefix("io/")
        for key, tensor in load_file(folder / f"{name}.safetensors").items():
            kept = section not in KEPT or key.startswith(KEPT[section])
            if kept and not key.startswith(LEFT_OUT.get(section, ("\0",))):
                out[f"{name}/{key}"] = used(key, tensor)
    return out


def used(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A table of positions without the rows that nobody looks up; any other tensor as it is."""
    if not key.endswith(("pos_embed", "position_embedding.weight")):
        return tensor
    side = round(len(tensor) ** 0.5)
    table = torch.zeros_like(tensor).unflatten(0, (side, side))
    table[:USED_SIDE, :USED_SIDE] = tensor.unflatten(0, (side, side))[:USED_SIDE, :USED_SIDE]
    return table.flatten(0, 1)


def texts(folder: Path) -> dict[str, Any]:
    """The json and text files, with the settings of what was left out left out. Any: JSON."""
    found = {str(p.relative_to(folder)): p.read_text() for p in sorted((folder / "checkpoint").iterdir())
             if p.suffix in (".json", ".txt")}  # fmt: skip
    meta = json.loads((folder / "io" / "meta.json").read_text())
    meta["d_traj"] = {"edit": meta["d_traj"]["edit"]}
    return found | {"io/meta.json": json.dumps(meta)}


def shuffled(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, the first of every number first: exponents compress once they lie together."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).unflatten(0, (-1, tensor.element_size())).T.contiguous()


def restored(planes: torch.Tensor, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    """The inverse of ``shuffled``."""
    return planes.T.contiguous().flatten().view(dtype).reshape(shape)


def write(folder: Path) -> None:
    """Cuts and compresses."""
    tensors = cut(folder)
    about = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    header = {"tensors": json.dumps(about), "texts": json.dumps(texts(folder))}
    raw = save({name: shuffled(tensor) for name, tensor in tensors.items()}, header)
    SOURCE.write_text(fingerprint(folder) + "\n")
    EXCERPT.write_bytes(lzma.compress(raw, format=lzma.FORMAT_XZ, filters=FILTERS))
    print(f"{EXCERPT}: {len(tensors)} tensors, {EXCERPT.stat().st_size / 1e6:.2f} MB")


def read() -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the texts of the excerpt."""
    raw = lzma.decompress(EXCERPT.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    planes = load(raw)
    about = json.loads(header["tensors"])
    tensors = {name: restored(planes[name], getattr(torch, dtype), shape) for name, (dtype, shape) in about.items()}
    return tensors, json.loads(header["texts"])


def unpack(folder: Path) -> Path:
    """Writes the excerpt as a folder of the layout of the whole set."""
    tensors, files = read()
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        section, file, key = name.split("/", 2)
        grouped.setdefault(f"{section}/{file}", {})[key] = tensor
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    for name, group in grouped.items():
        save_file(group, folder / f"{name}.safetensors")
    return folder


def fingerprint(folder: Path) -> str:
    """Which set a folder holds."""
    return hashlib.sha256((folder / "io" / "meta.json").read_bytes()).hexdigest()


def is_source(folder: Path) -> bool:
    """Whether a folder holds the set that the excerpt was cut from."""
    return fingerprint(folder) == SOURCE.read_text().strip()


def check(folder: Path) -> None:
    """Raises AssertionError where the excerpt differs from the whole set."""
    tensors, files = read()
    whole = cut(folder)
    assert tensors.keys() == whole.keys(), sorted(tensors.keys() ^ whole.keys())
    assert [name for name in tensors if not torch.equal(tensors[name], whole[name])] == []
    assert files == texts(folder)
    print(f"{EXCERPT}: {len(tensors)} tensors, all as in {folder}")


if __name__ == "__main__":
    (check if "--check" in sys.argv else write)(Path(sys.argv[1]))
