#!/usr/bin/env bash
# Trains on this host, one of those of a TPU slice, and says by its exit status what is to be done next:
#
#   launch/run.sh GENERATION --config=configs/10b.py --workdir=gs://BUCKET/10b ...     (GENERATION: v4, v5e, v5p, v6e)
#
#     0   training is finished
#     2   a mistake in the command; another start would make it again
#    75   the run's other hosts did not come; start again
#   143   SIGTERM came and the last step is saved; start again
#   else  something broke; start again, but not for ever
#
# main ends with 0 after SIGTERM too, since all went well; whoever keeps a run alive (tpu_vm.sh, Kubernetes) would take
# that for the end of training. It ends with 2 where hosts are missing, which only looks like a mistake where hosts come
# and go. Both are told apart by what main says last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STOPPED="stopped by SIGTERM after"
ALONE="the run's other hosts were not found"

generation=${1:-}
if [ -z "$generation" ] || [ ! -f "launch/env/$generation.sh" ]; then
  echo "error: name the TPU's generation first, one of $(cd launch/env && echo *.sh | sed 's/\.sh//g')" >&2
  exit 2
fi
shift
# shellcheck source=/dev/null
. "launch/env/$generation.sh"

# Compiling takes minutes, and a preempted run comes back on fresh machines: only a place that all hosts reach keeps the
# programs (the first host writes them, the others read).
if [ -z "${JAX_COMPILATION_CACHE_DIR+set}" ]; then
  for argument in "$@"; do
    case $argument in --workdir=*) export JAX_COMPILATION_CACHE_DIR="${argument#--workdir=}/compiled" ;; esac
  done
fi

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
# A machine that goes down sends SIGTERM to every process; the copier must stay, or main fails at its next word.
(
  trap '' TERM
  exec tee "$scratch/said" <"$scratch/pipe" >&2 9>&-
) &
copier=$!
# In a group of its own: the signal is for main alone, not for its data workers; and what it leaves behind can be ended.
setsid "${PYTHON:-python3}" -m lidit_jax.main --distributed "$@" 2>"$scratch/pipe" &
main=$!
[ -z "$interrupted" ] || kill -TERM "$main"
# worker.sh's: whom to signal, and how it ended.
[ -z "${LIDIT_STATE:-}" ] || echo "$$ $main" >"$LIDIT_STATE/pids"

while :; do
  interrupted=
  wait "$main" && status=0 || status=$?
  [ -n "$interrupted" ] || break # else it was the signal that ended the waiting
done
kill -KILL -- "-$main" 2>/dev/null || true
for _ in {1..100}; do # until the last words are copied
  kill -0 "$copier" 2>/dev/null || break
  sleep 0.05
done

if [ "$status" = 0 ] && grep -qF "$STOPPED" "$scratch/said"; then
  status=143
elif [ "$status" = 2 ] && grep -qF "$ALONE" "$scratch/said"; then
  status=75
fi
[ -z "${LIDIT_STATE:-}" ] || echo "exited $status" >"$LIDIT_STATE/status"
exit "$status"
