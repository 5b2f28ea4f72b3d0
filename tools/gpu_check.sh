#!/usr/bin/env bash
# Everything that needs a GPU, in one run and within a budget; without a GPU the same as a dry run.
#
#   tools/gpu_check.sh OUT_FOLDER [BUDGET_SECONDS=540]
#
# Stages: environment, build; smoke (the few tests that the sanitizers get, of both kernels), onchip (the
# on-chip kernel's tests), onchip_bench (its points of the benchmark, every kernel); tests (all others),
# memcheck, racecheck, synccheck, initcheck, exchanges, bench (which keeps the points of onchip_bench). One
# that fails or takes too long does not stop the next; a third of the budget is kept for the bench, a fifth
# for onchip_bench. A first call, or one about the on-chip kernel alone:
#
#   GPU_CHECK_STAGES="environment build smoke onchip onchip_bench memcheck racecheck synccheck" ...
#
# Wants Python with torch and pytest, and no network: setuptools, cmake, ninja, nvcc and a C++ compiler build the package, unless its
# libraries (rnnfast/*.so) were carried along and load here.
#
# OUT_FOLDER gets summary.json, logs.txt, exchanges.json, onchip.json, cuda.json, an .md of both and
# pictures: 8 files at most, and after every stage what there is so far. The status is 1 if a stage failed.
#
# Environment: GPU_CHECK_STAGES (default all), GPU_CHECK_COMMIT (of a copy without its history), PYTHON
# (default python3), EXCHANGES (a built bench/exchanges, default build/exchanges), RNNFAST_WHEELS (a
# folder of wheels of what Python lacks, default tools/wheels), RNNFAST_CUDA_ARCHS (default 90a).
set -u

readonly all_stages="environment build smoke onchip onchip_bench tests memcheck racecheck synccheck initcheck exchanges bench"
readonly most_files=8 # that OUT_FOLDER may hold
readonly least=5      # seconds: a stage that would get less is left out
readonly no_tests=5   # pytest's status when nothing was selected
readonly too_long=124 # timeout's status

stop() {
  echo "gpu_check: $*" >&2
  exit 2
}

out=${1:-} budget=${2:-540}
[ $# -ge 1 ] && [ $# -le 2 ] && [ -n "$out" ] || stop "expected OUT_FOLDER [BUDGET_SECONDS], got $# arguments: $*"
[[ $budget =~ ^[1-9][0-9]*$ ]] || stop "BUDGET_SECONDS must be a whole number of seconds over 0, got '$budget'"
read -ra stages <<<"${GPU_CHECK_STAGES:-$all_stages}"
for stage in "${stages[@]}"; do
  [[ " $all_stages " == *" $stage "* ]] || stop "GPU_CHECK_STAGES must be some of: $all_stages, got '$stage'"
done
mkdir -p "$out" || stop "OUT_FOLDER can't be made: $out"
out=$(cd "$out" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
cd "$root" || exit 2
exec 3>&1

python=${PYTHON:-python3}
wheels=${RNNFAST_WHEELS:-$root/tools/wheels}
program=${EXCHANGES:-$root/build/exchanges}
for folder in "${CUDA_HOME:-/usr/local/cuda}/bin" /usr/local/cuda/bin; do
  [ -d "$folder" ] && PATH=$PATH:$folder
done
export PATH PYTHONUNBUFFERED=1 PYTHONPATH="$root:$work/site${PYTHONPATH:+:$PYTHONPATH}"

# --- time, processes and files ---------------------------------------------------------------------

child=""
results=() # stage|status|seconds|detail
gpu=""

left() { echo $((budget - SECONDS)); }

# bounded SECONDS COMMAND...: its status, or 124; in the background, so that a signal is heard at once.
# What takes too long is interrupted as by a person, so that pytest still tells what has failed; a
# background job would ignore that signal by default.
bounded() {
  local seconds=$1
  shift
  timeout --signal=INT --kill-after=20 "$seconds" env --default-signal=INT "$@" </dev/null &
  child=$!
  wait "$child"
  local code=$?
  child=""
  return $code
}

chosen() { [[ " ${stages[*]} " == *" $1 "* ]]; }

# What later stages are promised, in percent of the budget.
share() {
  case $1 in
    onchip_bench) echo 20 ;;
    exchanges) echo 6 ;;
    bench) echo 34 ;;
    *) echo 0 ;;
  esac
}

