#!/usr/bin/env bash
# The commands that tpu_vm.sh runs on every worker of a slice. The folder that contains the code also has venv/, the
# run's log, and the run's state: `lock` (held while the run lives), `pids`, `status` (its exit code), and `stopped`
# (the run was stopped by the user).
#
#   install          installs the package into a virtual environment
#   start GENERATION FLAGS...   starts launch/run.sh, detached
#   status           prints one of none, installed, running, stopped, exited STATUS, lost (e.g. after a reboot)
#   stop [--kill]    sends SIGTERM (or SIGKILL), and waits for the run to exit
#   log LINES [each] follows the log; with `each`, every line starts with this worker's name
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
  if running; then fail "a run is active: stop it first"; fi
  rm -f "$home/installed" "$home/status" "$home/stopped" "$home/pids"
  # The VM images' own Python may be older. On 3.11, which uv installs, pip finds the versions that the tests were run
  # with (newer Pythons get newer JAX and libtpu).
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
  flock -n 9 || fail "a run is already active: stop it first"
  rm -f "$home/status" "$home/stopped" "$home/pids"
  # Without huge pages, starting and stopping a TPU is slow (JAX warns from v5e on). Every boot resets the setting.
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

# Sets runner and main to the processes of the active run, if there is one. A run that has just begun has not written
# them yet, so this waits, for at most ten seconds.
find_processes() {
  for _ in {1..200}; do
    running || return
    ! read -r runner main 2>/dev/null <"$home/pids" || return 0
    sleep 0.05
  done
  return 1
}

stop() {
  local runner main
  if find_processes; then
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
  *) fail "unknown command '$command': give install, start, status, stop or log" ;;
esac
