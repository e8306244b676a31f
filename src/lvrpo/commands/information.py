"""``lvrpo information``: the mutual information of the understanding and generation experts."""

from __future__ import annotations

from pathlib import Path

import torch

from lvrpo.commands.inputs import write_json
from lvrpo.commands.options import Options, refuse_existing
from lvrpo.commands.progress import wide_console
from lvrpo.evaluation.mutual_information import Direction, Information, measure_information
from lvrpo.policies.loading import START, load_policy


def print_information(options: Options) -> None:
    """Prints the bounds of a model, or of a run's start and result with the difference."""
    if options.json is not None:
        refuse_existing([options.json], options.force)
    torch.set_num_threads(1)
    start = Path(options.model) / START
    models = {"before": str(start), "after": options.model} if start.is_dir() else {"now": options.model}
    loaded = {when: load_policy(name, options.device, options.dtype).make_reference() for when, name in models.items()}
    directions: dict[Direction, str] = {
        "see_and_plan": "understanding expert over an image, generation expert about to draw from its caption",
        "name_and_form": "understanding expert over a caption, generation expert over the noisy image",
    }
    console = wide_console()
    out: dict[str, dict[str, object]] = {}
    for direction, words in directions.items():
        found: dict[str, Information] = {}
        console.print(f"{words}:", highlight=False, soft_wrap=True)
        for when, policy in loaded.items():
            found[when] = measure_information(policy, direction, options.pairs, options.negatives, options.seed)
            bound, ceiling = found[when].bound, found[when].ceiling
            console.print(
                f"  {when}: at least {bound.score:.3f} [{bound.low:.3f}, {bound.high:.3f}] nats; no more than log "
                f"{options.negatives} = {ceiling:.3f} can be shown",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        rows: dict[str, object] = {
            when: {**info.bound.as_dict(), "ceiling": info.ceiling} for when, info in found.items()
        }
        if "before" in found:
            gain = found["before"].gain(found["after"])
            rows["difference"] = gain.as_dict()
            console.print(
                f"  difference: {gain.score:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]", markup=False, highlight=False
            )
        out[direction] = rows
    content = {"model": options.model, "pairs": options.pairs, "negatives": options.negatives, "seed": options.seed}
    write_json(options, {**content, "information": out})
