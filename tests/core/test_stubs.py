"""The type stubs against the build: every name, signature and constant, by mypy's stubtest; and each has its docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from mypy import stubtest

SOURCES = Path(__file__).parents[2] / "ext/presence_core"
MODULES = sorted(path.stem for path in SOURCES.glob("*.pyx"))

# What Cython adds to a module, what only type checkers need, and what two modules have of presence_core.names.
ALLOWED = r"""
.*\.__pyx_capi__
.*\.__reduce_cython__
.*\.__setstate_cython__
.*\.__test__
presence_core\.hub\.Handler
presence_core\.hub\.Histogram
presence_core\.hub\.Stats
presence_core\.(input|notices)\.(DEADLINE|LIMIT)_\w+
"""


def test_stubs_agree_with_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    allowlist, config = tmp_path / "allowed", tmp_path / "mypy.ini"
    allowlist.write_text(ALLOWED)
    config.write_text("[mypy]\n")
    monkeypatch.setenv("MYPYPATH", str(SOURCES.parent))
    arguments = ["--allowlist", str(allowlist), "--mypy-config-file", str(config), "--ignore-unused-allowlist"]
    modules = [f"presence_core.{name}" for name in MODULES]
    status = stubtest.test_stubs(stubtest.parse_options([*modules, *arguments]))
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", MODULES)
def test_everything_in_a_stub_says_what_it_is(name: str) -> None:
    tree = ast.parse((SOURCES / f"{name}.pyi").read_text())
    assert ast.get_docstring(tree)
    for owner in ast.walk(tree):
        if isinstance(owner, ast.ClassDef):
            assert ast.get_docstring(owner), owner.name
        for node in ast.iter_child_nodes(owner):
            if isinstance(node, ast.FunctionDef) and not re.fullmatch(r"__\w+__|now|handler", node.name):
                assert ast.get_docstring(node), node.name
