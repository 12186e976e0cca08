# shellcheck shell=bash
# TPU v4; sourced by launch/run.sh. The flag is one of MaxText's public v4 configurations. libtpu 0.0.42 has it.

# The weights are cut over `fsdp` and gathered block by block: in two parts, a start and an end, so that the next
# block's weights travel while this one computes. The further fusions of the newer generations' files are in no public
# v4 configuration, so they are left alone.
flags="--xla_enable_async_all_gather=true"

# What the user has set comes last, and wins.
export LIBTPU_INIT_ARGS="$flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
unset flags
