"""The table of scores of all rewards: a missing score is masked with its reason, never replaced by a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lvrpo.errors import ContractError, InputError
from lvrpo.policies.base import Judge
from lvrpo.rewards.async_scoring import cancel_calls, wait_for_async_scores
from lvrpo.rewards.base import Reward, judge_fingerprint
from lvrpo.rewards.config import ConfiguredReward, RewardConfig, checked_scores, configured_reward
from lvrpo.rewards.remote import RemoteReward, remote_reward
from lvrpo.rewards.verifiable_text import text_problem
from lvrpo.types import Group, Prompt, RewardTable

NOT_APPLICABLE = "not applicable"
MOST_FAILED = 0.5
"""Share of a reward's scores of a training step that may fail where it does not say (``max_failed``)."""
IN_PYTHON = "python"
"""The name, in a recorded configuration, of prompts or rewards that were passed as Python objects."""
TASK_REWARD = "task"
"""The name of a row of ``rewards`` that is the ``reward`` of the task itself."""


def build_rewards(configs: Sequence[RewardConfig], given: Mapping[str, Reward] | None = None) -> list[ConfiguredReward]:
    """Resolves the reward section; raises InputError on an unknown name, wrong options, equal labels, or no weight.

    ``given``: rewards by title that a caller in Python hands over; their names are not resolved.
    """
    sources = []
    for i, config in enumerate(configs):
        if config.title in [c.title for c in configs[:i]]:
            raise InputError(f"rewards: two entries are called {config.title!r}: give one a label of its own")
        if given is not None and config.title in given:
            if config.where is not None:
                raise InputError(
                    f"rewards.{config.title}.where: was handed over in Python and is in this process: name a file, "
                    "./my_rewards.py:NAME, or leave where out"
                )
            sources.append(configured_reward(config, given=given[config.title]))
            continue
        if config.name.startswith(f"{IN_PYTHON}:"):
            raise InputError(
                f"rewards.{config.title}: was handed over in Python, and only its name is on record: name a file, "
                "./my_rewards.py:NAME, or call lvrpo.train again"
            )
        if config.where is not None:
            sources.append(ConfiguredReward(config, remote_reward(config)))
            continue
        sources.append(configured_reward(config))
    if configs and not any(config.weight for config in configs):
        raise InputError("rewards: every weight is 0, so nothing is trained: give one of them a weight above 0")
    return sources


def score_groups(sources: Sequence[ConfiguredReward], groups: Sequence[Group], judge: Judge) -> RewardTable:
    """Scores groups of equal size with all rewards; raises ContractError where one says ``on_failure: stop``, or where
    more scores failed than its ``max_failed``."""
    table = score_groups_unchecked(sources, groups, judge)
    table = mask_batch_failures(sources, [group.prompt for group in groups], complete_texts(groups), table)
    require_few_failures(sources, table)
    return table


def score_groups_unchecked(
    sources: Sequence[ConfiguredReward], groups: Sequence[Group], judge: Judge, step: int = 0
) -> RewardTable:
    """``score_groups`` without what concerns the whole batch, as for a part of the groups.

    ``step``: steps done, for the weights that follow a schedule.
    """
    try:
        return _scored(sources, groups, judge, step)
    except BaseException:
        discard_async_scores(sources)
        raise


def discard_async_scores(sources: Sequence[ConfiguredReward]) -> None:
    """Ends calls that wait, and forgets what was submitted: the run was interrupted or failed."""
    for source in sources:
        source.async_scores.discard()
    cancel_calls()


