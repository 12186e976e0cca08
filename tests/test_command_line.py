"""A command line that forgives: every field can be set, mistakes name what was meant, and outputs are checked first."""

import contextlib
import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import ROOT, load_config
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

import lidit_jax
from lidit_jax import cli
from lidit_jax.ablate import report
from lidit_jax.config import claim_workdir, find_config, flatten, sibling_config
from lidit_jax.config import load_config as load_named_config
from lidit_jax.config_fields import apply_overrides, find_fields, with_defaults
from lidit_jax.console import COMMANDS
from lidit_jax.data.precomputed import DTYPES
from lidit_jax.data.shared_array import SharedArray
from lidit_jax.errors import UserError, describe_system_error
from lidit_jax.evaluate import generate as evaluate
from lidit_jax.evaluate.benchmarks import BENCHMARKS
from lidit_jax.export.write import DTYPES as EXPORT_DTYPES
from lidit_jax.export.write import TEXT_ENCODERS, export
from lidit_jax.export.write import Request as ExportRequest
from lidit_jax.files import check_writable, is_unused, new_file, write_json
from lidit_jax.images import save_png
from lidit_jax.preview.contact_sheet import draw_contact_sheet
from lidit_jax.print_config import format_config, marked_keys
from lidit_jax.sample.generate import Request, earlier_images, sample_to_folder

HEAVY = ("jax", "tensorflow", "flax", "transformers", "torch", "grain")


def python(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | kwargs.pop("env", {})
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **kwargs)


# --- fields --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.keep", "1", 1),
        ("train.accumulate", "2", 2),
        ("train.steps", "1e5", 100_000),
        ("train.learning_rate", "1", 1.0),
        ("train.compile_ahead", "no", False),
        ("data.min_aesthetic", "5", 5.0),
        ("data.min_aesthetic", "None", None),
        ("data.captions.txt", "1", 1.0),
        ("data.captions", "{'txt': 1.0}", {"txt": 1.0}),
        ("data.object_shares", "1,2,1", (1.0, 2.0, 1.0)),
        ("data.mixture.emoji.path", "shards", "shards"),
        ("vae.perceptual.weights", "lpips.safetensors", "lpips.safetensors"),
        ("vae.model.block_out_channels", "32,64", (32, 64)),
        ("vae.model.sample_size", "128", 128),
        ("vae.evaluate.sheet", "4", 4),
        ("encoders.qwen.train.keep", "3", 3),
        ("encoders.gemma.weights", "google/gemma-2-2b", "google/gemma-2-2b"),
        ("diffusion.logit_std", "2", 2.0),
        ("evaluate.six_objects", "8", 8),
        ("start_from", "runs/a", "runs/a"),
        ("mesh.fsdp", "-1", -1),
        ("seed", str(2**63 - 1), 2**63 - 1),
    ],
)
def test_every_field_can_be_set_and_has_its_type(key, text, value):
    config = load_config("shapes").lock()
    apply_overrides(config, {key: text})
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    found = config[name].to_dict() if isinstance(config[name], ConfigDict) else config[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("train.lr", "train.lr is unknown; did you mean 'learning_rate'?"),
        ("train.bs", "did you mean 'batch_size'?"),
        ("lr", "did you mean 'train.learning_rate'"),
        ("batch_size", "did you mean 'train.batch_size'"),
        ("model.learning_rate", "did you mean 'train.learning_rate'"),
        ("modle.depth", "modle is unknown; did you mean 'model'?"),
        ("encoders.qwen.trian.steps", "encoders.qwen.trian is unknown; did you mean 'train'?"),
        ("vae.perceptual.wieght", "did you mean 'weight'?"),
        ("data.mixture.a.pat", "did you mean 'path'?"),
        ("mesh.x", "known are data, fsdp, tensor"),
        ("diffusion.beta_start", "known are name, shift"),
        ("train.steps.x", "train.steps is not a section"),
        ("train", "must be of type dict"),
        ("diffusion", "must be of type dict"),
        ("language_models", "must be of type dict"),
        ("train.steps", "train.steps is '1.5': it must be of type int"),
        ("data.drop_aspect_over", None),
    ],
)
def test_an_unknown_key_names_the_nearest(key, says):
    config = load_config("shapes").lock()
    if says is None:
        apply_overrides(config, {key: "1.5"})
        return
    with pytest.raises(UserError, match=re.escape(says)):
        apply_overrides(config, {key: "1.5"})


