#!/usr/bin/env bash
# What tpu_vm.sh asks of every worker of a slice. Beside the folder with the code lie venv/, the run's log, and what is
# known of the run: `lock` is held as long as it lives, `pids`, `status` (its exit status), `stopped` (on demand).
#
#   install          a virtual environment with the package
#   start GENERATION FLAGS...   launch/run.sh, detached
#   status           one line: none, installed, running, stopped, exited STATUS, or lost (as after a reboot)
#   stop [--kill]    SIGTERM (or SIGKILL), and waits for the end
#   log LINES [each] follows the log; `each`: every line with this worker's name
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
home=$(dirname "$code")

say() { echo "worker $(hostname) $*"; }

fail() {
  echo "error: $(hostname): $*" >&2
  exit 1
}

running() { ! flock -n "$home/lock" true; }

install() {
  if running; then fail "a run is going on: stop it first"; fi
  rm -f "$home/installed" "$home/status" "$home/stopped" "$home/pids"
  # The images' own Python may be older; uv brings 3.11, for which pip finds the versions that the tests were run with
  # (for newer Pythons there are newer JAX and libtpu).
  PATH="$HOME/.local/bin:$PATH"
  if ! command -v uv >/dev/null; then
    python3 -m pip install --quiet --user uv >&2 || { curl -LsSf https://astral.sh/uv/install.sh | sh >&2; }
  fi
  rm -rf "$home/venv"
  uv venv --quiet --python 3.11 "$home/venv"
  uv pip install --quiet --python "$home/venv/bin/python" --editable "${code}[tpu,gcs]"
  touch "$home/installed"
  say installed
}

start() {
  [ -e "$home/installed" ] || fail "nothing is installed here: install first"
  exec 9>"$home/lock"
  flock -n 9 || fail "a run is going on already: stop it first"
  rm -f "$home/status" "$home/stopped" "$home/pids"
  # From v5e on, JAX warns that starting and stopping the TPU takes long without. Lost at every boot.
  echo always | sudo -n tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null 2>&1 || true
  echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) launch/run.sh $*" >>"$home/log"
  PYTHON="$home/venv/bin/python" LIDIT_STATE="$home" \
    setsid nohup bash "$code/launch/run.sh" "$@" >>"$home/log" 2>&1 </dev/null &
  say started
}

status() {
  if running; then
    say running
  elif [ -e "$home/stopped" ]; then
    say stopped
  elif [ -e "$home/status" ]; then
    say "$(cat "$home/status")"
  elif [ -e "$home/pids" ]; then
    say lost
  elif [ -e "$home/installed" ]; then
    say installed
  else
    say none
  fi
}

stop() {
  local runner main
  if running && read -r runner main <"$home/pids"; then
    touch "$home/stopped"
    if [ "${1:-}" = --kill ]; then
      kill -KILL -- "$runner" "-$main" 2>/dev/null || true
    else
      kill -TERM "$runner" 2>/dev/null || kill -TERM "$main" 2>/dev/null || true
    fi
    flock -w "${LIDIT_STOP_SECONDS:-300}" "$home/lock" true || true
  fi
  status
}

log() {
  if [ "${2:-}" = each ]; then
    tail -n "$1" -F "$home/log" | sed -u "s/^/$(hostname): /"
  else
    exec tail -n "$1" -F "$home/log"
  fi
}

command=${1:-}
case $command in
  install | start | status | stop | log) "$@" ;;
  *) fail "worker.sh does install, start, status, stop and log, not '$command'" ;;
esac