def _scored(sources: Sequence[ConfiguredReward], groups: Sequence[Group], judge: Judge, step: int) -> RewardTable:
    """``score_groups_unchecked``; an exception leaves scores of the thread behind."""
    P, G, K = len(groups), len(groups[0]), len(sources)
    scores = torch.zeros(P, G, K)
    mask = torch.zeros(P, G, K, dtype=torch.bool)
    reasons: dict[tuple[int, int, int], str] = {}
    cut: dict[str, torch.Tensor] = {}
    for k, source in enumerate(sources):
        if source.waits:
            wait_for_async_scores()
        if isinstance(source.reward, RemoteReward):  # one call for all
            source.reward.prefetch_applies([group.prompt for group in groups])
        chosen = [p for p, group in enumerate(groups) if source.scores(group.prompt)]
        if not chosen:
            source.async_scores.discard()
        else:
            of = [groups[p] for p in chosen]
            checked = checked_scores(source, of, source.judge or judge)
            result = checked.values
            if source.config.clip is not None:
                low, high = source.config.clip
                clipped = result.clamp(low, high)
                cut[source.config.title] = torch.zeros(P, G, dtype=torch.bool)
                cut[source.config.title][chosen] = (clipped != result) & result.isfinite()
                result = clipped
            scores[chosen, :, k] = torch.nan_to_num(result, nan=0.0, posinf=0.0, neginf=0.0)
            mask[chosen, :, k] = True
            for (row, g), reason in checked.failures.items():
                mask[chosen[row], g, k] = False
                reasons[chosen[row], g, k] = f"failed: {reason}"
        for p in set(range(P)) - set(chosen):
            reasons.update({(p, g, k): NOT_APPLICABLE for g in range(G)})
    return RewardTable(
        names=tuple(source.config.title for source in sources),
        weights=torch.tensor([source.config.weight_at(step) for source in sources]),
        scores=scores,
        mask=mask,
        reasons=reasons,
        tasks=tuple(group.prompt.task for group in groups),
        judges={source.config.title: source.judges for source in sources},
        judge=judge_fingerprint(judge),
        judged_by={source.config.title: name for source in sources if (name := source.judged_by)},
        normalize={s.config.title: s.config.normalize for s in sources if s.config.normalize is not None},
        cut=cut,
    )


def complete_texts(groups: Sequence[Group]) -> list[list[str]]:
    """The last text of every member, "" where it is empty or cut off."""
    return [["" if text_problem(t) else t.text or "" for t in group.trajectories] for group in groups]


def mask_batch_failures(
    sources: Sequence[ConfiguredReward],
    prompts: Sequence[Prompt],
    texts: Sequence[Sequence[str]],
    table: RewardTable,
) -> RewardTable:
    """Masks what ``Reward.batch_failures`` finds; all rows belong to one batch. ``texts``: of ``complete_texts``."""
    scores, mask, reasons = table.scores.clone(), table.mask.clone(), dict(table.reasons)
    for k, source in enumerate(sources):
        find = getattr(source.reward, "batch_failures", None)  # optional
        rows = [] if find is None else [p for p, prompt in enumerate(prompts) if source.scores(prompt)]
        if find is None or not rows:
            continue
        known = torch.where(mask[rows, :, k], scores[rows, :, k], torch.nan).tolist()
        for i, reason in find([prompts[p] for p in rows], [texts[p] for p in rows], known).items():
            for g in mask[rows[i], :, k].nonzero()[:, 0].tolist():
                reasons[rows[i], g, k] = f"failed: {reason}"
            scores[rows[i], :, k], mask[rows[i], :, k] = 0, False
    return replace(table, scores=scores, mask=mask, reasons=reasons)


def require_few_failures(
    sources: Sequence[ConfiguredReward], table: RewardTable, most_failed: float | None = None
) -> None:
    """Raises ContractError where more of a reward's scores failed than may (``max_failed``).

    ``most_failed``: the share that may fail of a reward that does not say it; None: any.
    """
    for k, source in enumerate(sources):
        limit = most_failed if source.config.max_failed is None else source.config.max_failed
        failed = [why for (_, _, other), why in table.reasons.items() if other == k and why != NOT_APPLICABLE]
        tried = len(failed) + int(table.mask[..., k].sum())
        if limit is not None and len(failed) > limit * tried:
            reason, times = Counter(why.removeprefix("failed: ") for why in failed).most_common(1)[0]
            raise ContractError(
                f"reward {source.config.title!r} failed on {len(failed)} of {tried} outputs, max_failed={limit}: most "
                f"often ({times}): {' '.join(reason.split())}: fix the reward, or raise its max_failed"
            )
