"""Detects API keys by name and by value, so that none is written to a run or shown in a message."""

from __future__ import annotations

import re
from urllib.parse import unquote

_NAME = re.compile(
    r"(?:.*_)?(?:(?:key|apikey|token|auth|secret|password|passphrase|credential)s?|passwd|pwd|authorization|bearer)"
)
_TOKENS = re.compile(r"(?:(?:max|min|num|new|image|special|bos|eos|pad|unk|sep|cls|mask|stop|start|end)_)+tokens?")
_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:sk|nvapi|glpat|github_pat)[-_](?=[A-Za-z_-]*[A-Z0-9])[A-Za-z0-9_-]{16,}"
    r"|(?:hf|gsk|xai|gh[opsu]|r8|pplx)[-_][A-Za-z0-9]{16,}"
    r"|AIza[A-Za-z0-9_-]{30,}|AKIA[A-Z0-9]{12,}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.)"
    r"|\bBearer [A-Za-z0-9._~+/-]{8,}"
)


def is_secret_name(name: str) -> bool:
    """Whether what stands under this name is a key: api_key, hf-token, Authorization; max_new_tokens is none."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    plain = re.sub(r"[^A-Za-z0-9]+", "_", words).lower()
    return bool(_NAME.fullmatch(plain)) and not _TOKENS.fullmatch(plain)


def looks_like_secret(text: str) -> bool:
    """Whether a text holds what looks like a key of a known make."""
    return bool(_VALUE.search(unquote(text)))


def is_variable_name(text: str) -> bool:
    """Whether a text is a likely name of an environment variable: short words of one case, few digits, no key."""
    words = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) and text.split("_")
    if not words or looks_like_secret(text) or (text != text.upper() and text != text.lower()):
        return False
    return max(map(len, words)) <= 20 and sum(map(str.isdigit, text)) <= 4