@pytest.mark.parametrize(
    "text",
    ["three", "True", "1e", "e", "1e-1", "1.5e0", "1e31", "1e999999999", "-1e999999999", "1e-999999999", "9" * 5000],
)
@pytest.mark.parametrize("key", ["train.steps", "vae.model.block_out_channels", "diffusion", "vae.adversarial"])
def test_a_text_that_is_no_value_of_its_field_is_said_in_one_line(key, text):
    with pytest.raises(UserError, match=rf"^config key {key} is '[^\n]*: it must be of type [^\n]*$"):
        apply_overrides(load_config("shapes"), {key: text})


@pytest.mark.parametrize(
    ("text", "value"), [("1e3", 1000), ("-2.5E1", -25), ("1e30", 10**30), ("3.0e0", 3), ("0e5", 0)]
)
def test_whole_numbers_may_have_an_exponent(text, value):
    config = load_config("shapes")
    apply_overrides(config, {"train.steps": text})
    assert type(config.train.steps) is int and config.train.steps == value


def test_a_section_that_the_config_lacks_names_the_field_that_it_has():
    with pytest.raises(UserError, match=r"has no section 'train'; did you mean 'vae\.train\.steps'\?"):
        apply_overrides(load_config("vae"), {"train.steps": "3"})


def test_encoders_and_optional_sections_can_be_removed():
    config = load_config("shapes")
    apply_overrides(config, {"encoders.qwen": "None", "data.captions.zh": "None", "evaluate": "None"})
    assert list(config.encoders) == ["llama"] and dict(config.data.captions) == {"en": 0.6} and "evaluate" not in config
    with pytest.raises(UserError, match=r"encoders\.quen: there is nothing to remove"):
        apply_overrides(config, {"encoders.quen": "None"})


@pytest.mark.parametrize("prefix", ["data.", "data.mixture.a."])
def test_dots_in_the_name_of_a_caption_field_are_slashes(prefix):
    config = load_config("shapes")
    apply_overrides(config, {f"{prefix}captions.json.caption": "0.5"})
    section = config.data if prefix == "data." else config.data.mixture.a
    assert section.captions["json/caption"] == 0.5
    with pytest.raises(UserError, match="captions.*: write a slash for every dot in a name"):
        apply_overrides(config, {f"{prefix}captions": "{'json.caption': 1.0}"})


def test_the_name_of_the_schedule_is_set_before_its_fields_and_removes_those_it_lacks():
    config = load_config("shapes")
    assert "shift" in config.diffusion
    apply_overrides(config, {"diffusion.beta_start": "0.001", "diffusion.name": "ddpm"})
    assert config.diffusion.to_dict() == {"name": "ddpm", "beta_start": 0.001}


# --- configs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes", "emoji", "1b", "vae", "ablation"])
def test_configs_state_only_what_the_paper_states_or_the_defaults_lack(name):
    config = load_config(name, *(["table2_baseline"] if name == "ablation" else []))
    stated, paper, full = flatten(config), marked_keys(ROOT / f"configs/{name}.py"), flatten(with_defaults(config))
    # To fill in; needed by workdirs; all kinds of prompts; set by a condition.
    kept = re.compile(r"(.*\.)?(path|weights|num_images)|model\.position|evaluate\..*|encoders\.\w+\.family|text\..*")
    redundant = []
    for key in stated.keys() - paper:
        values = config.to_dict()
        *sections, field = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        del section[field]
        if flatten(with_defaults(values)).get(key, "absent") == full[key] and not kept.fullmatch(key):
            redundant.append(key)
    changed_by_rows = {"model.fusion", "model.refiner_causal", "model.refiner_gated", "diffusion.prediction"}
    assert not set(redundant) - (changed_by_rows if name == "ablation" else set())


