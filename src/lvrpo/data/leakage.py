"""Leakage between splits: prompts of one set that another set has too, found without the keys that made the splits.

A prompt is compared by what it says and shows: its text after ``normalized``, the pixels of its images, their
perceptual hashes, its word n-grams, and what it asks beyond the words, where that is known (``content``).
Everything is linear in the number of prompts, but for perceptual hashes, compared among prompts of one text.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lvrpo.images import ImageFile, StoredImage, to_uint8
from lvrpo.types import Image

Leak = Literal["prompt", "content", "look"]
"""Same text and same images; same content in other words; same text and images that look alike."""

ARTICLES = frozenset({"a", "an", "the"})
NGRAM = 5
"""Words of an n-gram; a shorter text is one n-gram."""
HASH_SIDE = 16
"""Side of the perceptual hash of a color channel."""
PHASH_BITS = 16
"""Images whose hashes differ in at most so many of 3 x 256 bits look alike: of pairs of different images of the
built-in world 6 in 100,000 do."""

_HYPHEN = re.compile(r"(?<=[^\W\d_])-(?=[^\W\d_])")
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*(?!\w)|\w+|[^\w\s.,;:!?…'\"“”‘’«»„¿¡、。]")


@dataclass(frozen=True, slots=True)
class ComparedImage:
    """The properties of an image that are compared."""

    digest: str
    """Hash of its pixels, or of its file."""
    phash: bytes = b""
    """Perceptual hash; empty where those are not compared."""


@dataclass(frozen=True, slots=True)
class ComparedPrompt:
    """The properties of a prompt that are compared."""

    where: str
    """Its id, or file:line."""
    task: str
    text: str
    images: tuple[ComparedImage, ...] = ()
    content: str = ""
    """A canonical form of its content, the same for all wordings; empty where it is not known."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A prompt that the other set has too."""

    leak: Leak
    where: str
    other: str
    """The first such prompt of the other set."""


@dataclass
class Overlap:
    """The number of prompts of a task that also occur in the other set."""

    task: str
    prompts: int = 0
    verbatim: int = 0
    """Text that occurs there letter for letter, whatever the images."""
    normalized: int = 0
    """The same after ``normalized``."""
    image: int = 0
    """All its images occur there, whatever the text."""
    same: int = 0
    """Text (normalized) and images: the same prompt."""
    look: int = 0
    """The same text of images that look alike, the same ones included."""
    content: int = 0
    """The same content, in whichever words."""
    some_ngrams: int = 0
    """Prompts of which at least one n-gram occurs in the other set."""
    all_ngrams: int = 0
    """All n-grams of its text occur there."""
    shared: list[Shared] = field(default_factory=list)
    """One entry per prompt of ``same``, ``content`` and ``look``, the first that applies."""


