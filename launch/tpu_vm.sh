#!/usr/bin/env bash
# Trains on TPU VMs through queued resources, on one slice or several.
#
#   launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE --type=TYPE [FLAGS] [-- FLAGS OF lidit_jax.main]
#
# commands
#   create    requests the slices                       wait      waits until they are ready
#   install   installs this checkout (or --git=URL [--ref=REF]) on every worker
#   run       starts training, detached, on all workers:  run ... -- --config=configs/10b.py --workdir=gs://BUCKET/10b
#   keep      all of the above, as far as still needed, and again after every preemption until training is finished
#   logs      follows a worker's log                    status    shows the state of the slices and every worker's run
#   stop      sends SIGTERM: the run saves the step and exits; --kill if it hangs
#   delete    releases the slices
#
# flags
#   --name --zone --type    default to LIDIT_NAME, LIDIT_ZONE, LIDIT_TYPE. TYPE is gcloud's accelerator type: 256 chips
#                           are v4-512, v5p-512 (which count cores, two a chip), v5litepod-256 and v6e-256
#   --project               defaults to LIDIT_PROJECT, then to gcloud's project
#   --spot                  slices that may be preempted
#   --slices=N              defaults to LIDIT_SLICES; adds --config.mesh.data=N to main's flags unless they set it
#   --version=VERSION       image of the TPU VM (default: the one of the TPU's generation)
#   --git=URL --ref=REF     installs from a git repository, not from this checkout
#   --env=NAME=VALUE        environment variable of the run, e.g. HF_TOKEN or more LIBTPU_INIT_ARGS; repeatable
#   --worker=W --slice=S --lines=N   for logs: numbers or all (default: 0, 0 and 100)
#   --poll=SECONDS          for wait and keep: seconds between two checks (default: 30)
#   --failures=N            for keep: give up after N failures in a row, preemptions not counted (default: 5)
#   --delete_when_done      for keep: release the slices when training is finished
#   --hosts=N               workers in all, if the number derived from TYPE is wrong
#   --create_flag=FLAG --ssh_flag=FLAG   flag for gcloud: --create_flag=--reserved, --ssh_flag=--tunnel-through-iap
#   --dry_run               prints the commands, ready to be pasted, without running any
#
# keep can be stopped (Ctrl-C) and started again at any time: the run continues without it. It packs the checkout when
# it starts. With --git, give a --ref too, or a preempted run may resume with newer code than it started with.
# gcloud reaches several workers at once only with its key in the agent: ssh-add ~/.ssh/google_compute_engine
# Checked with shellcheck, with dry runs and with a fake gcloud (tests/test_launch.py); never run against TPUs.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
exec 3>&1 # dry runs print here, also from inside $(...)
REMOTE=lidit/code/launch/worker.sh

say() { echo "$(date +%H:%M:%S) $*" >&2; }

mistake() {
  echo "error: $*" >&2
  exit 2
}

broken() {
  echo "error: $*" >&2
  exit 1
}

name=${LIDIT_NAME:-} zone=${LIDIT_ZONE:-} project=${LIDIT_PROJECT:-} type=${LIDIT_TYPE:-}
slices=${LIDIT_SLICES:-1} spot='' version='' hosts='' git='' ref=''
worker=0 slice=0 lines=100 poll=30 failures=5 delete_when_done='' kill='' dry_run=''
generation='' archive='' answers=''
environment=() create_flags=() ssh_flags=() main_flags=()

# -------------------------------------------------------------------------------------------------------- arguments

parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      --name=* | --zone=* | --project=* | --type=* | --slices=* | --version=* | --git=* | --ref=* | --worker=* | \
        --slice=* | --lines=* | --poll=* | --failures=* | --hosts=*)
        local flag=${1%%=*}
        printf -v "${flag#--}" %s "${1#*=}"
        ;;
      --spot | --delete_when_done | --kill | --dry_run)
        printf -v "${1#--}" %s yes
        ;;
      --env=*=*) environment+=("${1#--env=}") ;;
      --create_flag=*) create_flags+=("${1#*=}") ;;
      --ssh_flag=*) ssh_flags+=("${1#*=}") ;;
      --)
        shift
        main_flags=("$@")
        return
        ;;
      --config* | --workdir*) mistake "$1: the flags of lidit_jax.main come after --" ;;
      *) mistake "unknown argument '$1': see $0 --help" ;;
    esac
    shift
  done
}

number() { # FLAG VALUE
  [[ $2 =~ ^[1-9][0-9]*$ ]] || mistake "--$1=$2 must be a positive number"
}

