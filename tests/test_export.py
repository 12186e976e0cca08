"""The export command: contents of the folder, atomic writes, errors of users, and the import into JAX."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from conftest import DELETED, change_config, tiny_config
from diffusers import DiffusionPipeline
from etils import epath
from random_workdirs import CAPTIONS, make_workdir, random_config
from safetensors.numpy import load_file, save_file

from lidit_jax import trained_model
from lidit_jax.config import claim_workdir, read_workdir
from lidit_jax.errors import UserError
from lidit_jax.experiment import Experiment
from lidit_jax.export import write
from lidit_jax.export.folder import read_folder
from lidit_jax.export.read import load_exported
from lidit_jax.export.transformers_class import transformers_class
from lidit_jax.export.write import Request, export
from lidit_jax.text.encoders import encode, tokenize
from lidit_jax.text.load_encoder import MODEL_TYPES
from lidit_jax.text.train_tokenizer import train_tokenizer
from lidit_jax.weights import folders

torch.set_num_threads(1)  # these models are too small to gain from threads
PROMPTS = ["a red circle", ""]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("run") / "two", random_config())


@pytest.fixture(scope="module")
def folder(workdir):
    out = workdir / "../exported"
    export(Request(workdir, out))
    return Path(out)


def export_of(workdir, out, **options) -> Path:
    export(Request(workdir, epath.Path(out), **options))
    return Path(out)


def index_of(folder):
    return json.loads((folder / "model_index.json").read_text())


def files_in(folder):
    return sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file())


def load(folder, **options):
    pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- the folder ------------------------------------------------------------------------------------------------------


def test_the_folder_has_the_files_that_diffusers_and_users_expect(folder, workdir):
    assert set(files_in(folder)) >= {
        *("model_index.json", "README.md", "pipeline_lidit.py", "scheduler/scheduler_config.json"),
        *("transformer/config.json", "transformer/transformer_lidit.py"),
        *("transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
        *("vae/config.json", "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"),
        *("text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/tokenizer.json"),
    }
    assert not [name for name in files_in(folder) if "tokenizer" in Path(name).name and name.startswith("text_enc")]
    index = index_of(folder)
    assert index["_class_name"] == ["pipeline_lidit", "LIDiTPipeline"]
    assert index["transformer"] == ["transformer_lidit", "LIDiTTransformer2DModel"]
    assert index["text_encoder"] == ["transformers", "LlamaModel"]
    assert index["text_encoder_2"] == ["transformers", "Qwen2Model"]
    assert index["text_encoder_3"] == [None, None]
    assert index["lidit"]["trained"] == {"step": 7, "weights": "ema"}
    assert index["lidit"]["resolution"] == 32
    # diffusers takes every list for a component.
    assert {key for key, value in index.items() if not isinstance(value, list)} == {
        *("_diffusers_version", "lidit", "text_encoder_sources")
    }
    for part in ("vae", "encoders/llama"):
        there = "text_encoder" if "/" in part else part
        [weights] = (folder / there).glob("*.safetensors")
        assert weights.read_bytes() == (workdir / part / weights.name).read_bytes()
    for file in files_in(folder):
        assert (folder / file).stat().st_mode & 0o400


def test_ema_and_raw_weights_in_either_dtype(workdir, folder, tmp_path):
    name = "transformer/diffusion_pytorch_model.safetensors"
    raw = export_of(workdir, tmp_path / "raw", weights="params")
    assert (raw / name).read_bytes() != (folder / name).read_bytes()
    assert index_of(raw)["lidit"]["trained"]["weights"] == "params"
    half = export_of(workdir, tmp_path / "half", dtype="bfloat16", max_shard_gb=0.001)
    assert (half / name).stat().st_size < 0.6 * (folder / name).stat().st_size
    assert (half / "vae/diffusion_pytorch_model.safetensors").stat().st_size == (
        (folder / "vae/diffusion_pytorch_model.safetensors").stat().st_size
    )
    assert load(half, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_the_cards_code_runs_as_pasted_and_its_facts_are_the_runs(folder, tmp_path, monkeypatch):
    card = (folder / "README.md").read_text()
    front = card.split("---")[1]
    assert "license: other" in front  # only whoever trained the weights can license them
    assert "library_name: diffusers" in front
    assert "pipeline_tag: text-to-image" in front
    for fact in ("rectified flow, shift 3", "euler, 25 steps, guidance 3", "7 steps of 8 images", "32 pixels"):
        assert fact in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("FOLDER", str(folder)), {})
    assert (tmp_path / "image.png").exists()


def test_the_card_names_the_licences_of_networks_of_others(workdir, t5_folder, tmp_path):
    config = random_config()
    config.encoders.qwen = {"weights": str(t5_folder), "dtype": "float32"}
    config.vae.weights = str(workdir / "vae")
    run = make_workdir(tmp_path / "run", config)
    card = (export_of(run, tmp_path / "copied") / "README.md").read_text()
    assert "license: other" in card
    assert f"qwen is in `text_encoder_2/`, a copy of `{t5_folder.name}`: its own licence applies" in card
    assert "`vae/` is a copy of `vae`: its own licence applies" in card
    card = (export_of(run, tmp_path / "referred", text_encoders="reference") / "README.md").read_text()
    assert f"qwen is not in this folder, loaded from `{t5_folder.name}`" in card
    assert str(t5_folder) not in card  # a public card must not reveal local paths


# --- text encoders ---------------------------------------------------------------------------------------------------


def test_published_llms_are_copied_from_folders_and_referred_to_on_the_hub(workdir, tmp_path, monkeypatch):
    commit = "a" * 40
    snapshot = tmp_path / "models--org--llm/snapshots" / commit
    shutil.copytree(workdir / "encoders/llama", snapshot)
    monkeypatch.setattr(folders, "_download", lambda name: epath.Path(snapshot))
    config = random_config()
    config.encoders.llama.weights = "org/llm"
    config.encoders.qwen.weights = str(workdir / "encoders/qwen")
    config.vae.weights = str(workdir / "vae")
    run = make_workdir(tmp_path / "run", config)
    usual, copied, referred = (
        export_of(run, tmp_path / str(mode), text_encoders=mode) for mode in (None, "copy", "reference")
    )
    source = {"name": "org/llm", "revision": commit, "class": "LlamaModel"}
    assert index_of(usual)["text_encoder_sources"] == {"text_encoder": source}
    assert index_of(usual)["text_encoder"] == [None, None]
    assert not (usual / "text_encoder").exists()
    assert (usual / "text_encoder_2/model.safetensors").exists()
    assert index_of(copied)["text_encoder_sources"] == {}
    assert (copied / "text_encoder/model.safetensors").exists()
    assert set(index_of(referred)["text_encoder_sources"]) == {"text_encoder", "text_encoder_2"}
    assert read_folder(usual).encoders.llama.weights == f"org/llm@{commit}"  # the revision that PyTorch loads

    revisions = []
    kinds = (transformers.LlamaModel, transformers.PreTrainedTokenizerFast)
    for kind, real in [(kind, kind.from_pretrained) for kind in kinds]:

        def from_hub(name, *arguments, revision="main", real=real, **options):
            if name == "org/llm":
                revisions.append(revision)
                name = str(snapshot)
            return real(name, *arguments, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_hub)
    pipe = load(usual, dtype=torch.bfloat16)
    assert revisions == [commit, commit]
    assert pipe.text_encoder.dtype == torch.float32  # its training dtype, independent of the other components
    assert pipe("a", num_inference_steps=1).images[0].size == (32, 32)


TINY = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}


def save_llms(root: Path) -> dict[str, Path]:
    """{name: folder of a tiny LLM}, for families that the demo does not train, in the format of their authors."""
    gemma3_rope = {"rope_type": "default", "rope_theta": 10_000.0}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}
    text = transformers.LlamaConfig(**TINY)
    models = {
        "gemma2": transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**TINY, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, sliding_window=4)
        ),
        "gemma3": transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                **TINY,
                sliding_window=4,
                layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
                rope_parameters={"full_attention": gemma3_rope, "sliding_attention": gemma3_rope},
            )
        ),
        "mistral": transformers.MistralForCausalLM(transformers.MistralConfig(**TINY, sliding_window=4)),
        "qwen3": transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY)),
        "phi3": transformers.Phi3ForCausalLM(transformers.Phi3Config(**TINY, sliding_window=4)),
        "llava": transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(**vision), text_config=text, image_token_index=299
            )
        ),
        "own_llava": transformers.LlamaForCausalLM(text),
    }
    found = {}
    for seed, (name, model) in enumerate(models.items()):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        found[name] = root / name
        model.save_pretrained(found[name], max_shard_size="20KB" if name == "mistral" else "5GB")
        train_tokenizer(CAPTIONS, 299).save_pretrained(found[name])
    # Tensor names as in the files of llava-hf.
    found["old_llava"] = Path(shutil.copytree(found["llava"], root / "old_llava"))
    rename(found["old_llava"], "model.language_model.", "language_model.model.")
    change_config(found["own_llava"], model_type="llava_llama", mm_hidden_size=16, architectures=["LlavaLlama"])
    file = found["own_llava"] / "model.safetensors"
    tensors = load_file(file) | {"model.mm_projector.weight": np.zeros((2, 2), np.float32)}
    save_file(tensors, file, metadata={"format": "pt"})
    return found


def rename(folder: Path, old: str, new: str) -> None:
    """Replaces a prefix of the tensor names in the folder's weights."""
    file = folder / "model.safetensors"
    tensors = {re.sub(f"^{re.escape(old)}", new, name): value for name, value in load_file(file).items()}
    assert any(name.startswith(new) for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "names", [("gemma2", "gemma3", "mistral", "qwen3"), ("llava", "old_llava", "own_llava", "phi3")]
)
def test_every_llm_family_has_the_same_features_in_pytorch(workdir, tmp_path, names):
    llms = save_llms(tmp_path)
    config = random_config()
    config.encoders = {name: {"weights": str(llms[name]), "dtype": "float32"} for name in names}
    config.vae.weights = str(workdir / "vae")
    run_folder = make_workdir(tmp_path / "run", config)
    if "own_llava" in names:
        with pytest.raises(UserError, match="own_llava has model_type 'llava_llama', .* use --text_encoders=copy"):
            export_of(run_folder, tmp_path / "out", text_encoders="reference")
    folder = export_of(run_folder, tmp_path / "out")
    prompts = ["a red circle above a blue square", "", "红色圆形"]
    if "mistral" in names:
        assert len(list((folder / "text_encoder_3").glob("model-*-of-*.safetensors"))) > 1
    theirs = load(folder).encode_prompt(prompts)
    run = Experiment(config, run_folder)
    encoders, frozen = run.load_encoders()
    assert len(encoders) == len(names)
    ours = encode(encoders, frozen, tokenize(encoders, prompts))
    for index, features in enumerate(ours):
        mask = np.asarray(features.mask)
        np.testing.assert_array_equal(theirs.masks[index].numpy(), mask)
        expected, got = np.asarray(features.prompt)[mask], theirs.embeds[index].numpy()[mask]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        expected = np.asarray(features.prefix)
        np.testing.assert_allclose(theirs.instructions[index], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


# --- atomic writes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_supported_encoder_has_a_class_in_transformers(model_type):
    for values in ({"model_type": model_type}, {"model_type": model_type, "text_config": {}}):
        assert hasattr(transformers, transformers_class(values))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("bug")])