# Seconds for a stage: what is left without the shares of those after it, or a part of that.
limit_of() {
  local seconds later after=0
  seconds=$(left)
  for later in $all_stages; do
    [ $after = 1 ] && chosen "$later" && seconds=$((seconds - budget * $(share "$later") / 100))
    [ "$later" = "$1" ] && after=1
  done
  case $1 in
    environment | exchanges) [ "$seconds" -gt 60 ] && seconds=60 ;;
    smoke | onchip) seconds=$((seconds / 2)) ;;
    # what is left of the onchip stage is not for a longer benchmark
    onchip_bench) [ "$seconds" -gt $((budget * 2 / 5)) ] && seconds=$((budget * 2 / 5)) ;;
    tests) seconds=$((seconds * 3 / 5)) ;;
    memcheck | racecheck | synccheck) seconds=$((seconds / 2)) ;;
  esac
  echo "$seconds"
}

# Text that may stand between the quotes of JSON and the bars of `results`.
plain() { tr -d '"\\|' | tr '\n\t' '  ' | tr -cd '[:print:]' | sed 's/ *$//' | cut -c 1-300; }

write_summary() {
  local result stage status seconds detail comma=""
  {
    printf '{\n  "gpu": "%s",\n  "dry_run": %s,\n' "$gpu" "$([ -n "$gpu" ] && echo false || echo true)"
    printf '  "commit": "%s",\n  "budget_seconds": %d,\n' "$commit" "$budget"
    printf '  "seconds": %d,\n  "stages": [' "$SECONDS"
    for result in "${results[@]}"; do
      IFS='|' read -r stage status seconds detail <<<"$result"
      printf '%s\n    {"stage": "%s", "status": "%s", "seconds": %d, "detail": "%s"}' \
        "$comma" "$stage" "$status" "$seconds" "$detail"
      comma=","
    done
    printf '\n  ]\n}\n'
  } >"$out/summary.json"
}

# Pictures beyond the limit go into an archive; anything else that is too much is told.
keep_few_files() {
  local pictures=("$out"/*.png) files
  files=$(find "$out" -maxdepth 1 -type f | wc -l)
  if [ "$files" -gt $most_files ] && [ -f "${pictures[0]}" ]; then
    tar -C "$out" -czf "$out/pictures.tar.gz" "${pictures[@]##*/}" && rm -f "${pictures[@]}"
    files=$(find "$out" -maxdepth 1 -type f | wc -l)
  fi
  [ "$files" -le $most_files ] || echo "gpu_check: $out holds $files files, over $most_files" >&2
}

finish() {
  local code=$? result stage status seconds detail
  trap - EXIT
  if [ -n "$child" ]; then kill "$child" 2>/dev/null; fi
  gather_logs
  write_summary
  keep_few_files
  find "$out" -maxdepth 1 -type f -empty -delete
  rm -rf "$work"
  exec >&3 # a signal may come while a stage writes into its log
  printf '\n%-12s %-9s %7s  %s\n' stage status seconds "$([ -n "$gpu" ] && echo "$gpu" || echo "dry run: no GPU")"
  for result in "${results[@]}"; do
    IFS='|' read -r stage status seconds detail <<<"$result"
    printf '%-12s %-9s %7s  %s\n' "$stage" "$status" "$seconds" "$detail"
    case $status in failed | "timed out") [ $code -ne 0 ] || code=1 ;; esac
  done
  exit $code
}

# One file of logs, whatever happens later.
gather_logs() {
  local log
  for log in "$out"/[0-9][0-9]-*.log; do
    [ -f "$log" ] || continue
    { printf '\n===== %s\n' "$(basename "$log")" && cat "$log"; } >>"$out/logs.txt" && rm -f "$log"
  done
}

# --- the stages: each prints into its log and sets `status` and `detail` -------------------------------

set_result() { status=$1 detail=$2; }

# As set_result, by a command's status: passed or dry, failed, timed out.
judge() {
  case $1 in
    0) set_result "$([ -n "$gpu" ] && echo passed || echo dry)" "$2" ;;
    "$too_long" | 137) set_result "timed out" "after $limit s; $2" ;;
    *) set_result failed "$2" ;;
  esac
}

import_of() { timeout 60 "$python" -c "import $1" 2>/dev/null; }

stage_environment() {
  date -u '+%Y-%m-%d %H:%M UTC'
  uname -srm
  if command -v nvidia-smi >/dev/null; then nvidia-smi; else echo "no nvidia-smi"; fi
  local tool missing=() module
  for tool in nvcc compute-sanitizer cmake ninja c++; do
    if command -v "$tool" >/dev/null; then
      echo "$tool: $("$tool" --version 2>&1 | grep -iE '[0-9]+\.[0-9]+' | head -1)"
    else
      missing+=("$tool")
    fi
  done
  for module in setuptools pytest hypothesis expecttest numpy tqdm matplotlib; do
    import_of "$module" || missing+=("$module")
  done
  timeout 60 "$python" - <<'PYTHON'
import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "CUDA", torch.version.cuda)
print("cuDNN", torch.backends.cudnn.version(), "available:", torch.cuda.is_available())
PYTHON
  local code=$?
  echo "missing: ${missing[*]:-nothing}"
  if [ $code -ne 0 ]; then
    set_result failed "torch can't be imported by $python"
  else
    set_result passed "missing: ${missing[*]:-nothing}"
  fi
}