check() {
  [ -n "$name" ] || mistake "--name is required"
  [ -n "$zone" ] || mistake "--zone is required"
  [[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || mistake "--name=$name: use lower-case letters, digits and dashes only"
  number slices "$slices"
  number lines "$lines"
  number failures "$failures"
  [ -z "$hosts" ] || number hosts "$hosts"
  [[ $poll =~ ^[0-9]*\.?[0-9]+$ ]] || mistake "--poll=$poll must be a number of seconds"
  [[ $worker =~ ^(all|[0-9,-]+)$ ]] || mistake "--worker=$worker: give all, or numbers such as 3 or 0,4-7"
  [[ $slice =~ ^(all|[0-9,-]+)$ ]] || mistake "--slice=$slice: give all, or numbers such as 1 or 0,2-3"
  [ -z "$ref" ] || [ -n "$git" ] || mistake "--ref goes with --git=URL"
  local pair
  for pair in ${environment[@]+"${environment[@]}"}; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || mistake "--env=$pair: give NAME=VALUE"
  done
}

# Derives from the type: the generation (a file of env/), the version of the image, and the number of workers.
check_type() {
  [ -n "$type" ] || mistake "--type is required: for example v5p-512, v5litepod-256, v4-512 or v6e-256"
  [[ $type =~ ^(v4|v5p|v5litepod|v6e)-([1-9][0-9]*)$ ]] ||
    mistake "--type=$type is unknown: give v4-N, v5p-N (N cores, two a chip), v5litepod-N or v6e-N (N chips)"
  local chips=${BASH_REMATCH[2]} image
  case ${BASH_REMATCH[1]} in
    v4) generation=v4 image=tpu-ubuntu2204-base ;;
    v5p) generation=v5p image=v2-alpha-tpuv5 ;;
    v5litepod) generation=v5e image=v2-alpha-tpuv5-lite ;;
    v6e) generation=v6e image=v2-alpha-tpuv6e ;;
  esac
  version=${version:-$image}
  if [ "$generation" = v4 ] || [ "$generation" = v5p ]; then
    [ $((chips % 8)) = 0 ] || mistake "--type=$type: slices have full hosts of 8 cores: $generation-8, -16 ..."
    chips=$((chips / 2))
  fi
  local workers=$((chips / 4))
  if [ "$chips" -le 8 ] && [ "$generation" != v4 ] && [ "$generation" != v5p ]; then
    workers=1 # the smallest slices of v5e and v6e are one host of 1, 4 or 8 chips; larger ones have hosts of 4
  elif [ $((chips % 4)) != 0 ]; then
    mistake "--type=$type: slices have full hosts of 4 chips"
  fi
  hosts=${hosts:-$((workers * slices))}
}

