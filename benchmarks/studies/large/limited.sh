#!/usr/bin/env bash
# Run a command in a memory control group, noting its memory every half second:  limited.sh LIMIT CURVE.jsonl COMMAND [ARGUMENT ...]
set -euo pipefail
limit=$(numfmt --from=iec-i --suffix=B "$1"); limit=${limit%B}; curve=$2; shift 2
if grep -qw memory /sys/fs/cgroup/cgroup.controllers 2>/dev/null; then
  group=/sys/fs/cgroup/r1q-limited-$$ cap=memory.max use=memory.current peak=memory.peak
else
  group=/sys/fs/cgroup/memory/r1q-limited-$$ cap=memory.limit_in_bytes use=memory.usage_in_bytes peak=memory.max_usage_in_bytes
fi
mkdir "$group"; echo "$limit" >"$group/$cap"
: >"$curve"; began=$(date +%s.%N)
( echo "$BASHPID" >"$group/cgroup.procs"; exec "$@" ) & job=$!
while kill -0 "$job" 2>/dev/null; do
  rss=$(awk '/^RssAnon|^RssShmem/ {sum += $2} END {print sum * 1024}' "/proc/$job/status" 2>/dev/null || echo 0)
  all=$(awk '/^VmRSS/ {print $2 * 1024}' "/proc/$job/status" 2>/dev/null || echo 0)
  printf '{"seconds": %.1f, "anonymous": %s, "rss": %s, "group": %s}\n' \
    "$(echo "$(date +%s.%N) - $began" | bc)" "${rss:-0}" "${all:-0}" "$(cat "$group/$use")" >>"$curve"
  sleep 0.5
done
code=0; wait "$job" || code=$?
printf '{"exit": %d, "limit": %s, "group_peak": %s}\n' "$code" "$limit" "$(cat "$group/$peak" 2>/dev/null || echo null)" >>"$curve"
rmdir "$group"
exit "$code"
