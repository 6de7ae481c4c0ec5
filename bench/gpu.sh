#!/usr/bin/env bash
# Everything that needs a GPU, on a machine without a network: builds, tests, sanitises and measures the checkout.
# bench/README.md lists the options, which are environment variables. STAGES="build test" bench/gpu.sh runs some.
set -u
cd "$(dirname "$0")/.." || exit 2

STAGES=${STAGES:-build test cpp sanitize bench model}
PYTHON=${PYTHON:-python3}
WORK=${WORK:-$PWD/build/gpu}         # the environment and the logs
OUT=${OUT:-$PWD/bench/results}       # what is kept
WHEELS=${WHEELS:-}                   # a folder of wheels: whatever Python package the machine lacks
GTEST=${GTEST:-}                     # a prefix that holds GoogleTest's CMake package
LIMIT=${LIMIT:-540}                  # seconds for each stage
TESTS=${TESTS:-python_tests}         # for pytest, of which those with "cuda" in their name run
SANITIZE=${SANITIZE:-memcheck racecheck synccheck initcheck}
SANITIZE_FILTER=${SANITIZE_FILTER:-*}
SANITIZE_TESTS=${SANITIZE_TESTS:-equals_the_cpu}
BENCH=${BENCH:-}                     # further options of bench/run_all.py
MODEL=${MODEL:-llava-7b}             # for csp bench, at each of these batches
MODEL_BATCHES=${MODEL_BATCHES:-1 8 24}

venv=$WORK/venv
cpp_tests=build/cuda/cpp_tests/csp_cuda_tests
summary=()
failed=0

say() { printf '\n==> %s (%ss)\n' "$1" "$SECONDS"; }
note() { summary+=("$(printf '%-22s %-10s %4ss  %s' "$1" "$2" "$3" "${4:-}")"); }

# within SECONDS COMMAND...: stops it, and what it started, when the time is over.
within() { timeout --kill-after=10 "$@"; }

# attempt NAME SECONDS LOG COMMAND...: runs it, keeps its output, notes how it went; its status is returned.
attempt() {
  local name=$1 limit=$2 log=$WORK/$3 begin=$SECONDS status
  shift 3
  say "$name (at most ${limit}s)"
  within "$limit" "$@" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  case $status in
    0) note "$name" passed $((SECONDS - begin)) ;;
    124 | 137) note "$name" STOPPED $((SECONDS - begin)) "its time was over" ;;
    *) note "$name" FAILED $((SECONDS - begin)) "exit status $status, see $log" ;;
  esac
  [ "$status" = 0 ] || failed=1
  return "$status"
}

has_stage() { [[ " $STAGES " == *" $1 "* ]]; }

# Prints what the build and the tests need and the machine lacks.
# shellcheck disable=SC2329  # this and the next two are called by another bash, which timeout can stop
missing() {
  local tool
  for tool in nvcc cmake ninja c++; do
    command -v "$tool" >/dev/null || echo "missing: $tool"
  done
  "$1" - <<'PY'
from importlib.util import find_spec

for name, wheel in {
    "torch": "torch", "scikit_build_core": "scikit-build-core", "pybind11": "pybind11", "pytest": "pytest",
    "hypothesis": "hypothesis", "rich": "rich", "typer": "typer", "numpy": "numpy",
}.items():
    if find_spec(name) is None:
        print(f"missing: the Python package {wheel}: put its wheel into a folder and name that by WHEELS")
PY
}

# An environment on top of $PYTHON's packages, also where $PYTHON is an environment itself.
# shellcheck disable=SC2329
make_environment() {
  local site
  "$PYTHON" -m venv --without-pip --clear "$venv" || return
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])') || return
  "$PYTHON" - >"$site/below.pth" <<'PY'
import sysconfig

for path in dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")):
    print(f"import site; site.addsitedir({path!r})")
PY
  if [ -n "$WHEELS" ]; then
    "$venv/bin/python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || return
  fi
}

# shellcheck disable=SC2329
build() {
  local lacks
  make_environment || { echo "the environment could not be made"; return 1; }
  lacks=$(missing "$venv/bin/python")
  if [ -n "$lacks" ]; then
    echo "$lacks"
    return 1
  fi
  "$venv/bin/python" -m pip install --quiet --no-build-isolation --no-deps --no-index -e . \
    -Ceditable.rebuild=false -Ccmake.define.CSP_WITH_CUDA=ON || return
  "$venv/bin/python" -c 'import csp_ext; print(csp_ext.cuda_status()); print(csp_ext.build_info())' || return
  "$venv/bin/python" tools/cuda_resources.py --archs ""
  cmake --preset cuda -DCMAKE_PREFIX_PATH="$GTEST" --log-level=WARNING || return
  if cmake --build --preset cuda --target help | grep -q csp_cuda_tests; then
    cmake --build --preset cuda --target csp_cuda_tests -- --quiet
  else
    echo "C++ TESTS WERE NOT BUILT: GoogleTest was not found"
  fi
}