# Prints why the package can't run here; nothing where it can.
load_fault() {
  local text code
  text=$(
    timeout 60 "$python" - "${gpu:+gpu}" <<'PYTHON' 2>&1
import sys
from rnnfast import _library
_library.load()
fault = _library.cuda_load_error()
if fault and sys.argv[1]:
    print(fault)
PYTHON
  )
  code=$?
  [ $code -eq 0 ] || text+=$'\n'"loading it ends with status $code: ${text##*$'\n'}"
  tail -1 <<<"$text"
}

stage_build() {
  local fault missing=() tool
  fault=$(load_fault)
  if [ -z "$fault" ] && { [ -n "$gpu" ] || [ -f rnnfast/_C_cuda.so ]; }; then
    set_result passed "the libraries in rnnfast/ load here"
    return
  fi
  echo "not as it is: ${fault:-rnnfast/_C_cuda.so is missing}"
  for tool in cmake ninja nvcc c++; do
    command -v "$tool" >/dev/null || [ -x "$(dirname "$(command -v "$python")")/$tool" ] || missing+=("$tool")
  done
  import_of setuptools || missing+=(setuptools)
  import_of torch || missing+=(torch)
  if [ ${#missing[@]} -gt 0 ]; then
    set_result "$([ -n "$gpu" ] && echo failed || echo dry)" "a build lacks ${missing[*]}"
    return
  fi
  if [ -z "$gpu" ]; then # libraries that somebody else may be using stay as they are
    set_result dry "would build: ${fault:-rnnfast/_C_cuda.so is missing}"
    return
  fi
  RNNFAST_CUDA=1 bounded "$limit" "$python" setup.py build_ext --inplace
  local code=$?
  fault=$(load_fault)
  if [ $code -eq 0 ] && [ -n "$fault" ]; then
    set_result failed "built, but: $fault"
  else
    judge $code "RNNFAST_CUDA=1 setup.py build_ext --inplace"
  fi
}

# pytest_stage TESTS COMMAND...: tests marked cuda, run by `COMMAND... -m pytest`: those of the smoke test
# ("smoke"), of the on-chip kernel ("onchip"), or all others ("tests").
pytest_stage() {
  local which=$1 marker=cuda files=() file report code
  shift
  if ! import_of pytest; then
    set_result "$([ -n "$gpu" ] && echo failed || echo dry)" "pytest is missing, and no wheels are in $wheels"
    return
  fi
  case $which in
    smoke) marker=cuda_sanitize files=(tests/test_cuda_sanitize.py) ;;
    onchip) files=(tests/test_cuda_onchip*.py) ;;
    tests)
      for file in tests/test_cuda*.py; do # but what has a stage of its own that was asked for
        case $file in
          *_sanitize.py) chosen smoke || files+=("$file") ;;
          *_onchip*.py) chosen onchip || files+=("$file") ;;
          *) files+=("$file") ;;
        esac
      done
      ;;
  esac
  # The options of pyproject.toml may name what is not here.
  bounded "$limit" "$@" -m pytest -q -m "$marker" "${files[@]}" \
    -o addopts= -ra -p no:cacheprovider --continue-on-collection-errors --maxfail=50 --durations=10
  code=$?
  report=$(grep -E '(passed|failed|skipped|errors?|deselected|no tests ran|no tests collected).* in [0-9.]+' "$log" | tail -1 | tr -d '=')
  report=${report:-no report of pytest}
  if [ $code -eq $no_tests ] || { [ $code -eq 0 ] && [[ $report != *passed* ]]; }; then
    set_result "$([ -n "$gpu" ] && echo failed || echo dry)" "no test ran: $report"
  else
    judge $code "$report"
  fi
}

stage_smoke() { pytest_stage smoke "$python"; }
stage_onchip() { pytest_stage onchip "$python"; }
stage_tests() { pytest_stage tests "$python"; }

sanitizer_stage() {
  if ! command -v compute-sanitizer >/dev/null; then
    set_result skipped "no compute-sanitizer on PATH"
  elif [ -z "$gpu" ]; then
    set_result dry "would run the tests marked cuda_sanitize"
  else
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 pytest_stage smoke \
      compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 "$python"
  fi
}
stage_memcheck() { sanitizer_stage memcheck; }
stage_racecheck() { sanitizer_stage racecheck; }
stage_synccheck() { sanitizer_stage synccheck; }
stage_initcheck() { sanitizer_stage initcheck; }

