"""The layers, from the imports themselves: they point down only.

A new module gets its place in LAYERS. `if TYPE_CHECKING` imports count too: a name that is only read is still known.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRESENCE = ROOT / "src" / "presence"
CORE = ROOT / "ext" / "presence_core"

# From top to bottom; those of one layer do not import each other, except in the last one (and never in a circle there).
LAYERS = [
    ["__main__"],
    ["serving", "terminal"],
    ["app"],
    ["drain"],
    ["gateway", "http_api"],
    ["connection"],
    ["sessions"],
    ["fanout", "replicas", "announcements"],
    ["authn", "authz", "store", "bus"],
    ["keyset", "outbound", "outbox", "steps"],
    ["protocol", "config", "setting_types", "metrics", "identity", "log", "errors", "reasons", "outage"],
]
BASE = LAYERS[-1]

# Beside the gateway, not in it: what a terminal needs, and the embedded servers. Nothing from `app` down knows them.
ASIDE = {"data_dir", "embedded", "join", "migrate", "migrations"}
MAY_USE_ASIDE = {"__main__", "serving", "terminal"} | ASIDE

# Types that are named further down than they are made; they do not exist there at run time.
TYPES_FROM_ABOVE = {("sessions", "connection"), ("fanout", "connection")}

MODULES = sorted(
    {path.relative_to(PRESENCE).parts[0].removesuffix(".py") for path in PRESENCE.rglob("*.py")} - {"__init__"}
)


def files(module: str) -> list[Path]:
    return (
        [PRESENCE / f"{module}.py"]
        if (PRESENCE / f"{module}.py").exists()
        else sorted((PRESENCE / module).rglob("*.py"))
    )


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports, wherever in it: `presence.log`, `asyncio`, …"""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(PRESENCE.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def used_by(module: str) -> set[str]:
    """The modules of presence that a module imports."""
    names = {name for path in files(module) for name in imported(path)}
    return {
        part for name in names if (part := name.removeprefix("presence.").split(".")[0]) in MODULES and name != part
    } - {module}


def layer_of(module: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_a_layer() -> None:
    placed = [module for layer in LAYERS for module in layer]
    assert len(placed) == len(set(placed))
    assert set(MODULES) - set(placed) - ASIDE == set(), "give each new module its place in LAYERS"


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ASIDE])
def test_imports_point_down(module: str) -> None:
    layer = layer_of(module)
    allowed_types = {used for by, used in TYPES_FROM_ABOVE if by == module}
    for used in used_by(module) - ASIDE - allowed_types:
        assert layer_of(used) > layer or (module in BASE and used in BASE), f"{module} must not import {used}"


@pytest.mark.parametrize("module", MODULES)
def test_the_embedded_servers_are_known_to_the_top_only(module: str) -> None:
    if module not in MAY_USE_ASIDE:
        assert used_by(module) & ASIDE == set()


@pytest.mark.parametrize(("module", "above"), sorted(TYPES_FROM_ABOVE))
def test_types_from_above_are_types_only(module: str, above: str) -> None:
    for path in files(module):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        type_only = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ]
        inside = {id(inner) for node in type_only for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == f"presence.{above}":
                assert id(node) in inside


def test_the_base_has_no_circles() -> None:
    resolved: set[str] = set()
    waiting = {module: used_by(module) & set(BASE) for module in BASE if module in MODULES}
    while ready := {module for module, used in waiting.items() if used <= resolved}:
        resolved |= ready
        waiting = {module: used for module, used in waiting.items() if module not in ready}
    assert waiting == {}


def test_store_and_bus_do_not_know_each_other() -> None:
    for module in {"store", "bus"} & set(MODULES):
        assert used_by(module) & {"store", "bus", "authn", "authz"} == set()


@pytest.mark.parametrize("module", BASE)
def test_the_base_is_free_of_asyncio(module: str) -> None:
    for path in files(module):
        assert {name for name in imported(path) if name.split(".")[0] in {"asyncio", "uvloop", "anyio"}} == set()


def test_the_core_imports_nothing_of_presence() -> None:
    sources = [path for path in CORE.iterdir() if path.suffix in {".py", ".pyi", ".pyx", ".pxd"}]
    assert len(sources) > 5
    for path in sources:
        found = re.findall(
            r"^\s*(?:from|c?import)\s+presence(?![\w]).*$", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert found == [], f"{path.name} imports presence"


def test_in_the_gateway_only_the_store_speaks_sql_and_only_the_bus_nats() -> None:
    # The terminal publishes as any other service would.
    owners = {"asyncpg": {"store", "embedded", "migrate"}, "nats": {"bus", "outbox", "embedded", "terminal"}}
    for library, allowed in owners.items():
        users = {
            module
            for module in MODULES
            for path in files(module)
            if library in {n.split(".")[0] for n in imported(path)}
        }
        assert users <= allowed, f"{library} is used by {users - allowed}"
