"""The commands: each a thin function over the library, with its options."""

from __future__ import annotations

from collections.abc import Mapping

COMMANDS: Mapping[str, str] = {
    "quickstart": "lvrpo.commands.quickstart:QUICKSTART",
    "train": "lvrpo.commands.train:TRAIN",
    "pretrain": "lvrpo.commands.train:PRETRAIN",
    "launch ray": "lvrpo.commands.launch:RAY",
    "init": "lvrpo.commands.models:INIT",
    "check": "lvrpo.commands.train:CHECK",
    "generate": "lvrpo.commands.infer:GENERATE",
    "ask": "lvrpo.commands.infer:ASK",
    "edit": "lvrpo.commands.infer:EDIT",
    "demo": "lvrpo.commands.demo:DEMO",
    "export": "lvrpo.commands.models:EXPORT",
    "push": "lvrpo.commands.hub:PUSH",
    "pull": "lvrpo.commands.hub:PULL",
    "evaluate": "lvrpo.commands.evaluate:EVALUATE",
    "benchmarks": "lvrpo.commands.benchmarks:BENCHMARK_LIST",
    "report": "lvrpo.commands.report:REPORT",
    "watch": "lvrpo.commands.report:WATCH",
    "compare": "lvrpo.commands.report:COMPARE",
    "reproduce": "lvrpo.commands.reproduce:REPRODUCE",
    "audit": "lvrpo.commands.audit:AUDIT",
    "information": "lvrpo.commands.audit:INFORMATION",
    "new reward": "lvrpo.commands.new:NEW_REWARD",
    "data check": "lvrpo.commands.data:CHECK",
    "data preview": "lvrpo.commands.data:PREVIEW",
    "data benchmark": "lvrpo.commands.data:BENCHMARK_ROWS",
    "data vocabulary": "lvrpo.commands.data:VOCABULARY",
    "completion": "lvrpo.commands.new:COMPLETION",
}
"""Every command. The modules import nothing heavy until a command runs."""

HEADINGS: Mapping[str, str] = {
    "quickstart": "Train",
    "generate": "Use a model",
    "evaluate": "Measure",
    "new reward": "Your own data and rewards",
    "completion": "Your shell",
}
"""The heading of each group of commands in the list of all commands."""
