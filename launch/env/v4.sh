# shellcheck shell=bash
# TPU v4; sourced by launch/run.sh. The flag is one of MaxText's public v4 configurations. libtpu 0.0.42 has it.

# The weights are sharded over `fsdp` and gathered block by block. Split into a start and an end, the all-gather of the
# next block's weights overlaps with the computation of this one. The further fusions in the files of newer generations
# are in no public v4 configuration, so they are left out.
flags="--xla_enable_async_all_gather=true"

# The user's own flags come last, so they win.
export LIBTPU_INIT_ARGS="$flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
unset flags
