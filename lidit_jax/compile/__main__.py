"""Compiles the train step for a TPU slice without having one.

    python -m lidit_jax.compile --config=configs/10b.py --topology=v5p:8x8x4

Compiles the step for the square bucket and for the most extreme one, and reports the one that needs more memory;
`--bucket=640x384` compiles that one alone, `--prompt_length=64` the program for short prompts (`text.num_lengths`).
`--program=sample` compiles the sampling of images instead; `--weights` lists the sharding of each weight,
`--traffic=20` the operations that move the most bytes, `--collectives=20` those that communicate, with the time that a
chip waits for them. `--search=all` compiles the step with every rematerialisation policy and prints a table. Reports
the memory that a chip needs, whether it fits, what each part of the model costs, and a lower bound on the time of a
step. Needs no TPU, but the TPU compiler: `pip install -e ".[tpu]"`. Exit code 1 if the program does not fit.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.errors import UserError
from lidit_jax.files import check_writable, write_json

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from lidit_jax.compile.report import Report

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "TPU generation and slice shape: v5p:8x8x4, v5e:16x16, v4:2x2x2 …")
_SLICES = flags.DEFINE_integer("slices", 1, "number of such slices", lower_bound=1)
_PREFIX = flags.DEFINE_integer(
    "prefix_tokens", 64, "tokens of system prompt and instruction, for encoders without weights", lower_bound=0
)
_PROGRAM = flags.DEFINE_enum(
    "program",
    "train",
    ["train", "sample", "align", "tune"],
    "compile the train step, or the sampling of images; of a config with a `llava` section: one of its stages",
)
_BUCKET = flags.DEFINE_string(
    "bucket",
    "",
    "bucket to compile, as 640x384 (height, width); default: the square one and, for training, the most extreme one",
)
_PROMPT_LENGTH = flags.DEFINE_integer(
    "prompt_length", 0, "tokens that the prompts are padded to; 0: text.max_length, the most", lower_bound=0
)
_WEIGHTS = flags.DEFINE_bool("weights", False, "list the sharding of each weight, and compile nothing")
_TRAFFIC = flags.DEFINE_integer(
    "traffic", 0, "number of operations to list, those with the most HBM traffic first", lower_bound=0
)
_COLLECTIVES = flags.DEFINE_integer(
    "collectives",
    0,
    "collective operations to list, those that a chip waits for longest first",
    lower_bound=0,
)
_SEARCH = flags.DEFINE_list(
    "search", None, "rematerialisation policies (model.remat) to compile the train step with and compare, or all"
)
_JSON = flags.DEFINE_string("json", None, "JSON file to write all numbers to")


def main() -> None:
    import jax

    from lidit_jax.compile.compile_step import compile_step, where_weights_go

    jax.config.update("jax_platforms", "cpu")  # otherwise libtpu tries to start a TPU
    if _JSON.value and not epath.Path(_JSON.value).parent.is_dir():
        raise UserError(f"--json={_JSON.value}: its folder does not exist, create it first")
    if _JSON.value:
        check_writable(epath.Path(_JSON.value).parent, f"--json={_JSON.value}")
    config, topology = cli.read_config(_CONFIG), cli.require(_TOPOLOGY.name)
    if "llava" in config:
        _report(_compile_llava(config, topology))
        return
    if _PROGRAM.value in ("align", "tune"):
        raise UserError(f"--program={_PROGRAM.value}: the config has no section llava: use train or sample")
    if _WEIGHTS.value:
        print("\n".join(where_weights_go(config, topology, _SLICES.value)))
        return
    options = {"num_slices": _SLICES.value, "prefix_tokens": _PREFIX.value, "program": _PROGRAM.value}
    options |= {"bucket": _BUCKET.value, "prompt_length": _PROMPT_LENGTH.value}
    if _SEARCH.value:
        _search(config, topology, options)
        return
    _report(compile_step(config, topology, **options))


def _compile_llava(config: "ConfigDict", topology: str) -> "Report":
    from lidit_jax.compile.compile_llava import compile_llava

    given = {"--weights": _WEIGHTS, "--search": _SEARCH, "--bucket": _BUCKET, "--prompt_length": _PROMPT_LENGTH}
    for name, flag in given.items():
        if flag.value:
            raise UserError(f"{name} is for a LI-DiT: leave it out")
    if _PROGRAM.value == "sample":
        raise UserError("--program=sample: a multi-modal LLM samples no images: use align or tune")
    return compile_llava(config, topology, _SLICES.value, "align" if _PROGRAM.value == "align" else "tune")


def _report(report: "Report") -> None:
    """Prints a report, and exits with 1 if the program does not fit."""
    print("\n".join(report.lines()))
    if _TRAFFIC.value:
        print("\n".join(["", *report.traffic(_TRAFFIC.value)]))
    if _COLLECTIVES.value:
        print("\n".join(["", *report.collectives(_COLLECTIVES.value)]))
    if _JSON.value:
        write_json(epath.Path(_JSON.value), report.to_json())
    if not report.fits:
        sys.exit(1)


def _search(config: "ConfigDict", topology: str, options: Mapping[str, Any]) -> None:
    """Compiles with several policies, prints a row for each as soon as it is there, and names the best."""
    from lidit_jax.compile.compile_step import search
    from lidit_jax.compile.report import SearchTable

    if options["program"] != "train":
        raise UserError(f"--search compares train steps: leave out --program={options['program']}")
    table = SearchTable()
    print(table.HEADER, flush=True)
    for policy, report in search(config, topology, _SEARCH.value, **options):
        print(table.add(policy, report), flush=True)
        if _JSON.value:
            write_json(epath.Path(_JSON.value), {name: one.to_json() for name, one in table.reports.items()})
    if (best := table.best()) is None:
        print("none fits: use more chips, or --config.train.accumulate=2 (times what it is)")
        sys.exit(1)
    print(f"the highest bound has --config.model.remat={best}")


if __name__ == "__main__":
    cli.run(main)
