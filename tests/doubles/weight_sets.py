"""Different policies in the place of the sets of weights of one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from lvrpo.training.policies import Policies


class _Sets:
    def __init__(self, by_name: dict[str, Any]) -> None:
        self.policy, self.by_name, self.weights = by_name.get("policy"), by_name, self

    @contextmanager
    def use(self, name: str) -> Iterator[Any]:
        yield self.by_name[name]

    def copy(self, name: str, source: str) -> None:
        self.by_name[name] = self.by_name[source]


def sets_of(**by_name: Any) -> Policies:
    """What passes for a run's ``Policies`` where each set is a policy, or a double, of its own."""
    return cast(Policies, _Sets(by_name))