check_main_flags() {
  local flag config='' workdir='' data=''
  for flag in ${main_flags[@]+"${main_flags[@]}"}; do
    case $flag in
      --config=*) config=${flag#*=} ;;
      --workdir=*) workdir=${flag#*=} ;;
      --config.mesh.data=*) data=${flag#*=} ;;
    esac
  done
  [ -n "$config" ] || mistake "give a config after --, as: -- --config=configs/10b.py --workdir=gs://BUCKET/10b"
  [[ $workdir == gs://* || $workdir == /* ]] ||
    mistake "give --workdir=gs://... after --: storage that all workers share and that survives a preemption"
  if [ "$slices" -gt 1 ] && [ -z "$data" ]; then
    say "$slices slices: adding --config.mesh.data=$slices, so that only gradients cross the data centre's network"
    main_flags+=("--config.mesh.data=$slices")
  fi
}

# ---------------------------------------------------------------------------------------------------------- gcloud

call() {
  if [ -n "$dry_run" ]; then
    local line
    line=$(printf '%q ' "$@")
    echo "${line% }" >&3
  else
    "$@" 3>&-
  fi
}

queued() { # VERB NAME ARGUMENTS...
  local verb=$1 what=$2
  shift 2
  call gcloud compute tpus queued-resources "$verb" "$what" --zone="$zone" ${project:+"--project=$project"} "$@"
}

on_workers() { # NODES WORKERS COMMAND
  queued ssh "$name" --node="$1" --worker="$2" ${ssh_flags[@]+"${ssh_flags[@]}"} --command="$3"
}

# Command for a worker, which also answers if nothing is installed on it yet.
asking() { echo "if [ -f $REMOTE ]; then bash $REMOTE $*; else echo \"worker \$(hostname) none\"; fi"; }

count() { grep -cE "^worker [^ ]+ ($1)\$" <<<"$answers" || true; } # prints the number of answers that match PATTERN

# Runs a command on all workers, each of which must answer: gcloud skips unreachable slices and still exits with 0.
everywhere() { # ANSWER COMMAND
  answers=$(on_workers all all "$2" | tee >(cat >&2)) || return 1
  [ -z "$dry_run" ] || return 0
  local came
  came=$(count "$1")
  [ "$came" = "$hosts" ] || {
    say "$came of $hosts workers answered '$1' (if $hosts is wrong, give --hosts=N)"
    return 1
  }
}

state_of() { # prints gcloud's state of the slices, NONE if there are none, or UNKNOWN
  local found
  if found=$(queued describe "$name" --format='value(state.state)' 2>"$scratch/errors"); then
    echo "${found:-UNKNOWN}"
  elif grep -qiE 'not_found|not found' "$scratch/errors"; then
    echo NONE
  else
    cat "$scratch/errors" >&2
    echo UNKNOWN
  fi
}

# Succeeds if a slice is lost although the request is still ACTIVE.
lost_slice() {
  local number node found
  for ((number = 0; number < slices; number++)); do
    node=$name
    [ "$slices" = 1 ] || node=$name-$number
    found=$(call gcloud compute tpus tpu-vm describe "$node" --zone="$zone" ${project:+"--project=$project"} \
      --format='value(state)') || return 1
    case $found in PREEMPTED | TERMINATED) return 0 ;; esac
  done
  return 1
}

# -------------------------------------------------------------------------------------------------------- commands

create() {
  local nodes=(--node-id="$name")
  [ "$slices" = 1 ] || nodes=(--node-count="$slices" --node-prefix="$name") # tells the VMs about the other slices
  queued create "$name" --accelerator-type="$type" --runtime-version="$version" "${nodes[@]}" ${spot:+--spot} \
    ${create_flags[@]+"${create_flags[@]}"}
}

await() {
  local state before=''
  while :; do
    state=$(state_of)
    [ -z "$dry_run" ] || return 0
    [ "$state" = "$before" ] || say "$name is $state"
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      NONE) mistake "there is no queued resource $name in $zone: create it first" ;;
      UNKNOWN) broken "gcloud does not report the state of $name" ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING) broken "$name is $state: delete it and create it again" ;;
    esac
    sleep "$poll"
  done
}

pack() { # FILE NAME: packs the files of this checkout that a run needs
  archive=${TMPDIR:-/tmp}/$1
  call tar -czf "$archive" -C "$root" --exclude=__pycache__ lidit_jax configs launch setup.py pyproject.toml README.md LICENSE
}

install() {
  local fetch
  if [ -n "$git" ]; then
    fetch="git clone --quiet $(printf %q "$git") lidit/code"
    [ -z "$ref" ] || fetch="$fetch && git -C lidit/code checkout --quiet $(printf %q "$ref")"
  else
    [ -n "$archive" ] || pack "lidit-$name.tar.gz" || return 1
    queued scp "$archive" --worker=all --node=all ${ssh_flags[@]+"${ssh_flags[@]}"} "$name:lidit.tar.gz" || return 1
    fetch="mkdir -p lidit/code && tar -xzf lidit.tar.gz -C lidit/code"
  fi
  everywhere installed "mkdir -p lidit && flock -n lidit/lock rm -rf lidit/code && $fetch && bash $REMOTE install"
}