stage_exchanges() {
  if [ -z "${EXCHANGES:-}" ] && { [ ! -x "$program" ] || ! timeout 30 "$program" --only -- >/dev/null 2>&1 ||
    [ -n "$(find bench/exchanges -newer "$program" -name '*.[ch]*')" ]; }; then
    if ! command -v nvcc >/dev/null; then
      set_result "$([ -n "$gpu" ] && echo failed || echo dry)" "no nvcc on PATH, and no program at $program"
      return
    fi
    program=$work/exchanges
    bounded "$limit" bench/exchanges/build.sh "$program" || {
      judge $? "bench/exchanges/build.sh"
      return
    }
    limit=$((limit - SECONDS + begun))
  fi
  local seconds=$((limit > 20 ? limit - 10 : limit)) code good all
  bounded "$limit" "$program" --seconds "$seconds" >"$out/exchanges.json"
  code=$?
  all=$(grep -c '"name": .*"status"' "$out/exchanges.json")
  good=$(grep -c '"status": "ok"' "$out/exchanges.json")
  [ -s "$out/exchanges.json" ] || rm -f "$out/exchanges.json"
  grep '"status": "\(failed\|wrong\|timed out\)' "$out/exchanges.json" 2>/dev/null
  [ $code -eq 0 ] && [ -n "$gpu" ] && [ "$good" -eq 0 ] && code=1
  judge $code "$good of $all rows measured"
}

# bench_stage NAME WORDS...: the benchmark into NAME.json, .md and pictures.
bench_stage() {
  local name=$1 seconds=$((limit > 40 ? limit - 20 : limit / 2)) code line
  shift
  bounded "$limit" "$python" -m bench compare --device cuda --engine all --budget "$seconds" \
    --out "$out/$name.json" ${commit:+--commit "$commit"} "$@"
  code=$?
  if [ $code -ne 0 ] && [ -f "$out/$name.json" ] && [ ! -f "$out/$name.md" ]; then
    echo "cut off: tables and pictures of what there is"
    bounded 20 "$python" -m bench table --markdown "$out/$name.json" >"$out/$name.md"
    bounded 20 "$python" -m bench plot "$out/$name.json" --folder "$out"
  fi
  if [ -f "$out/$name.log" ]; then
    printf '\n----- %s.log\n' "$name"
    cat "$out/$name.log" && rm -f "$out/$name.log"
  fi
  line=$(grep -E 'Not measured:|dry run|^The kernel that the library|^Goals' "$log" | tail -4 | tr '\n' ' ')
  judge $code "${line:-see logs.txt}"
}
stage_onchip_bench() { bench_stage onchip --shapes onchip; }
stage_bench() {
  local words=()
  # points that onchip_bench has measured are kept; none of a dry run
  [ -n "$gpu" ] && chosen onchip_bench && [ -f "$out/onchip.json" ] && words=(--resume "$out/onchip.json")
  bench_stage cuda "${words[@]}"
}

# --- the run -----------------------------------------------------------------------------------------

commit=${GPU_CHECK_COMMIT:-$(git -C "$root" rev-parse --short=10 HEAD 2>/dev/null)}
[ -n "${GPU_CHECK_COMMIT:-}" ] || [ -z "$commit" ] || git -C "$root" diff --quiet HEAD 2>/dev/null || commit+=+
rm -f "$out"/[0-9][0-9]-*.log "$out"/{summary.json,logs.txt,exchanges.json,pictures.tar.gz} \
  "$out"/{onchip,cuda}.{json,log,md} "$out"/{onchip,cuda}-*.png
trap finish EXIT
trap 'exit 143' TERM INT HUP

if [ -d "$wheels" ]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl ||
    echo "gpu_check: the wheels in $wheels could not be installed" >&2
fi
gpu=$(timeout 60 "$python" -c 'import torch
if torch.cuda.is_available(): print(torch.cuda.get_device_name())' 2>/dev/null | plain)
if [ -n "$gpu" ]; then
  echo "gpu_check: $gpu, $budget s"
else
  echo "gpu_check: no GPU here (torch.cuda.is_available() is false): a dry run, $budget s"
fi

number=0
for stage in $all_stages; do
  if chosen "$stage"; then
    log=$out/$(printf '%02d' $number)-$stage.log
    limit=$(limit_of "$stage")
    begun=$SECONDS
    if [ "$limit" -lt $least ]; then
      set_result skipped "no time left"
    else
      set_result failed "stopped while it ran" # unless it comes to an end
      echo "gpu_check: $stage, $limit s at most"
      results+=("$stage|$status|0|$detail")
      "stage_$stage" >"$log" 2>&1
      unset 'results[-1]'
      [ "$status" = failed ] && tail -n 15 "$log"
    fi
    results+=("$stage|$status|$((SECONDS - begun))|$(plain <<<"$detail")")
    gather_logs
    write_summary
  fi
  number=$((number + 1))
done
