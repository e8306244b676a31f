from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer

from lvrpo.errors import InputError
from lvrpo.policies.bagel.create import BagelSizes, create_bagel
from lvrpo.policies.bagel.tokenizer import MARKERS, PADDING, BagelTokenizer


@pytest.fixture(scope="module")
def words() -> BagelTokenizer:
    return create_bagel(BagelSizes(width=64, depth=1)).tokenizer  # type: ignore[return-value]  # of a BAGEL


@pytest.mark.parametrize("marker", [*MARKERS, PADDING])
def test_a_marker_in_a_text_is_plain_text(marker: str, words: BagelTokenizer) -> None:
    """Whoever writes it does not end the text, or begin an image."""
    text = f"a red{marker}circle"
    ids = words.encode(text)
    assert words.tokenizer.token_to_id(marker) not in ids
    assert len(ids) > len(words.encode("a redcircle")) + 2
    assert words.decode(ids) == text


def test_a_marker_that_the_files_do_not_call_special_is_one_line(words: BagelTokenizer) -> None:
    tokenizer = Tokenizer.from_str(words.tokenizer.to_str().replace('"special":true', '"special":false'))
    tokenizer.add_tokens([AddedToken(MARKERS[1], special=False)])
    with pytest.raises(InputError, match=r"holds a marker of the model .*leave it out, or fix the files") as caught:
        BagelTokenizer(tokenizer, words.vocabulary_size, {}).encode(f"a {MARKERS[1]} b")
    assert len(str(caught.value).splitlines()) == 1