def test_a_workdir_that_states_the_defaults_belongs_to_a_config_that_does_not(tmp_path):
    config, spelled_out = load_config("shapes"), ConfigDict(with_defaults(load_config("shapes")))
    for name, first, second in (("a", config, spelled_out), ("b", spelled_out, config)):
        workdir = epath.Path(tmp_path / name)
        workdir.mkdir()
        write_json(workdir / "config.json", first.to_dict())
        claim_workdir(workdir, second)
    config.model.depth = 5
    with pytest.raises(UserError, match=r"model\.depth was 4, now 5"):
        claim_workdir(workdir, config)
    spelled_out.train.clip_norm = 2.0
    with pytest.raises(UserError, match=r"train\.clip_norm was 1\.0, now 2\.0"):
        claim_workdir(workdir, spelled_out)


def test_configs_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes = ROOT / "configs/shapes.py"
    assert find_config("shapes") == (shapes, ()) == find_config("configs/shapes.py")
    assert find_config("scenes:128") == (ROOT / "configs/scenes.py", ("128",)) == find_config("configs/scenes.py:128")
    assert load_named_config("scenes:128").data.resolution == 128
    (tmp_path / "mine.py").write_text("")
    assert find_config("mine.py")[0] == Path("mine.py")
    for text, says in (
        ("shapse", "did you mean 'shapes'"),
        ("x/y.py", "no such config file"),
        ("x/configs/shapes.py", "no such config file; did you mean 'shapes'"),
        ("shapes.py", "no such config file; did you mean 'shapes'"),
        ("./emojis.py:3", "no such config file; did you mean 'emoji'"),
    ):
        with pytest.raises(UserError, match=says):
            find_config(text)
    with pytest.raises(UserError, match="takes no argument: leave out :3"):
        load_named_config("shapes:3")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = (", r"mine\.py, line 1: '\(' was never closed"),
        ("", "no function get_config"),
        ("def get_config():\n    return 3", "returns int: return a ConfigDict"),
        ("def get_config():\n    return {}['seed']", r"mine\.py, line 2: KeyError: 'seed'"),
    ],
)
def test_a_broken_config_file_is_one_line_with_the_place(tmp_path, source, says):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=says) as error:
        load_named_config(str(tmp_path / "mine.py"))
    assert "\n" not in str(error.value)


def test_the_documents_own_config_in_ten_lines_works(tmp_path):
    [source] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/configs.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "mine.py").write_text(source)
    assert len(source.split("def get_config")[1].strip().splitlines()) <= 10
    config = load_named_config(str(tmp_path / "mine.py"))
    apply_overrides(config, {"train.keep": "7"})
    printed = format_config(config, tmp_path / "mine.py", ["train.keep"])
    for key, value, source in (
        ("train.steps", 3000, "ours"),
        ("train.keep", 7, "command line"),
        ("vae.evaluate.num_images", 256, "ours"),
        ("train.clip_norm", 1.0, "default"),
    ):
        assert re.search(rf"^{re.escape(key)} +{value} +{source}$", printed, re.MULTILINE), key


def test_a_sibling_comes_before_this_projects_config(tmp_path):
    (tmp_path / "shapes.py").write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'seed': 5})"
    )
    assert sibling_config(str(tmp_path / "mine.py"), "shapes").to_dict() == {"seed": 5}
    assert sibling_config(str(tmp_path / "mine.py"), "vae", "folder").data.path == "folder"


# --- flags ---------------------------------------------------------------------------------------------------------


BENCHMARK_COMMANDS = [
    f"lidit_jax.benchmarks.{file.stem}"
    for file in sorted((ROOT / "lidit_jax/benchmarks").glob("*.py"))
    if "cli.run(main)" in file.read_text()
]


