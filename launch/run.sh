#!/usr/bin/env bash
# Trains on this host of a TPU slice; the exit code says what to do next:
#
#   launch/run.sh GENERATION --config=configs/10b.py --workdir=gs://BUCKET/10b ...     (GENERATION: v4, v5e, v5p, v6e)
#
#     0   training is finished
#     2   mistake in the command; restarting would repeat it
#    75   the run's other hosts did not appear; restart
#   143   stopped by SIGTERM or Ctrl-C, the last step is saved; restart
#   else  failure; restart, but not for ever
#
# lidit_jax.main itself also exits with 0 when stopped, which tpu_vm.sh or Kubernetes would take for the end of
# training, and with 2 if hosts are missing, which is no mistake where hosts are preempted. This script tells these
# cases apart by main's last message.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STOPPED="stopped by (SIGTERM|Ctrl-C)"
ALONE="the run's other hosts were not found"

generation=${1:-}
if [ -z "$generation" ] || [ ! -f "launch/env/$generation.sh" ]; then
  echo "error: give the TPU generation first, one of $(cd launch/env && echo *.sh | sed 's/\.sh//g')" >&2
  exit 2
fi
shift
# shellcheck source=/dev/null
. "launch/env/$generation.sh"

main=
interrupted=
# shellcheck disable=SC2329
forward() {
  interrupted=yes
  [ -z "$main" ] || kill -TERM "$main" 2>/dev/null || true
}
trap forward TERM INT

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkfifo "$scratch/pipe"
# A host that shuts down sends SIGTERM to every process. tee must survive it, or main fails at its next message.
(
  trap '' TERM
  exec tee "$scratch/messages" <"$scratch/pipe" >&2 9>&-
) &
copier=$!
# In a process group of its own, so that SIGTERM reaches main but not its data workers, and leftovers can be killed.
setsid "${PYTHON:-python3}" -m lidit_jax.main --distributed "$@" 2>"$scratch/pipe" &
main=$!
[ -z "$interrupted" ] || kill -TERM "$main"
# For worker.sh: the processes to signal and, below, the exit code.
[ -z "${LIDIT_STATE:-}" ] || echo "$$ $main" >"$LIDIT_STATE/pids"

while :; do
  interrupted=
  wait "$main" && status=0 || status=$?
  [ -n "$interrupted" ] || break # otherwise the signal only interrupted the wait
done
kill -KILL -- "-$main" 2>/dev/null || true
for _ in {1..100}; do # until the last messages are copied
  kill -0 "$copier" 2>/dev/null || break
  sleep 0.05
done

if [ "$status" = 0 ] && grep -qE "$STOPPED" "$scratch/messages"; then
  status=143
elif [ "$status" = 2 ] && grep -qF "$ALONE" "$scratch/messages"; then
  status=75
fi
[ -z "${LIDIT_STATE:-}" ] || echo "exited $status" >"$LIDIT_STATE/status"
exit "$status"
