#!/usr/bin/env bash
# Runs the kernels' case program under each tool of compute-sanitizer. The summary goes to
# benchmarks/results/<device>-sanitizer.txt. It also names tools that the system refuses to run.
set -uo pipefail
program=${1:?usage: sanitize.sh PROGRAM}
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
out="$(dirname "$0")/results/$(echo "$name" | tr '[:upper:] ' '[:lower:]-')-sanitizer.txt"
log=$(mktemp)
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
failed=0
{
  echo "$name, driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
  echo "without a tool: $("$program" | tail -n 1)"
} | tee "$out"
for tool in memcheck racecheck synccheck initcheck; do
  timeout 110 compute-sanitizer --tool "$tool" --error-exitcode 99 "$program" --quick >"$log" 2>&1
  status=$?
  case $status in
    0) result="clean: $(grep -E '^[0-9]+ cases' "$log" | tail -n 1)" ;;
    99) result="ERRORS: $(grep 'ERROR SUMMARY' "$log" | tail -n 1)" failed=1 ;;
    124) result="not finished in 110 s" failed=1 ;;
    *) result="did not run (status $status): $(grep -m 1 '=========' "$log" || tail -n 1 "$log")" failed=1 ;;
  esac
  echo "$tool: $result" | tee -a "$out"
done
exit $failed