@pytest.mark.parametrize("module", [*(module for module, _ in COMMANDS.values()), *BENCHMARK_COMMANDS])
def test_help_has_an_example_and_exits_0_without_heavy_imports(module):
    done = python("-X", "importtime", "-m", module, "--help")
    assert done.returncode == 0
    assert f"python -m {module}" in done.stdout and "Flags:" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & set(HEAVY)


def test_output_that_nobody_reads_to_its_end_is_no_error():
    """As in `… | head -1`."""
    run = f"{sys.executable} -m lidit_jax.main --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_output_nobody_reads_ends_without_a_trace(unbuffered):
    command = "import time; from lidit_jax import cli; cli.run(lambda: [time.sleep(0.5), print('a line')])"
    run = f'{sys.executable} -c "{command}" | true; exit ${{PIPESTATUS[0]}}'
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (141, "")


def test_every_folder_of_a_command_is_a_command_of_the_console():
    folders = {f"lidit_jax.{file.parent.name}" for file in (ROOT / "lidit_jax").glob("*/__main__.py")}
    assert folders <= {module for module, _ in COMMANDS.values()}


def test_the_console_command_names_the_commands():
    call = "import sys; from lidit_jax.console import main; sys.argv = ['lidit', *{}]; main()"
    assert all(f"  {command} " in python("-c", call.format([])).stdout for command in ("train", "sample", "ablate"))
    assert python("-c", call.format(["sample", "--help"])).stdout.startswith("Samples images")
    assert python("-c", call.format(["--version"])).stdout == f"lidit {lidit_jax.__version__}\n"
    wrong = python("-c", call.format(["samle"]))
    assert (wrong.returncode, wrong.stderr) == (2, "error: lidit samle: no such command; did you mean 'sample'?\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sample", "--num-images=3"], "unknown flag --num-images; did you mean --num_images?"),
        (["sample", "--cfg=3"], "did you mean --guidance?"),
        (["sample", "--prompts=x"], "did you mean --prompts_file?"),
        (["sample", "--config.sample.steps=3"], "did you mean --steps?"),
        (["sample", "out"], "unexpected argument 'out'"),
        (["sample", "--height=tall"], "height"),
        (["main", "--config=shapse", "--workdir=x"], "there is no config 'shapse'; did you mean 'shapes'?"),
        (
            ["main", "--config=emoji", *(f"--config.data.path=a-{i:05}.tar" for i in range(10))],
            "quote it: '--config.data.path=a-{00000..00009}.tar'",
        ),
        (["main", "--config=emoji", "--config.data.path", "a-0.tar", "a-1.tar"], "if the shell expanded a pattern"),
    ],
)
def test_a_slip_is_one_line_with_a_hint(arguments, says):
    done = python("-m", f"lidit_jax.{arguments[0]}", *arguments[1:])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr


def test_a_field_given_as_a_flag_names_the_field():
    for name, field in (
        ("lr", "train.learning_rate"),
        ("batch_size", "train.batch_size"),
        ("resolution", "data.resolution"),
    ):
        assert find_fields(name, load_config("shapes"))[0] == field


def test_values_follow_keys_with_and_without_an_equals_sign():
    words = [
        "--workdir=x",
        "--config.a.b=1=2",
        "-config.c",
        "3",
        "--config.d",
        "-1",
        "--config.e",
        "--out=y",
        "--config.f",
    ]
    assert cli._take_overrides(words) == ["--workdir=x", "--out=y"]
    assert cli._overrides == {"a.b": "1=2", "c": "3", "d": "-1", "e": "true", "f": "true"}


@contextlib.contextmanager
def flags_of_weights(*words):
    """Gives the parser of `cli.define_moved_weights`, after the words are parsed."""
    with flagsaver.flagsaver():  # removes flags that are new
        moved = cli.define_moved_weights()
        flags.FLAGS(["program", *words])
        yield moved