run() {
  local command='' pair flag
  for pair in ${environment[@]+"${environment[@]}"}; do
    command+="${pair%%=*}=$(printf %q "${pair#*=}") "
  done
  [ "$slices" = 1 ] || command+="LIDIT_SLICES=$slices "
  command+="bash $REMOTE start $generation"
  for flag in "${main_flags[@]}"; do
    command+=" $(printf %q "$flag")"
  done
  everywhere started "$command"
}

ask() { # asks the workers for their state; fills `answers`
  answers=$(on_workers all all "$(asking status)")
}

idle() { # exits if a run is alive: a second one would compete for the TPU
  ask || broken "not all workers of $name can be reached"
  [ "$(count running)" = 0 ] || mistake "a run is active: follow it with logs, or stop it first"
}

stop() {
  local reached=yes
  answers=$(on_workers all all "$(asking stop ${kill:+--kill})") || reached=''
  [ -z "$dry_run" ] || return 0
  echo "$answers"
  [ -n "$reached" ] || broken "not all workers of $name can be reached"
  [ "$(count running)" = 0 ] || broken "still running on $(count running) workers: look at logs, or stop --kill"
}

logs() {
  local each=''
  [[ $worker$slice =~ ^[0-9]+$ ]] || each=' each'
  on_workers "$slice" "$worker" "bash $REMOTE log $lines$each"
}

status() {
  local state reached=yes
  state=$(state_of)
  if [ -n "$dry_run" ]; then
    ask
    return
  fi
  echo "$name $state"
  [ "$state" = ACTIVE ] || return 0
  ask || reached=''
  echo "$answers"
  [ -n "$reached" ] || broken "not all workers of $name can be reached"
}

delete() { queued delete "$name" --force --quiet; }

# ------------------------------------------------------------------------------------------------------------ keep

failed=0  # failures in a row, preemptions not counted
started=0 # when the run was last started, in seconds since the start of this script
ours=''   # yes once the run was seen alive: the exit code of an earlier run must not prevent starting this one

give_up_after() { # WHAT
  failed=$((failed + 1))
  [ "$failed" -lt "$failures" ] || broken "$1, $failed times in a row: see logs and status"
  say "$1 (failure $failed of $failures)"
}

keep() {
  [ -z "$dry_run" ] || echo "# the steps that are still needed"
  # Packed now: after a preemption the run must resume with the code that it started with.
  [ -n "$git" ] || pack "lidit-$name-keep.tar.gz" || broken "this checkout could not be packed"
  if [ -n "$dry_run" ]; then
    create && await && install && run
    echo "# every $poll seconds, and run again if it ended unfinished"
    status
    echo "# if the slices were preempted, and then everything again"
    delete
    return
  fi
  local state before=''
  while :; do
    state=$(state_of)
    [ "$state" = "$before" ] || say "$name is $state"
    before=$state
    case $state in
      ACTIVE) check_run ;;
      NONE) create || give_up_after "$name could not be created" ;;
      SUSPENDED)
        say "$name was preempted: creating it again"
        delete || true
        ;;
      FAILED)
        queued describe "$name" --format='yaml(state)' >&2 || true # prints the reason
        give_up_after "the request for $name failed"
        delete || true
        ;;
    esac
    sleep "$poll"
  done
}

# After a run has ended: exits, or returns if the answers say that it should be restarted.
exit_if_done() {
  local finished
  if [ "$(count stopped)" -gt 0 ]; then
    say "the run was stopped by the user: exiting, $name is kept"
    exit 0
  fi
  [ "$(count 'exited 2')" = 0 ] || mistake "the run ended with a mistake in its command (see logs); $name is kept"
  finished=$(count 'exited 0')
  if [ "$finished" = "$hosts" ]; then
    say "training is finished"
    if [ -n "$delete_when_done" ]; then delete; else say "$name is kept: run $0 delete"; fi
    exit 0
  fi
  # Fresh hosts, and runs stopped by SIGTERM or by a reboot, do not count as failures.
  if [ "$(count 'none|installed|lost|exited 143')" -lt "$((hosts - finished))" ]; then
    [ $((SECONDS - started)) -lt 3600 ] || failed=0
    give_up_after "the run failed"
  fi
}

# Checks a run on slices that are ready, and starts it if necessary.
check_run() {
  if ! ask || [ "$(count '.*')" -lt "$hosts" ]; then
    say "not all of the $hosts workers answer"
    if lost_slice; then
      say "a slice of $name was preempted: creating all slices again"
      delete || true
    fi
    return
  fi
  if [ "$(count running)" -gt 0 ]; then
    ours=yes
    return
  fi
  [ -z "$ours" ] || exit_if_done
  started=$SECONDS ours=yes
  if [ "$(count none)" -gt 0 ]; then
    say "installing"
    install || {
      give_up_after "installing failed"
      return
    }
  fi
  say "starting the run"
  run || say "not all workers started"
}

# ------------------------------------------------------------------------------------------------------------ main

command=${1:-}
case $command in
  create | wait | install | run | keep | logs | status | stop | delete) shift ;;
  -h | --help | help)
    sed -n '2,/^set -euo/{/^set -euo/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  *) mistake "give a command: create, wait, install, run, keep, logs, status, stop or delete (see $0 --help)" ;;
esac
parse "$@"
check
case $command in create | install | run | keep) check_type ;; esac
case $command in
  run | keep) check_main_flags ;;
  *) [ ${#main_flags[@]} = 0 ] || mistake "$command takes no flags of main" ;;
esac
[ -n "$dry_run" ] || command -v gcloud >/dev/null || mistake "gcloud is not installed: https://cloud.google.com/sdk"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

case $command in
  wait) await ;;
  install)
    idle
    install || broken "not installed on all workers"
    ;;
  run)
    idle
    [ "$(count none)" = 0 ] || mistake "nothing is installed on $(count none) workers: install first"
    run || broken "not started on all workers: stop, then run again"
    ;;
  keep) keep </dev/null ;; # without a terminal to ask, ssh would stop a keep in the background
  *) "$command" ;;
esac
