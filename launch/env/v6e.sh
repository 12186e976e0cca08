# shellcheck shell=bash
# TPU v6e; sourced by launch/run.sh. The flags are those of MaxText's public v6e configurations of dense models. libtpu
# 0.0.42 has them.

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
# How much of the chip's 128 MiB of on-chip memory one operation may use, in KiB; the rest is for fetching what the next
# ones need. With more, matrix products work on larger tiles. MaxText's value for dense models.
flags+=" --xla_tpu_scoped_vmem_limit_kib=98304"
# Gradients of weights that are cut: an all-reduce of which each chip keeps its part becomes a reduce-scatter, with half
# the traffic.
flags+=" --xla_tpu_use_minor_sharding_for_major_trivial_input=true"
flags+=" --xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1"

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
