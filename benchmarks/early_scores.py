"""Steps of a run whose judge is a server: groups scored while others are sampled against groups scored afterwards.

    OMP_NUM_THREADS=1 python benchmarks/early_scores.py [--judge-s 0 1 4] [--steps 6]

The policy is a small BAGEL that draws four groups of eight images of 64 px (16 tokens) in ten guided steps, one group
after another. The judge is a server in another process that answers each request after a while, eight at once. Steps of
one run take turns. Printed are medians of wall-clock seconds a step and of the ratios of neighbors; a ratio above 1 is
for early scores, which have the same numbers (tests/rewards/test_async_scoring.py).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bagel_step import make_policy

from lvrpo.config import parse_section
from lvrpo.policies.bagel.create import BagelSizes
from lvrpo.rewards.vlm_endpoint import VLMEndpoint
from lvrpo.training.config import TrainConfig
from lvrpo.training.trainer import Trainer

GROUPS, GROUP_SIZE, SIDE = 4, 8, 64

JUDGE = """
import json, sys, time, zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        time.sleep(float(sys.argv[1]))
        message = {"role": "assistant", "content": str(zlib.crc32(body) % 11)}
        reply = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)
    def log_message(self, *_):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def step_seconds(policy: Path, url: str, steps: int, folder: Path) -> list[float]:
    """Wall-clock seconds of steps: scored afterwards and early, in turn."""
    endpoint = {"base_url": url, "model": "judge"}
    config = parse_section(
        TrainConfig,
        {
            "policy": str(policy),
            "device": "cpu",
            "steps": steps + 2,
            "data": {"prompts_per_step": {"generate": GROUPS}, "scenes": {"size": SIDE}},
            "rollout": {
                "group_size": GROUP_SIZE,
                "num_steps": 10,
                "guidance_scale": 4.0,
                "image_size": [SIDE, SIDE],
            },
            "limits": {"forward_tokens": 400, "microbatch_size": 8},
            "rewards": [{"name": "vlm_endpoint", "options": {"endpoint": endpoint, "ask": "rating"}}],
            "validation": {"every": 1000, "prompts": {"generate": 1}},
            "reference_eval_every": 1000,
            "samples_every": 1000,
            "checkpoint_every": 1000,
        },
        "benchmark",
    )
    trainer = Trainer.start(config, folder)
    ends: list[float] = []

    def observe(row: Mapping[str, Any]) -> None:
        VLMEndpoint.waits = len(ends) % 2 == 1  # pyright: ignore[reportAttributeAccessIssue]  # of the next step
        ends.append(time.perf_counter())

    with trainer.run:
        trainer.train(observe)
    return [after - before for before, after in pairwise(ends[:-1])]


def compare(policy: Path, judge_s: float, steps: int, folder: Path) -> tuple[list[float], list[float]]:
    """Seconds of steps with early scores, and of their neighbors without."""
    judge = subprocess.Popen([sys.executable, "-c", JUDGE, str(judge_s)], stdout=subprocess.PIPE, text=True)
    try:
        assert judge.stdout is not None
        url = f"http://127.0.0.1:{int(judge.stdout.readline())}/v1"
        seconds = step_seconds(policy, url, steps, folder / str(judge_s))
    finally:
        judge.kill()
        judge.wait()
    return seconds[1::2], seconds[::2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge-s", type=float, nargs="+", default=[0, 1, 4], help="seconds of an answer")
    parser.add_argument("--steps", type=int, default=6, help="an even number")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        policy = Path(name) / "policy"
        make_policy(BagelSizes(width=128, depth=4, mlp_width=256, image_size=SIDE)).save(policy)
        print(f"{'an answer, s':>12} {'early, s':>9} {'afterwards, s':>14} {'ratio':>6}  ratios of neighbors")
        for judge_s in options.judge_s:
            early, late = compare(policy, judge_s, options.steps, Path(name))
            ratios = [b / a for a, b in zip(early, late, strict=True)]
            medians = (statistics.median(values) for values in (early, late, ratios))
            columns = "{:9.2f} {:14.2f} {:6.2f}".format(*medians)
            print(f"{judge_s:12.1f} {columns}  {min(ratios):.2f} to {max(ratios):.2f}", flush=True)


if __name__ == "__main__":
    main()
