# shellcheck shell=bash
# TPU v5e; sourced by launch/run.sh. The flags are those of MaxText's public v5e configurations. libtpu 0.0.42 has them.
# 10b.py leaves little of a chip's 16 GB free; whether a step still fits with them is said without a TPU by
#   bash -c '. launch/env/v5e.sh && python -m lidit_jax.compile --config=configs/10b.py --topology=v5e:16x16'

# The weights are cut over `fsdp` and gathered block by block: in two parts, a start and an end, so that the next
# block's weights travel while this one computes.
flags="--xla_enable_async_all_gather=true"
# Between the two, the gather goes on inside the computations that are scheduled there, through several of them; it
# would wait for a gap otherwise.
flags+=" --xla_tpu_enable_async_collective_fusion=true"
flags+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
flags+=" --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
# The same core computes and moves.
flags+=" --xla_tpu_overlap_compute_collective_tc=true"

# Several slices: the gradients are summed over the data centre's network, slow beside what joins the chips of a slice.
# The sums of one layer run beside the backward pass of the next, also where layers' gradients differ in size. It may
# take memory, so only where there is something to sum.
if [ "${LIDIT_SLICES:-${MEGASCALE_NUM_SLICES:-1}}" -gt 1 ]; then
  flags+=" --xla_tpu_enable_data_parallel_all_reduce_opt=true"
  flags+=" --xla_tpu_data_parallel_opt_different_sized_ops=true"
fi

# What the user has set comes last, and wins.
export LIBTPU_INIT_ARGS="$flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
unset flags