# Whether the package is built and its CUDA library loaded: a stage of Python must not pass without a GPU.
built() {
  local why="the package is not built: run the stage build"
  [ -x "$venv/bin/python" ] && why=$("$venv/bin/python" - 2>&1 <<'PY'
import csp_ext
import torch

if not torch.cuda.is_available():
    print("torch sees no GPU")
elif not csp_ext.cuda_status().loaded:
    print("the CUDA library did not load:", csp_ext.cuda_status().reason)
PY
  )
  [ -z "$why" ] && return
  note "$1" SKIPPED 0 "${why##*$'\n'}"
  failed=1
  return 1
}

cpp_built() {
  [ -x "$cpp_tests" ] && return
  note "$1" SKIPPED 0 "no C++ tests: GoogleTest was not found, name its prefix by GTEST"
  return 1
}

# Where compute-sanitizer is; nothing where it is not.
sanitizer() {
  local place
  for place in "$(command -v compute-sanitizer)" /usr/local/cuda*/{bin,compute-sanitizer}/compute-sanitizer; do
    [ -x "$place" ] && echo "$place" && return
  done
}

# check TOOL NAME SECONDS COMMAND...: under compute-sanitizer; status 3 where it refuses the device.
check() {
  local tool=$1 name=$2 limit=$3 before=${#summary[@]} was=$failed
  shift 3
  attempt "$tool, $name" "$limit" "sanitize-$tool-$name.log" "$program" --tool "$tool" --error-exitcode 1 "$@" && return
  grep -qE "Device not supported|not supported on this (device|platform)" "$WORK/sanitize-$tool-$name.log" || return
  summary=("${summary[@]:0:before}")
  failed=$was
  note sanitize REFUSED 0 "compute-sanitizer refuses this device"
  return 3
}

sanitize() {
  local program tool share runs
  program=$(sanitizer)
  if [ -z "$program" ]; then
    note sanitize SKIPPED 0 "compute-sanitizer was not found"
    return
  fi
  runs=$(($(wc -w <<<"$SANITIZE") + 1))
  share=$((LIMIT / runs))
  if cpp_built "sanitize, C++"; then
    for tool in $SANITIZE; do
      check "$tool" cpp "$share" "$cpp_tests" --gtest_brief=1 --gtest_filter="$SANITIZE_FILTER"
      [ $? = 3 ] && return
    done
  fi
  # with torch's caching allocator off, each tensor is an allocation of its own that memcheck knows
  built "sanitize, Python" &&
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 check memcheck python "$share" \
      "$venv/bin/python" -m pytest -q -x python_tests/test_cuda.py -k "$SANITIZE_TESTS"
}

mkdir -p "$WORK" "$OUT"
for stage in $STAGES; do
  case $stage in
    build | test | cpp | sanitize | bench | model) ;;
    *) echo "no such stage: $stage (build test cpp sanitize bench model)" >&2; exit 2 ;;
  esac
done
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
export PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin

if has_stage build; then
  export -f build make_environment missing
  export PYTHON WHEELS GTEST venv
  attempt build "$LIMIT" build.log bash -c build
fi
if has_stage test && built test; then
  attempt test "$LIMIT" test.log "$venv/bin/python" -m pytest "$TESTS" -k cuda
fi
if has_stage cpp && cpp_built cpp; then
  attempt cpp "$LIMIT" cpp.log "$cpp_tests" --gtest_brief=1
fi
if has_stage sanitize; then
  sanitize
fi
if has_stage bench && built bench; then
  # shellcheck disable=SC2086  # BENCH holds several words
  attempt bench "$LIMIT" bench.log "$venv/bin/python" bench/run_all.py --device cuda --folder "$OUT" \
    --limit "$((LIMIT - 10))" $BENCH
fi
if has_stage model && built model; then
  for rows in $MODEL_BATCHES; do
    attempt "model, batch $rows" "$LIMIT" "model-$rows.log" "$venv/bin/python" -m csp_ext bench \
      --model "$MODEL" --device cuda --batch "$rows" --out "$OUT/$MODEL-batch-$rows"
  done
fi

say "summary"
printf '%s\n' "${summary[@]}"
exit "$failed"
