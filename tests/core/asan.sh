#!/bin/sh
# The extensions' tests on a build of their own under AddressSanitizer and UBSan, and the fuzzer's corpus; then whole lives
# under LeakSanitizer.
# Usage: tests/core/asan.sh [pytest arguments]   (PYTHON: the interpreter, default .venv/bin/python)
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
build=build/asan

PRESENCE_ASAN=1 "$python" setup.py -q build_ext --build-temp build/temp-asan --build-lib "$build" > build/asan.log 2>&1 || {
    cat build/asan.log
    exit 1
}
for package in presence_core presence_swarm; do
    cp "ext/$package"/*.py "$build/$package/"
done

# The interpreter is not instrumented: the runtimes come first, and every allocation is the C library's.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
PYTHONPATH=$build
PYTHONMALLOC=malloc
UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export LD_PRELOAD PYTHONPATH PYTHONMALLOC UBSAN_OPTIONS

ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 "$python" -c \
    'from presence_core import hub; from presence_swarm import swarm; assert "/asan/" in hub.__file__ and "/asan/" in swarm.__file__'
ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 "$python" -m pytest tests/core -q -p no:cacheprovider \
    --deselect tests/core/test_stubs.py::test_stubs_agree_with_the_build "$@"
ASAN_OPTIONS=detect_leaks=0 "$python" -m pytest tests/loadtest/test_swarm_pieces.py -q -p no:cacheprovider
ASAN_OPTIONS=detect_leaks=0 "$python" tests/fuzz/fuzz.py --seconds 0

ASAN_OPTIONS=detect_leaks=1 "$python" tests/core/leaks.py
