#!/usr/bin/env bash
# Build the extension with AddressSanitizer and UndefinedBehaviorSanitizer in a scratch copy, and run its tests there.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cp "$root/setup.py" "$root/pyproject.toml" "$scratch"
(cd "$root" && cp --parents -r tests/__init__.py tests/conftest.py tests/support tests/engine/__init__.py tests/engine/test_cpp.py tests/engine/test_softmax_total.py python_ref "$scratch")
(cd "$root" && find contrastive_kernels \( -name '*.py' -o -path '*/csrc/*' -type f \) -exec cp --parents {} "$scratch" \;)

cd "$scratch"
CONTRASTIVE_KERNELS_BUILD=1 \
CONTRASTIVE_KERNELS_CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer" \
CONTRASTIVE_KERNELS_LDFLAGS="-fsanitize=address,undefined" \
  "$python" setup.py --quiet build_ext --inplace

# Python itself leaks at exit. It is not built with the sanitizers, so they have to be loaded first.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$scratch" \
  "$python" -m pytest -q -p no:cacheprovider tests "${@:--k=shapes or empty or strides or nothing or views or saved or alone or softmax_total or switches and threads2}"