def test_the_home_folder_is_expanded_in_paths_and_not_in_prompts(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert cli._expand_home("--out=~/x") == "--out=/home/me/x" and cli._expand_home("--out=a~") == "--out=a~"
    assert cli._expand_home("--config.data.path=~/x") == "--config.data.path=/home/me/x"
    assert cli._expand_home("--prompt=~ art") == "--prompt=~ art"
    with flags_of_weights("--encoder=llama=~/llama", "--encoder=qwen=/x", "--vae=y") as moved:
        assert moved() == {"encoders": {"llama": "/home/me/llama", "qwen": "/x"}, "vae": "y"}


def test_repeated_flags_are_an_expanded_pattern_only_if_they_look_like_one():
    cli._check_repeated(["--config.train.steps=3", "--config.train.steps=30", "--steps=1", "--steps=1"])
    for values, pattern in ((["a-1.tar", "a-2.tar"], "a-{1..2}.tar"), (["x/a.tar", "x/bc.tar"], "x/{a,bc}.tar")):
        with pytest.raises(UserError, match=re.escape(f"'--config.data.path={pattern}'")):
            cli._check_repeated([f"--config.data.path={value}" for value in values])
    with flags_of_weights():
        cli._check_repeated(["--encoder=llm1=/models/llm1", "--encoder=llm2=/models/llm2"])


def test_a_number_that_is_none_is_one_line():
    for module, flag in (("benchmarks.checkpoint", "--gb=nan"), ("export", "--max_shard_gb=inf")):
        done = python("-m", f"lidit_jax.{module}", flag)
        assert (done.returncode, done.stderr) == (2, f"error: {flag} is not a finite number: give one\n")


def test_a_signal_before_the_flags_are_parsed_is_one_line():
    program = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
# As while `python -m` imports the package.
sys.argv, sys.orig_argv = ["-m"], ["python", "-m", "{}"]
import lidit_jax
os.kill(os.getpid(), signal.{})
"""
    for name, says, status in (("SIGTERM", "SIGTERM", 143), ("SIGINT", "Ctrl-C", 130)):
        done = python("-c", program.format("lidit_jax.main", name))
        assert (done.returncode, done.stderr) == (status, f"stopped by {says} before it began\n")
    done = python("-c", program.format("another.command", "SIGTERM"))  # which imports this package
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def test_choices_in_help_texts_are_those_of_the_commands():
    def source(command):
        return (ROOT / "lidit_jax" / command / "__main__.py").read_text()

    assert f'commas: {", ".join(report.CHOICES)}"' in source("ablate")
    assert all(f'"{name}"' in source("evaluate") for name in (*BENCHMARKS, "shapes"))
    assert f"weights: {' or '.join(EXPORT_DTYPES)}" in source("export")
    assert f"train: {' or '.join(TEXT_ENCODERS)} (" in source("export")
    assert all(f'"{name}"' in source("precompute") for name in DTYPES)


# --- outputs -------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_nothing_that_makes_a_retry_fail(tmp_path, monkeypatch):
    out = epath.Path(tmp_path)

    def full(*arguments, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(type(out), "replace", full)
    with pytest.raises(OSError, match="No space") as error:
        write_json(out / "x.json", {})
    with pytest.raises(OSError, match="No space"):
        save_png(np.zeros((8, 8, 3), np.uint8), out / "x.png")
    with pytest.raises(OSError, match="No space"):
        save_png(np.zeros((8, 8, 3), np.uint8), out / "new/folder/x.png")
    assert not list(tmp_path.iterdir())
    assert describe_system_error(error.value).endswith(
        "x.json: No space left on device: free disk space, then run the same command again"
    )
    # What a killed process may leave does not count as content either.
    (tmp_path / ".plan.json.new").touch()
    assert is_unused(out) and is_unused(out / "missing")
    (tmp_path / "notes.txt").touch()
    assert not is_unused(out)


def test_outputs_are_checked_before_work_begins(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_writable(epath.Path(tmp_path / "a/b"), "--out=a/b")
    with pytest.raises(UserError, match="--out=x: .*/file is a file: name a folder"):
        check_writable(epath.Path(tmp_path / "file/b"), "--out=x")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="is not yours to write"):
        check_writable(epath.Path(tmp_path / "a"), "--out=x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_commands_check_their_output_before_anything_is_loaded(tmp_path):
    file, missing = epath.Path(tmp_path / "file"), epath.Path(tmp_path / "missing")
    file.touch()
    out = file / "x.png"
    benchmark = evaluate.Request(workdir=missing, benchmark="prompts", file=missing, out=out)
    for command in (
        lambda: evaluate.generate_benchmark(benchmark),
        lambda: export(ExportRequest(workdir=missing, out=out)),
        lambda: draw_contact_sheet(load_config("shapes"), out, 1),
        lambda: sample_to_folder(Request(workdir=missing, out=out, prompt="x")),
    ):
        with pytest.raises(UserError, match=f"--out={out}: {file} is a file: name a folder"):
            command()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 27.04G "
            "of 15.48G hbm. Exceeded hbm capacity by 11.56G.\n\nTotal hbm usage >= 27.56G:\n    reserved 530.00M",
            "Used 27.04G of 15.48G hbm",
        ),
        (
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.\nBufferAssignment OOM",
            "Out of memory while trying to allocate 17179869184 bytes",
        ),
        (
            "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 1.50G. That was not possible. "
            "There are 1.20G free.; (0x0x0_HBM0)",
            "Attempting to allocate 1.50G",
        ),
        (
            "RESOURCE_EXHAUSTED: Error loading program: Attempting to reserve 5.40G at the bottom of memory. That was "
            "not possible.",
            "Attempting to reserve 5.40G",
        ),
    ],
)
def test_a_device_without_enough_memory_is_one_line(text, says):
    found = describe_system_error(jax.errors.JaxRuntimeError(text))
    assert found.startswith(f"a device is out of memory ({says}): ") and "\n" not in found
    assert describe_system_error(jax.errors.JaxRuntimeError("INTERNAL: a bug")) is None


def test_a_missing_accelerator_is_one_line(monkeypatch):
    program = "import jax\nfrom lidit_jax import cli\ncli.run(lambda: print(jax.devices()))"
    done = python("-c", program, env={"JAX_PLATFORMS": "cuda"})
    if done.returncode:  # there is no GPU here
        assert done.returncode == 2 and "JAX_PLATFORMS='cuda' gives JAX no device" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    error = RuntimeError("Unable to initialize backend 'cuda': no devices\n(you may need to uninstall)")
    assert "\n" not in describe_system_error(error) and "no device to run on (Unable" in describe_system_error(error)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert describe_system_error(error).startswith("JAX_PLATFORMS='cuda' gives JAX no device")
    monkeypatch.delenv("JAX_PLATFORMS")
    assert describe_system_error(error).endswith(": set JAX_PLATFORMS=cpu to run without an accelerator")
    assert describe_system_error(RuntimeError("a bug")) is None
    with pytest.raises(jax.errors.JaxRuntimeError) as exhausted:
        jax.block_until_ready(jax.numpy.zeros(1 << 42))
    found = describe_system_error(exhausted.value)
    assert found.startswith("a device is out of memory (Out of memory allocating 17592186044416 bytes): use smaller")
    assert "--config.train.accumulate=2" in found and "\n" not in found
    assert describe_system_error(MemoryError("Unable to allocate 7 TiB")).startswith("out of memory (Unable to all")
    assert "Read-only file system" in describe_system_error(ValueError("INTERNAL: Read-only file system [OS error 30]"))
    library = ValueError(
        "{{__WriteSummary_device_/job:localhost/task:0}} /run/events.v2; No space left on device\n\tFailed"
    )
    assert describe_system_error(library).startswith("/run/events.v2: No space left on device: free disk space")
    wrapped = ValueError("could not save")
    wrapped.__cause__ = OSError(errno.EROFS, "Read-only file system", "/x")
    assert describe_system_error(wrapped).startswith("/x: Read-only file system")


def test_a_librarys_error_of_a_full_disk_names_the_file_that_was_to_be_written(tmp_path):
    file = epath.Path(tmp_path / "000.array_record")
    with pytest.raises(RuntimeError) as raised, new_file(file) as temporary:
        temporary.write_bytes(b"x")
        raise RuntimeError(f"write() failed: No space left on device; writing out/{temporary.name}")  # ArrayRecord's
    assert describe_system_error(raised.value).startswith(f"{file}: No space left on device: free disk space")
    assert not list(tmp_path.iterdir())


def test_a_full_folder_of_temporary_files_is_named_and_nothing_stays_in_it(tmp_path, monkeypatch):
    def save(file, array):
        file.write(b"a part")
        raise OSError("Not enough free space to write 16777216 bytes after offset 128")  # NumPy's, without a number

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(np, "save", save)
    array = SharedArray(np.arange(1 << 21))
    for _ in range(2):
        with pytest.raises(UserError, match=f"{tmp_path}, for temporary files, .* 16777216 bytes .*: free .* TMPDIR"):
            pickle.dumps(array)
        assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array)).array, array.array)


def test_a_full_disk_is_one_line_after_a_library_has_logged_it_in_every_thread():
    program = """
import errno, logging, threading
from absl import logging as absl_logging
from lidit_jax import cli

def fail():
    try:
        raise OSError(errno.ENOSPC, "No space left on device", "run/x")
    except OSError:
        absl_logging.exception("a thread failed")
        raise

cli.run(fail)
"""
    done = python("-c", program)
    expected = "error: run/x: No space left on device: free disk space, then run the same command again\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_warnings_of_libraries_are_shown_except_what_is_said_otherwise():
    program = """
from absl import logging
from lidit_jax import cli

def main():
    logging.warning("Waiting for previous save to complete took %f seconds. If this number is high, …", 1.5)
    logging.warning("a file is %s", "odd")

cli.run(main)
"""
    done = python("-c", program)
    assert done.returncode == 0
    assert done.stderr.endswith("a file is odd\n")
    assert done.stderr.count("\n") == 1


def test_the_end_after_a_full_disk_leaves_no_worker(tmp_path):
    program = """
import errno, multiprocessing, time
from multiprocessing.shared_memory import SharedMemory
from lidit_jax import cli

def fail():
    memory = SharedMemory(create=True, size=8)
    print(memory.name, flush=True)
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,), daemon=True)
    worker.start()
    raise OSError(errno.ENOSPC, "No space left on device")

