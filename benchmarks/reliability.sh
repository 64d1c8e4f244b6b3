#!/usr/bin/env bash
# Reliability of the GPU backends, on a machine with an NVIDIA GPU; docs/developers/reliability.md has the figures.
#
#   bash benchmarks/reliability.sh sanitize          compute-sanitizer, four tools at once, over tests/commands/gpu_sanitize.py
#   bash benchmarks/reliability.sh fuzz [CASES]      random cases against the oracle (100,000), cuda then triton (a tenth)
#                                                    of few combinations, so that kernels are compiled once
#   bash benchmarks/reliability.sh tests             the test suite
#
# Each needs under ten minutes.  Logs go to $OUT, or to out/reliability.  PYTHON (python3), SANITIZER, SECONDS_A_TOOL
# (400) and BACKENDS (cuda,triton) can be set.
# The status is 0 only if every step was clean.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-out/reliability}
SECONDS_A_TOOL=${SECONDS_A_TOOL:-400}
SANITIZER=${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}
TOOLS=(memcheck racecheck initcheck synccheck)
BACKENDS=${BACKENDS:-cuda,triton}
STEP=${1:-}
CASES=${2:-100000}
case $STEP in
  sanitize | fuzz | tests) ;;
  *)
    echo "benchmarks/reliability.sh: expected sanitize, fuzz or tests, got '$STEP'" >&2
    exit 2
    ;;
esac
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
SUMMARY=$OUT/reliability.txt
: >"$SUMMARY"
bad=0

note() { echo "$*" | tee -a "$SUMMARY"; }

# step NAME LOG COMMAND...: runs it, keeps all it prints in LOG and shows its last lines.
step() {
  local name=$1 log=$2 start=$SECONDS status
  shift 2
  "$@" >>"$log" 2>&1
  status=$?
  ((status == 0)) || bad=1
  note "$name: status $status, $((SECONDS - start)) s; $(grep -hE 'cases,|passed|failed' "$log" | tail -n 2 | tr '\n' ' ')"
  ((status == 0)) || tail -n 15 "$log"
}

sanitize() {
  # Once without a tool: the kernels are compiled and cached, and a wrong result shows before a slow run starts.
  step "gpu_sanitize without a tool" "$OUT/plain.log" timeout 150 "$PYTHON" tests/commands/gpu_sanitize.py --backends "$BACKENDS"
  local tool pids=() start=$SECONDS
  for tool in "${TOOLS[@]}"; do
    # Without torch's caching allocator every tensor is an allocation of its own, so that memcheck sees its ends.
    (
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$SECONDS_A_TOOL" "$SANITIZER" --tool "$tool" --error-exitcode 9 --report-api-errors no \
        --target-processes application-only --print-limit 20 \
        "$PYTHON" tests/commands/gpu_sanitize.py --backends "$BACKENDS" >"$OUT/$tool.log" 2>&1
      echo "status $?, $((SECONDS - start)) s" >>"$OUT/$tool.log"
    ) &
    pids+=($!)
  done
  wait "${pids[@]}"
  for tool in "${TOOLS[@]}"; do
    note "compute-sanitizer $tool: $(grep -hE 'SUMMARY|cases,|^status' "$OUT/$tool.log" | tail -n 3 | tr '\n' ' ')"
    if ! grep -q '^status 0,' "$OUT/$tool.log"; then
      bad=1
      tail -n 25 "$OUT/$tool.log"
    fi
  done
}

# differential BACKEND CASES: in as many processes as there are cores, up to sixteen, each with a seed of its own.
differential() {
  local backend=$1 cases=$2 jobs=1 start=$SECONDS status=0 job pids=()
  local few=10
  [[ $backend == triton ]] && few=4
  jobs=$(nproc)
  ((jobs > 16)) && jobs=16
  local log=$OUT/fuzz-$backend.log
  for ((job = 0; job < jobs; job++)); do
    # Seeds count up from where each process begins: far enough apart that no two meet.
    timeout 560 "$PYTHON" tests/commands/fuzz.py --backend "$backend" --device cuda --cases $(((cases + jobs - 1) / jobs)) \
      --few $few --seed $((job * 1000000)) >"$log.$job" 2>&1 &
    pids+=($!)
  done
  for job in "${!pids[@]}"; do
    wait "${pids[$job]}" || status=$?
  done
  tail -qn 4 "$log".* >"$log"
  if ((status)); then
    bad=1
    tail -qn 15 "$log".*
  fi
  note "fuzz $backend: $cases cases in $jobs processes, status $status, $((SECONDS - start)) s; last: $(tail -n 1 "$log")"
  rm -f "$log".*
}

fuzz() {
  local backend cases
  for backend in ${BACKENDS//,/ }; do
    cases=$CASES
    [[ $backend == triton ]] && cases=$((CASES / 10))
    differential "$backend" "$cases"
  done
}

suite() { step "pytest" "$OUT/pytest.log" timeout 500 "$PYTHON" -m pytest -q -p no:cacheprovider tests; }

note "$(date -u +%F) $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)"
case $STEP in
  sanitize) sanitize ;;
  fuzz) fuzz ;;
  tests) suite ;;
esac
exit $bad