def test_a_failed_export_leaves_nothing_behind(workdir, tmp_path, monkeypatch, error):
    def broken(*arguments):
        raise error

    monkeypatch.setattr(write, "copy_files", broken)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as caught:
        export_of(workdir, tmp_path / "out")
    if isinstance(error, OSError):
        says = "No space left on device: free disk space, then run the same command again"
        assert str(caught.value) == f"{tmp_path / 'out'} can't be written: {says}"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_detected_before_anything_is_written(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"out needs \d+ MB with 67 MB to spare, the disk has 0 MB free: free some"):
        export_of(workdir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_an_export_and_nothing_else(workdir, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    (out / "tokenizer_4").mkdir()
    (out / "tokenizer_4" / "of_the_old.txt").write_text("")
    with pytest.raises(UserError, match=r"is not empty: use another folder, or pass --overwrite"):
        export_of(workdir, out)
    with monkeypatch.context() as patch:
        patch.setattr(write, "model_card", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_of(workdir, out, overwrite=True)
    assert (out / "tokenizer_4" / "of_the_old.txt").exists()
    export_of(workdir, out, overwrite=True)
    assert files_in(out) == files_in(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    assert files_in(export_of(workdir, empty, overwrite=True)) == files_in(folder)
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(UserError, match="not an export: --overwrite only replaces exports"):
        export_of(workdir, other, overwrite=True)
    assert files_in(other) == ["model_index.json"]
    (out / ".git").mkdir()
    with pytest.raises(UserError, match=r"\.git is not part of an export, and --overwrite would delete it"):
        export_of(workdir, out, overwrite=True)
    assert (out / ".git").exists()


def test_an_export_that_the_run_depends_on_is_not_replaced(workdir, folder, tmp_path):
    config = random_config()
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    for name, component in (("llama", "text_encoder"), ("qwen", "text_encoder_2")):
        config.encoders[name].weights = str(out / component)
    config.vae.weights = str(workdir / "vae")
    run = make_workdir(tmp_path / "run", config)
    with pytest.raises(UserError, match="which the run needs: use another folder"):
        export_of(run, out, overwrite=True, text_encoders="reference")
    assert files_in(out) == files_in(folder)
    # The tokenizer of a referenced encoder is found in the exported folder that holds the encoder.
    referred = export_of(run, tmp_path / "referred", text_encoders="reference")
    source = json.loads((referred / "model_index.json").read_text())["text_encoder_sources"]["text_encoder_2"]
    assert source["tokenizer"] == str(out / "tokenizer_2")
    pipe = DiffusionPipeline.from_pretrained(referred, trust_remote_code=True)
    assert pipe.tokenizer_2("a")["input_ids"] and pipe.text_encoder_2 is not None


def test_each_component_is_loaded_in_its_training_dtype(folder, tmp_path):
    config = random_config()
    config.encoders.qwen.dtype = "bfloat16"
    run = make_workdir(tmp_path / "run", config)
    card = (export_of(run, tmp_path / "out") / "README.md").read_text()
    assert '"text_encoder_2": torch.bfloat16' in card and '"default": torch.float32' in card


def test_a_compiled_transformer_is_saved_under_its_own_class(folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.transformer = torch.compile(pipe.transformer)
    pipe.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "transformer" / "transformer_lidit.py").exists()
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(again.transformer).__name__ == "LIDiTTransformer2DModel"


def test_a_run_and_its_export_have_the_same_frozen_digests(workdir, folder):
    """Checks that both have the same digests, so that features precomputed for one are accepted by the other."""
    ours = Experiment(read_workdir(workdir), workdir).frozen_digests()
    assert Experiment(read_folder(folder), folder).frozen_digests() == ours


STOPPED = """
import sys, time
from pathlib import Path
from lidit_jax import cli
from lidit_jax.export import write
from lidit_jax.export.__main__ import main

def stop(*arguments):
    Path(sys.argv[0]).touch()
    time.sleep(120)

write.copy_files = stop
sys.argv = sys.argv[1:]
cli.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_killed_export_leaves_no_folder_that_looks_complete(workdir, tmp_path, number):
    (tmp_path / "outs").mkdir()
    out, started = tmp_path / "outs/out", tmp_path / "started"
    command = [sys.executable, "-c", STOPPED, str(started), f"--workdir={workdir}", f"--out={out}"]
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) == (143 if number == signal.SIGTERM else -9)
    assert not out.exists()
    if number == signal.SIGTERM:
        assert list(out.parent.iterdir()) == []
    export_of(workdir, out)


# --- errors of users -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "best"}, "--weights=best: use ema or params"),
        ({"dtype": "float16"}, "--dtype=float16: use float32 or bfloat16"),
        ({"text_encoders": "link"}, "--text_encoders=link: use copy or reference"),
        ({"max_shard_gb": 0.0}, "--max_shard_gb=0.0 is not from"),
        ({"max_shard_gb": float("nan")}, "--max_shard_gb=nan is not from"),
    ],
)
def test_invalid_options_are_rejected(workdir, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        export_of(workdir, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written_are_rejected(workdir, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/out"):
        with pytest.raises(UserError, match=f"--out={tmp_path / out}: .*file is a file: name a folder"):
            export_of(workdir, tmp_path / out)
    with pytest.raises(UserError, match="gs://bucket/out: weights are written to local folders only"):
        export(Request(workdir, epath.Path("gs://bucket/out")))


def test_workdirs_without_a_trained_model_are_rejected(workdir, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json there"):
        export_of(epath.Path(tmp_path / "none"), tmp_path / "out")
    config = tiny_config()
    for section in ("text", "encoders", "model", "diffusion", "train", "sample", "evaluate"):
        del config[section]
    claim_workdir(epath.Path(tmp_path / "vae"), config)
    with pytest.raises(UserError, match="trained only a VAE"):
        export_of(epath.Path(tmp_path / "vae"), tmp_path / "out")
    begun = epath.Path(shutil.copytree(workdir, tmp_path / "begun"))
    shutil.rmtree(begun / "training")
    with pytest.raises(UserError, match="no (finished )?checkpoint there"):
        export_of(begun, tmp_path / "out")
    shutil.rmtree(begun / "encoders/qwen")
    with pytest.raises(UserError, match=r"encoders/qwen/config\.json is missing"):
        export_of(begun, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_encoders_than_a_pipeline_supports_are_rejected(workdir, t5_folder, tmp_path):
    config = random_config()
    config.encoders = {f"t5_{i}": {"weights": str(t5_folder), "dtype": "float32"} for i in range(5)}
    config.vae.weights = str(workdir / "vae")
    claim_workdir(epath.Path(tmp_path / "run"), config)
    with pytest.raises(UserError, match="the run has 5 encoders, but an exported pipeline supports at most 4"):
        export_of(epath.Path(tmp_path / "run"), tmp_path / "out")


def test_truncated_weights_are_not_copied(workdir, tmp_path):
    copy = epath.Path(shutil.copytree(workdir, tmp_path / "copy"))
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="is not a readable safetensors file .*; copy it again"):
        export_of(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is required"),
        (["--workdir=/not/there", "--out=out"], "no config.json there"),
    ],
)
def test_the_command_reports_errors_of_users_in_one_line(tmp_path, arguments, message):
    command = [sys.executable, "-m", "lidit_jax.export", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stderr


def test_the_command_ends_with_how_to_load_the_folder(workdir, tmp_path):
    command = [sys.executable, "-m", "lidit_jax.export", f"--workdir={workdir}", "--out=out", "--dtype=bfloat16"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "out: ema weights of step 7" in last
    assert "DiffusionPipeline.from_pretrained('out', trust_remote_code=True)" in last


def test_neither_torch_nor_diffusers_is_needed(workdir, tmp_path):
    code = f"""
import sys
for name in ("torch", "diffusers"):
    sys.modules[name] = None
from etils import epath
from lidit_jax.export.folder import read_folder
from lidit_jax.export.read import load_exported
from lidit_jax.export.write import Request, export
export(Request(epath.Path({str(workdir)!r}), epath.Path("out")))
read_folder("out")
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- import into JAX -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(workdir):
    """Returns the experiment and images sampled from the workdir itself."""
    model = trained_model.load(workdir, devices=jax.devices()[:1])
    return model.experiment, model(PROMPTS, height=32, width=48)


@pytest.mark.parametrize("saved_by_diffusers", [False, True])
def test_back_in_jax_the_images_are_bit_identical(folder, images, tmp_path, saved_by_diffusers):
    run, expected = images
    if saved_by_diffusers:
        load(folder).save_pretrained(tmp_path / "saved")
        folder = tmp_path / "saved"
    back = Experiment(read_folder(folder), epath.Path(tmp_path))
    assert back.model.config.depth == run.model.config.depth
    assert back.schedule == run.schedule
    assert back.sample == run.sample
    assert back.encoder_folder("qwen") == epath.Path(folder) / "text_encoder_2"
    got = load_exported(folder, jax.devices()[:1])(PROMPTS, height=32, width=48)
    np.testing.assert_array_equal(got, expected)


def test_training_fields_of_the_schedule_are_restored(tmp_path):
    diffusion = {"name": "rectified_flow", "shift": 2.0, "logit_mean": 0.5, "logit_std": 2.0}
    config = random_config(diffusion, "heun")
    folder = export_of(make_workdir(tmp_path / "run", config), tmp_path / "out")
    assert read_folder(folder).diffusion.to_dict() == diffusion | {"num_timesteps": 1000}
    assert read_folder(folder).sample.sampler == "heun"


def remove(*parts):
    return lambda folder: shutil.rmtree(folder.joinpath(*parts))


def change_index(**changes):
    def change(folder):
        values = index_of(folder) | changes
        (folder / "model_index.json").write_text(json.dumps(values))

    return change


def change_facts(**changes):
    def change(folder):
        values = index_of(folder)
        values["lidit"] = {key: value for key, value in (values["lidit"] | changes).items() if value is not DELETED}
        (folder / "model_index.json").write_text(json.dumps(values))

    return change


ENTRY = {"name": "llama", "dtype": "float32"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), r"the folder has no model_index\.json: use one that"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: (folder / "model_index.json").write_bytes(b"\xff"), "is not a readable JSON file"),
        (lambda folder: (folder / "model_index.json").write_text("[" * 100_000), "is not a readable JSON file"),
        (change_index(lidit=None), "it has no lidit object"),
        (
            change_facts(format_version=2),
            "format_version=2 is newer than 1, the newest supported: install a newer",
        ),
        (change_facts(format_version="1"), "format_version='1' is not an integer"),
        (change_facts(format_version=True), "format_version=True is not an integer"),
        (change_facts(resolution=10**30), "resolution=1000000.* is not an integer from 1 to 65536"),
        (change_facts(resolution=DELETED), "resolution=None"),
        (change_facts(text=[]), r"lidit\.text is not an object"),
        (change_facts(text={"max_length": 10**9}), "max_length=1000000000 is not an integer"),
        (change_facts(text={"max_length": 12, "a.b": 1}), r"lidit\.text\.a\.b is not a valid config field"),
        (
            change_facts(text={"max_length": 12, "instruction": {}}),
            r"lidit\.text\.instruction is not a valid config field",
        ),
        (change_facts(sample=3), r"lidit\.sample is not an object"),
        (change_facts(diffusion={"logit_mean": "0"}), r"diffusion\.logit_mean='0' is not a number"),
        (change_facts(vae_dtype=7), "vae_dtype=7 is not a non-empty string"),
        (change_facts(encoders={}), "encoders is not a list of 1 to 4 encoders"),
        (change_facts(encoders=[ENTRY] * 5), "encoders is not a list of 1 to 4 encoders"),
        (change_facts(encoders=["llama"]), r"lidit\.encoders\[0\] is not an object"),
        (change_facts(encoders=[{"name": "../x", "dtype": "float32"}]), "'../x' is not a valid encoder name"),
        (change_facts(encoders=[ENTRY, ENTRY]), "not sorted by name: llama"),
        (change_facts(encoders=[ENTRY | {"name": "z"}, ENTRY]), "not sorted by name: z, llama"),
        (remove("vae"), r"vae/config\.json is missing"),
        (remove("scheduler"), r"scheduler/scheduler_config\.json is missing"),
        (remove("transformer"), r"transformer/config\.json is missing"),
        (remove("text_encoder_2"), r"text_encoder_2 is missing, and .* gives no source for it"),
        (lambda folder: (folder / "text_encoder/config.json").unlink(), r"text_encoder/config\.json is missing"),
    ],
)
def test_a_damaged_folder_is_reported_in_one_line(folder, tmp_path, damage, message):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        read_folder(copy)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"text": {"max_length": 12}}, r"config key text\.instruction is missing"),
        ({"text": {"max_length": 12, "instruction": 3}}, r"text\.instruction is 3: it must be of type str"),
        ({"sample": {"steps": 10**12}}, r"sample\.steps=1000000000000 must be from 1 to 1000000"),
        ({"sample": {"steps": 4, "guidance_scale": 10**400}}, r"guidance_scale is 1000.*the largest number is 1e\+30"),
        ({"encoders": [ENTRY | {"name": "__class__"}]}, "'__class__' is not a valid encoder name"),
        ({"sample": {"stpes": 4}}, r"config key sample\.stpes is unknown; did you mean 'steps'"),
        ({"encoders": [ENTRY | {"dtype": "int4"}, ENTRY | {"name": "qwen"}]}, r"encoders\.llama\.dtype"),
        ({"vae_dtype": "int4"}, r"vae\.dtype"),
    ],
)
def test_invalid_settings_are_reported_when_the_config_is_used(folder, tmp_path, facts, message):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change_facts(**facts)(copy)
    with pytest.raises(UserError, match=message):
        Experiment(read_folder(copy), epath.Path(tmp_path))
