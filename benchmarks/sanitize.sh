#!/usr/bin/env bash
# Runs the kernels' case program under each tool of compute-sanitizer, all tools at once. The
# summary goes to benchmarks/results/<device>-sanitizer.txt. It also names tools that the system
# refuses to run.
set -uo pipefail
program=${1:?usage: sanitize.sh PROGRAM}
limit=${2:-240}  # seconds for each tool
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
out="$(dirname "$0")/results/$(echo "$name" | tr '[:upper:] ' '[:lower:]-')-sanitizer.txt"
logs=$(mktemp -d)
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
tools="memcheck racecheck synccheck initcheck"
pids=()
for tool in $tools; do
  { timeout "$limit" compute-sanitizer --tool "$tool" --error-exitcode 99 "$program" --quick \
      >"$logs/$tool" 2>&1; echo $? >"$logs/$tool.status"; } &
  pids+=($!)
done
plain=$("$program")
plain_status=$?
wait "${pids[@]}"
failed=0
{
  echo "$name, driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
  [ $plain_status -eq 0 ] || failed=1
  echo "$plain" | grep FAILED
  echo "without a tool: $(echo "$plain" | tail -n 1)"
  for tool in $tools; do
    log="$logs/$tool"
    status=$(cat "$log.status")
    case $status in
      0) result="clean: $(grep -E '^[0-9]+ cases' "$log" | tail -n 1)" ;;
      99) result="ERRORS: $(grep 'ERROR SUMMARY' "$log" | tail -n 1)" failed=1 ;;
      124)
        reports=$(grep -cE '^=+ +(Invalid|Uninit|Error|ERROR|Barrier|Misaligned|Program hit)' "$log")
        result="not finished in $limit s: $(grep -c ': ok' "$log") cases, $reports reports" failed=1
        ;;
      *) result="did not run (status $status): $(grep -m 1 -E '=====|FAILED' "$log" || tail -n 1 "$log")" failed=1 ;;
    esac
    echo "$tool: $result"
  done
  exit $failed
} | tee "$out"