def normalized(text: str) -> str:
    """A text without what wordings may differ in: case, punctuation of sentences, articles, spaces, forms of letters.

    Signs of arithmetic, brackets and numbers stay, for they change the content.

    >>> normalized("What color is the Circle?")
    'what color is circle'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    tokens = _TOKEN.findall(_HYPHEN.sub(" ", folded))
    kept = [token for token in tokens if token not in ARTICLES]
    return " ".join(kept or tokens) or " ".join(folded.split())


def without_wording(text: str, wordings: Iterable[str]) -> str:
    """A normalized text without the longest of these beginnings, such as "draw" or "a picture of".

    >>> without_wording("image of red circle", ["An image of", "draw"])
    'red circle'
    """
    found = [w for w in map(normalized, wordings) if text.startswith(f"{w} ")]
    return text[len(max(found, key=len)) + 1 :] if found else text


def ngrams(text: str, n: int = NGRAM) -> frozenset[tuple[str, ...]]:
    """The word n-grams of a normalized text; of a shorter one the text itself."""
    words = text.split()
    return frozenset(tuple(words[i : i + n]) for i in range(max(len(words) - n, 0) + 1))


def operands(text: str) -> str:
    """Numbers and other words of a text with two numbers or more, whatever their order; else nothing.

    >>> operands("draw 3 + 2") == operands("draw 2 + 3")
    True
    """
    words = normalized(text).split()
    numbers = [word for word in words if word[0].isdecimal()]
    return " ".join(sorted(words)) if len(numbers) > 1 else ""


def compared_file(file: ImageFile) -> ComparedImage:
    """An image by the bytes of its file, undecoded."""
    if isinstance(file, StoredImage):
        return ComparedImage(hashlib.sha256(file.content).hexdigest())
    with file.open("rb") as opened:
        return ComparedImage(hashlib.file_digest(opened, "sha256").hexdigest())


def compared_pixels(image: Image, phash: bool = True) -> ComparedImage:
    """An image by its pixels in 8 bits and, unless ``phash`` is false, by its perceptual hash."""
    pixels = to_uint8(image)
    digest = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).hexdigest()
    return ComparedImage(digest, perceptual_hash(pixels) if phash else b"")


def perceptual_hash(pixels: np.ndarray) -> bytes:
    """The difference hash of each color channel, 3 x 256 bits, of pixels (height, width, 3) in uint8.

    Channels are cut to 8 levels first: noise on a plain ground does not count. Color decides, as in the built-in world.
    """
    import imagehash  # takes a moment, and needed only where hashes are compared
    from PIL import Image as PilImage
    from PIL import ImageOps

    channels = ImageOps.posterize(PilImage.fromarray(pixels), 3).split()
    bits = [imagehash.dhash(channel, HASH_SIDE).hash.ravel() for channel in channels]
    return np.packbits(np.concatenate(bits)).tobytes()


def differing_bits(phash: bytes, others: Sequence[bytes]) -> np.ndarray:
    """Hamming distances between one hash and all others: int (n,)."""
    table = np.frombuffer(b"".join(others), dtype=np.uint8).reshape(len(others), len(phash))
    return np.unpackbits(table ^ np.frombuffer(phash, dtype=np.uint8), axis=1).sum(1, dtype=np.int64)


class Index:
    """An index of a set of prompts, for looking up prompts of another set."""

    def __init__(self, prompts: Iterable[ComparedPrompt], wordings: Sequence[str] = ()) -> None:
        """``wordings``: beginnings of texts that do not count, such as "draw"."""
        self._wordings = [normalized(w) for w in wordings]
        self.size = 0
        self._texts: set[str] = set()
        self._said: set[str] = set()
        self._ngrams: set[tuple[str, ...]] = set()
        self._images: set[str] = set()
        self._prompts: dict[tuple[str, ...], str] = {}
        self._contents: dict[str, str] = {}
        self._phashes: dict[tuple[str, int], dict[bytes, str]] = {}
        for each in prompts:
            self._add(each)

    def text_key(self, prompt: ComparedPrompt) -> str:
        """The text as it is compared."""
        return without_wording(normalized(prompt.text), self._wordings)

    def _add(self, prompt: ComparedPrompt) -> None:
        said, digests = self.text_key(prompt), [image.digest for image in prompt.images]
        self.size += 1
        self._texts.add(prompt.text.strip())
        self._images.update(digests)
        if said not in self._said:
            self._said.add(said)
            self._ngrams |= ngrams(said)
        self._prompts.setdefault((said, *digests), prompt.where)
        if prompt.content:
            self._contents.setdefault(prompt.content, prompt.where)
        phash = b"".join(image.phash for image in prompt.images)
        if phash:
            self._phashes.setdefault((said, len(phash)), {}).setdefault(phash, prompt.where)

    def same(self, prompt: ComparedPrompt) -> str | None:
        """Locations of the same prompt: equal text and images."""
        return self._prompts.get((self.text_key(prompt), *(image.digest for image in prompt.images)))

    def content(self, prompt: ComparedPrompt) -> str | None:
        """Locations of the same content."""
        return self._contents.get(prompt.content) if prompt.content else None

    def near_duplicate(self, prompt: ComparedPrompt) -> str | None:
        """Locations of the same text with similar images."""
        phash = b"".join(image.phash for image in prompt.images)
        others = self._phashes.get((self.text_key(prompt), len(phash))) if phash else None
        if not others:
            return None
        if phash in others:
            return others[phash]
        differing = differing_bits(phash, list(others))
        nearest = int(differing.argmin())
        return list(others.values())[nearest] if differing[nearest] <= PHASH_BITS * len(prompt.images) else None

    def overlaps(self, prompts: Iterable[ComparedPrompt]) -> list[Overlap]:
        """The overlap of another set with this one, per task."""
        found: dict[str, Overlap] = {}
        for each in prompts:
            self._count(found.setdefault(each.task, Overlap(each.task)), each)
        return list(found.values())

    def _count(self, overlap: Overlap, prompt: ComparedPrompt) -> None:
        said, images = self.text_key(prompt), prompt.images
        grams = ngrams(said)
        overlap.prompts += 1
        overlap.verbatim += prompt.text.strip() in self._texts
        overlap.normalized += said in self._said
        overlap.image += bool(images) and all(image.digest in self._images for image in images)
        overlap.some_ngrams += not grams.isdisjoint(self._ngrams)
        overlap.all_ngrams += grams <= self._ngrams
        shared: dict[Leak, str | None] = {
            "prompt": self.same(prompt),
            "content": self.content(prompt),
            "look": self.near_duplicate(prompt),
        }
        overlap.same += shared["prompt"] is not None
        overlap.content += shared["content"] is not None
        overlap.look += shared["look"] is not None
        found: list[tuple[Leak, str]] = [(leak, other) for leak, other in shared.items() if other is not None]
        if found:
            overlap.shared.append(Shared(found[0][0], prompt.where, found[0][1]))


def leaks(overlaps: Iterable[Overlap], near_duplicates: bool = True) -> list[Shared]:
    """The shared prompts of all tasks; ``near_duplicates``: whether images that only look alike count."""
    return [shared for overlap in overlaps for shared in overlap.shared if near_duplicates or shared.leak != "look"]


def duplicates(prompts: Iterable[ComparedPrompt]) -> list[Shared]:
    """The prompts of a set that ask what an earlier one of their task asks, of the same images."""
    found: list[Shared] = []
    known: dict[tuple[str, ...], str] = {}
    for each in prompts:
        key = (each.task, normalized(each.text), *(image.digest for image in each.images))
        if key in known:
            found.append(Shared("prompt", each.where, known[key]))
        known.setdefault(key, each.where)
    return found


def compared_rows(
    rows: Iterable[tuple[str, str, str, tuple[ImageFile, ...]]], image: Callable[[ImageFile], ComparedImage]
) -> Iterable[ComparedPrompt]:
    """(where, task, text, image files) of rows as prompts to compare; each file is looked at once."""
    known: dict[str, ComparedImage] = {}
    for where, task, text, files in rows:
        for file in files:
            if str(file) not in known:
                known[str(file)] = image(file)
        content = operands(text) if task == "reason" and not files else ""
        yield ComparedPrompt(where, task, text, tuple(known[str(file)] for file in files), content)


def prompts_fingerprint(prompts: Iterable[ComparedPrompt]) -> str:
    """A hash of a set of prompts, whatever their order, wordings aside: equal sets ask the same."""
    keys = sorted(f"{each.task} {normalized(each.text)} {[p.digest for p in each.images]}" for each in prompts)
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
