#!/usr/bin/env bash
# Runs the kernels' case program under each tool of compute-sanitizer. Every tool gets the cases in
# parts, and as many parts run at once as there are processors: one process leaves the GPU idle for
# most of its time. The summary goes to benchmarks/results/<device>-sanitizer.txt. It also names
# tools that the system refuses to run.
set -uo pipefail
program=${1:?usage: sanitize.sh PROGRAM [SECONDS]}
limit=${2:-240}  # seconds for all tools together
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
out="$(dirname "$0")/results/$(echo "$name" | tr '[:upper:] ' '[:lower:]-')-sanitizer.txt"
logs=$(mktemp -d)
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
tools="memcheck synccheck initcheck racecheck"  # racecheck takes longer than all others together
processes=$(nproc)
parts=$(((processes + 1) / 2))

run_part() {  # TOOL PART
  local log="$logs/$1.$2" left=$((limit - SECONDS))
  ((left > 0)) || left=0.01
  timeout "$left" compute-sanitizer --tool "$1" --error-exitcode 99 "$program" --quick \
    --part "$2/$parts" >"$log" 2>&1
  echo $? >"$log.status"
}

report() {  # TOOL
  local log="$logs/$1" statuses errors
  statuses=$(cat "$log".*.status | sort -un)
  local cases
  cases="$(cat "$log".*[0-9] | grep -c ': ok$\|: ok, ') cases"
  errors=$(grep -hE '^=+ ERROR SUMMARY: [1-9]' "$log".*[0-9] | grep -oE '[0-9]+ errors?' |
    awk '{ n += $1 } END { print n + 0 }')
  if grep -qvxE '0|99|124' <<<"$statuses"; then
    local failed
    failed=$(grep -LxE '0|99|124' "$log".*.status | head -n 1)
    failed=${failed%.status}
    echo "did not run (status $(cat "$failed.status")): $(
      grep -m 1 -E '=====|FAILED' "$failed" || tail -n 1 "$failed"
    )"
  elif [ "$errors" -gt 0 ] || grep -qx 99 <<<"$statuses"; then
    echo "ERRORS: $errors in $cases"
  elif grep -qx 124 <<<"$statuses"; then
    local reports
    reports=$(cat "$log".*[0-9] |
      grep -cE '^=+ +(Invalid|Uninit|(Error|Warning): Race|Barrier|Misaligned|Program hit)')
    echo "not finished in $limit s: $cases, $reports reports"
  else
    echo "clean: $cases"
  fi
}

plain=$("$program")
plain_status=$?
for tool in $tools; do
  for ((part = 0; part < parts; ++part)); do
    while (($(jobs -rp | wc -l) >= processes)); do wait -n; done
    run_part "$tool" "$part" &
  done
done
wait
{
  echo "$name, driver $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
  echo "$plain" | grep FAILED
  echo "without a tool: $(echo "$plain" | tail -n 1)"
  for tool in $tools; do
    echo "$tool: $(report "$tool")"
  done
} | tee "$out"
[ $plain_status -eq 0 ] && ! grep -qE '^[a-z]+check: (ERRORS|not finished|did not)' "$out"
