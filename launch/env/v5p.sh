# shellcheck shell=bash
# TPU v5p; sourced by launch/run.sh. The flags are among those of MaxText's public v5p configurations, without those
# that do not apply to this model (all-gathers between slices). libtpu 0.0.42 has them.

# The weights are sharded over `fsdp` and gathered block by block. Split into a start and an end, the all-gather of the
# next block's weights overlaps with the computation of this one.
flags="--xla_enable_async_all_gather=true"
# Between start and end, the all-gather continues inside the computations that are scheduled there, across several of
# them; otherwise it would wait for a gap.
flags+=" --xla_tpu_enable_async_collective_fusion=true"
flags+=" --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"
flags+=" --xla_tpu_enable_async_collective_fusion_multiple_steps=true"
# One core computes and communicates at the same time.
flags+=" --xla_tpu_overlap_compute_collective_tc=true"
# A chip's two cores work as one (megacore); its own fusion would take the all-gathers away from the fusions above.
flags+=" --xla_tpu_megacore_fusion_allow_ags=false"

# Several slices: the gradients are reduced over the data centre's network, which is slow compared with the links inside
# a slice. The reduction of one layer overlaps with the backward pass of the next, also if the layers' gradients differ
# in size. This may take memory, so it is on only if there is something to reduce.
if [ "${LIDIT_SLICES:-${MEGASCALE_NUM_SLICES:-1}}" -gt 1 ]; then
  flags+=" --xla_tpu_enable_data_parallel_all_reduce_opt=true"
  flags+=" --xla_tpu_data_parallel_opt_different_sized_ops=true"
fi

# The user's own flags come last, so they win.
export LIBTPU_INIT_ARGS="$flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
unset flags
