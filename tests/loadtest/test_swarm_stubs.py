"""The swarm's type stubs against the build, by mypy's stubtest; and its modules as setup.py has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from mypy import stubtest

SOURCES = Path(__file__).parents[2] / "ext/presence_swarm"
MODULES = sorted(path.stem for path in SOURCES.glob("*.pyx"))
ALLOWED = r"""
.*\.__pyx_capi__
.*\.__reduce_cython__
.*\.__setstate_cython__
.*\.__test__
presence_swarm\.swarm\.Durations
"""


def test_stubs_agree_with_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    allowlist, config = tmp_path / "allowed", tmp_path / "mypy.ini"
    allowlist.write_text(ALLOWED)
    config.write_text("[mypy]\n")
    monkeypatch.setenv("MYPYPATH", str(SOURCES.parent))
    arguments = ["--allowlist", str(allowlist), "--mypy-config-file", str(config), "--ignore-unused-allowlist"]
    modules = [f"presence_swarm.{name}" for name in MODULES]
    status = stubtest.test_stubs(stubtest.parse_options([*modules, *arguments]))
    assert status == 0, capsys.readouterr().out


def test_each_has_its_declarations_and_its_stub() -> None:
    setup = (SOURCES.parents[1] / "setup.py").read_text()
    for module in MODULES:
        assert (SOURCES / f"{module}.pyi").exists()
        assert (SOURCES / f"{module}.pxd").exists()
        assert f'"{module}"' in setup
