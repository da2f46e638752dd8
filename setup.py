"""Builds the Cython extensions of ``presence_core``; everything else is in pyproject.toml.

Environment:
    PRESENCE_DEBUG=1  every Cython check on, no optimisation, C asserts alive
    PRESENCE_ASAN=1   the debug build under AddressSanitizer and UBSan
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

MODULES = [
    "wheel",
    "frames",
    "histogram",
    "members",
    "backlog",
    "bulk",
    "room_events",
    "hub",
    "turns",
    "deadlines",
    "input",
    "output",
    "fanout",
    "notices",
    "closing",
    "upgrade",
]

SWARM_MODULES = ["life", "hearing", "arrivals", "swarm"]  # the load tests' agents

asan = os.environ.get("PRESENCE_ASAN") == "1"
debug = asan or os.environ.get("PRESENCE_DEBUG") == "1"

# The generated C lives out of the tree, one folder for each kind of build.
build_dir = "build/cython-" + ("asan" if asan else "debug" if debug else "release")

DIRECTIVES = {
    "language_level": 3,
    "embedsignature": False,
    "freethreading_compatible": False,
    "boundscheck": debug,
    "wraparound": debug,
    "initializedcheck": debug,
    "overflowcheck": debug,
    "nonecheck": debug,
    "cdivision": not debug,
}

compile_args = [
    "-std=c11",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unused-function",
    "-Wno-missing-field-initializers",
]
link_args = []
if debug:
    compile_args += ["-O0", "-g", "-UNDEBUG"]
else:
    compile_args += ["-O3", "-g1", "-DNDEBUG"]
if asan:
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    compile_args += sanitizers
    link_args += sanitizers

extensions = [
    Extension(
        f"{package}.{name}",
        [f"ext/{package}/{name}.pyx"],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    for package, names in (("presence_core", MODULES), ("presence_swarm", SWARM_MODULES))
    for name in names
    if os.path.exists(f"ext/{package}/{name}.pyx")
]

setup(
    ext_modules=cythonize(
        extensions, build_dir=build_dir, include_path=["ext"], compiler_directives=DIRECTIVES, gdb_debug=False
    )
)
