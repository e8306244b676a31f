"""The commands: each a thin function over the library, with its options."""

from __future__ import annotations

from collections.abc import Mapping

COMMANDS: Mapping[str, str] = {
    "quickstart": "lvrpo.commands.train_options:QUICKSTART",
    "train": "lvrpo.commands.train_options:TRAIN",
    "pretrain": "lvrpo.commands.train_options:PRETRAIN",
    "launch ray": "lvrpo.commands.launch:RAY",
    "init": "lvrpo.commands.train_options:INIT",
    "check": "lvrpo.commands.train_options:CHECK",
    "generate": "lvrpo.commands.use_options:GENERATE",
    "ask": "lvrpo.commands.use_options:ASK",
    "edit": "lvrpo.commands.use_options:EDIT",
    "demo": "lvrpo.commands.use_options:DEMO",
    "export": "lvrpo.commands.use_options:EXPORT",
    "push": "lvrpo.commands.use_options:PUSH",
    "pull": "lvrpo.commands.use_options:PULL",
    "evaluate": "lvrpo.commands.measure_options:EVALUATE",
    "benchmarks": "lvrpo.commands.measure_options:BENCHMARK_LIST",
    "report": "lvrpo.commands.measure_options:REPORT",
    "watch": "lvrpo.commands.measure_options:WATCH",
    "compare": "lvrpo.commands.measure_options:COMPARE",
    "reproduce": "lvrpo.commands.measure_options:REPRODUCE",
    "audit": "lvrpo.commands.measure_options:AUDIT",
    "information": "lvrpo.commands.measure_options:INFORMATION",
    "new reward": "lvrpo.commands.new:NEW_REWARD",
    "data check": "lvrpo.commands.measure_options:DATA_CHECK",
    "data preview": "lvrpo.commands.measure_options:PREVIEW",
    "data benchmark": "lvrpo.commands.measure_options:BENCHMARK_ROWS",
    "data vocabulary": "lvrpo.commands.measure_options:VOCABULARY",
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