if __name__ == "__main__":
    cli.run(fail)
"""
    (tmp_path / "fail.py").write_text(program)
    done = python(str(tmp_path / "fail.py"), stdin=subprocess.DEVNULL, timeout=300)  # it waits for the worker's output
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not Path(f"/dev/shm/{done.stdout.strip()}").exists()


def test_pngs_carry_text(tmp_path):
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "x.png", {"prompt": "红色圆形", "seed": "3"})
    assert Image.open(tmp_path / "x.png").text == {"prompt": "红色圆形", "seed": "3"}


def test_only_listed_images_count_as_those_of_an_earlier_sample(tmp_path):
    out = epath.Path(tmp_path)
    assert earlier_images(out / "missing") == [] == earlier_images(out)
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "00000.png").touch()
    with pytest.raises(UserError, match=r"images that are not listed in images\.json, such as 00000\.png"):
        earlier_images(out)
    write_json(out / "images.json", {"images": [{"file": "00000.png", "prompt": "a cow", "seed": 0}]})
    assert earlier_images(out) == ["00000.png", "images.json"]
    for damaged in ("[", "3", '{"images": [{"file": "../00000.png", "prompt": "a cow"}]}'):
        (tmp_path / "images.json").write_text(damaged)
        with pytest.raises(UserError, match="is damaged"):
            earlier_images(out)
