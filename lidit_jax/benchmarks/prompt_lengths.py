"""Computes what static prompt lengths save: `python -m lidit_jax.benchmarks.prompt_lengths --config=configs/1b.py`.

Counts the model FLOPs of a training step (VAE's encoder, LLMs, LI-DiT's two passes) with every prompt padded to
`text.max_length`, and with 1, 2, … lengths that `text.num_lengths` would choose for prompts whose token counts are
lognormal: a mixture, in equal shares, of captions with the given medians. Nothing is timed. For your own data, the log
of a run states the lengths and the mean padding.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

from lidit_jax import cli
from lidit_jax.benchmarks import shared_flags
from lidit_jax.errors import UserError

if TYPE_CHECKING:
    from lidit_jax.experiment import Experiment

_CONFIG = cli.define_config()
_MEDIANS = flags.DEFINE_list(
    "medians", ["20", "80"], "median tokens of each kind of caption; LAION's have about 20, CogVLM's about 80"
)
_SIGMA = flags.DEFINE_float("sigma", 0.5, "standard deviation of the logarithm of the tokens", lower_bound=0.01)
_PREFIX = shared_flags.define_tokens("prefix", 64, "tokens of system prompt and instruction", lowest=0)
_MOST = flags.DEFINE_integer("most", 6, "largest number of lengths", lower_bound=1, upper_bound=16)
_PRECOMPUTED = flags.DEFINE_bool("precomputed", False, "latents and prompt features are precomputed")


def main() -> None:
    import numpy as np

    from lidit_jax.data.prompt_lengths import choose_lengths

    experiment = _experiment()
    max_length = experiment.text.max_length
    counts = _distribution(_medians(), _SIGMA.value, max_length)
    step_flops = _step_flops(experiment)

    def mean_flops(lengths: tuple[int, ...]) -> float:
        shares = np.bincount(np.searchsorted(lengths, np.arange(1, max_length + 1)), counts[1:], len(lengths))
        return sum(share * step_flops(length) for share, length in zip(shares / counts.sum(), lengths, strict=True))

    full = step_flops(max_length)
    print(f"{full / 1e15:.2f} PFLOP a step with all prompts padded to {max_length} tokens; with the best lengths:")
    print(f"{'num_lengths':>11}  {'PFLOP':>8}  {'share':>6}  lengths")
    for number in range(1, _MOST.value + 1):
        lengths = choose_lengths(counts, number)
        mean = mean_flops(lengths)
        print(f"{number:11}  {mean / 1e15:8.2f}  {mean / full:6.1%}  {', '.join(map(str, lengths))}")


def _experiment() -> "Experiment":
    from lidit_jax.experiment import abstract_experiment

    return abstract_experiment(cli.read_config(_CONFIG))


def _step_flops(experiment: "Experiment") -> Callable[[int], float]:
    """Returns a function from the length of the prompts to the model FLOPs of a step on square images."""
    import jax

    from lidit_jax.compile.compile_step import abstract_batch, abstract_frozen
    from lidit_jax.data.assembler import BatchShape
    from lidit_jax.data.buckets import Bucket
    from lidit_jax.parallel.mesh import make_mesh
    from lidit_jax.parallel.rules import ShardingRules
    from lidit_jax.stages.lidit import lidit_task
    from lidit_jax.text.encoders import PrecomputedEncoder

    mesh, rules = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}), ShardingRules()
    encoders, frozen = abstract_frozen(experiment, mesh, rules, _PREFIX.value)
    vae, side = experiment.autoencoder(experiment.vae_config), experiment.data.resolution
    if _PRECOMPUTED.value:
        prefixes = {name: encoder.prefix_features for name, encoder in frozen["encoders"].items()}
        frozen = frozen | {"encoders": prefixes}
        stored = {name: PrecomputedEncoder(encoder.hidden_size, 0) for name, encoder in encoders.items()}
    task = lidit_task(experiment.model, experiment.schedule, stored if _PRECOMPUTED.value else encoders, vae, frozen)
    cells = side // vae.config.downsampling_factor

    def step_flops(length: int) -> float:
        batch = abstract_batch(experiment, encoders, mesh, rules, BatchShape(Bucket(side, side), length))
        if _PRECOMPUTED.value:
            rows = batch.pop("image").shape[0]
            batch["moments"] = jax.ShapeDtypeStruct((rows, cells, cells, 2 * vae.config.latent_channels), "float32")
        assert task.flops
        return task.flops(batch)

    return step_flops


def _medians() -> list[float]:
    try:
        medians = [float(text) for text in _MEDIANS.value]
    except ValueError:
        medians = []
    if not medians or not all(1 <= median <= 65_536 for median in medians):
        given = ",".join(_MEDIANS.value)
        raise UserError(f"--medians={given}: give numbers of tokens from 1 to 65536, as in --medians=20,80")
    return medians


def _distribution(medians: list[float], sigma: float, max_length: int):
    """Returns the share of prompts of each number of tokens, float64 [max_length + 1]; longer ones are truncated."""
    import numpy as np
    from scipy import special

    bounds = np.log(np.arange(1, max_length) + 0.5)  # between a number of tokens and the next
    cumulative = np.mean([special.ndtr((bounds - np.log(median)) / sigma) for median in medians], axis=0)
    return np.diff(np.concatenate([[0.0, 0.0], cumulative, [1.0]]))


if __name__ == "__main__":
    cli.run(main)
