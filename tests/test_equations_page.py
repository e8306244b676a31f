from __future__ import annotations

import importlib.util
from pathlib import Path


def test_the_page_of_equations_is_up_to_date(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_equations", root / "docs" / "make_equations.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.render(), "run make docs"
