"""FID and CLIP score: the statistics, the networks, and the folders of images."""

import dataclasses
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
import transformers
from conftest import ROOT, png_texts, tiny_config
from etils import epath
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing

from lidit_jax.errors import UserError
from lidit_jax.evaluate.benchmarks import open_benchmark
from lidit_jax.fidelity.image_folder import find_images_and_prompts
from lidit_jax.fidelity.inception import FIDInception, load_inception
from lidit_jax.fidelity.reference import config_reference, folder_reference
from lidit_jax.fidelity.scores import ClipScore, FidelityRequest, FrechetDistance, score_fidelity
from lidit_jax.files import write_json
from lidit_jax.images import save_png
from lidit_jax.text.train_tokenizer import train_tokenizer


class MeanColors(torch.nn.Module):
    """Network whose features are the mean colours of an image, so that their distribution is known."""

    num_features = 3

    def forward(self, x):
        return x.mean(dim=(2, 3))

    @staticmethod
    def prepare(image):
        return torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)


def images_of(features):
    """Returns images of one pixel with the given features as colours."""
    return list(features[:, None, None, :])


def random_images(count, seed=0, size=(8, 8)):
    return list(np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8))


def write_images(folder, images, name="{:05d}.png"):
    for i, image in enumerate(images):
        save_png(image, folder / name.format(i))
    return epath.Path(folder)


def frechet(images, reference):
    metric = FrechetDistance(MeanColors())
    metric.add(images, real=False)
    metric.add(reference, real=True)
    return metric.compute()


# --- statistics -------------------------------------------------------------------------------------------------


def test_fid_is_the_formula_by_matrix_square_roots():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(count, 3)) @ rng.normal(size=(3, 3)) + rng.normal(size=3) for count in (70, 90)]
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in features)
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * scipy.linalg.sqrtm(c1 @ c2).real)
    assert frechet(*map(images_of, features)) == pytest.approx(expected, rel=1e-4)


def test_a_set_is_at_no_distance_from_itself_and_a_shift_is_its_square():
    x = np.random.default_rng(0).normal(size=(100, 3))
    assert frechet(images_of(x), images_of(x[::-1])) == pytest.approx(0, abs=1e-5)
    assert frechet(images_of(x), images_of(x + [1, 2, 2])) == pytest.approx(9, rel=1e-4)
    # The Fréchet distance of N(0, 1) and N(0, 4) is (2 - 1)^2 per dimension.
    spread = np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))) @ (x - x.mean(0)).T
    assert frechet(images_of(spread.T), images_of(2 * spread.T)) == pytest.approx(3, rel=1e-4)


# --- FID's Inception ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception():
    """Network with random weights that keep activations from vanishing."""
    torch.manual_seed(0)
    model = FIDInception()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def inception_tensors(inception):
    return {**inception.state_dict(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def test_inceptions_weights_are_read_and_give_2048_features(inception, inception_tensors, tmp_path):
    # torchvision's inception_v3 has 27,161,264 parameters, 2,049,000 and 3,326,696 of them in its two classifiers.
    assert sum(p.numel() for p in inception.parameters()) == 27_161_264 - 2_049_000 - 3_326_696
    save_file(inception_tensors, tmp_path / "inception.safetensors")
    loaded = load_inception(epath.Path(tmp_path / "inception.safetensors"))
    image = loaded.prepare(random_images(1, size=(40, 60))[0])[None]
    with torch.inference_mode():
        features = loaded(image)
        assert features.shape == (1, 2048) and features.std() > 0.1
        torch.testing.assert_close(features, inception(image), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(299, 299), (64, 64), (33, 500), (512, 300)])
def test_images_are_resized_as_tensorflow_1_did(size):
    import tensorflow as tf

    [image] = random_images(1, size=size)
    expected = tf.compat.v1.image.resize_bilinear(image[None].astype(np.float32), (299, 299))[0]
    got = FIDInception.prepare(image).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got * 128 + 128, expected, atol=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.weight": torch.zeros(1000, 2048)}, r"fc\.weight .*1000"),  # torchvision's
        ({"Mixed_7c.branch_pool.conv.weight": None}, "branch_pool.conv.weight is missing: these are not the weights"),
        ({"Mixed_6b.branch1x1.bn.bias": torch.full((192,), torch.nan)}, "not finite"),
    ],
)
def test_weights_that_are_not_fids_are_refused(inception_tensors, tmp_path, changes, message):
    tensors = {name: value for name, value in (inception_tensors | changes).items() if value is not None}
    save_file(tensors, tmp_path / "inception.safetensors")
    with pytest.raises(UserError, match=message):
        load_inception(epath.Path(tmp_path / "inception.safetensors"))


def test_pickled_weights_are_refused_with_the_command_that_converts_them(inception_tensors, tmp_path):
    file = tmp_path / "pt_inception.pth"
    torch.save(inception_tensors, file)
    with pytest.raises(UserError, match="pickles are never read: convert it once with python -c ") as caught:
        load_inception(epath.Path(file))
    command = str(caught.value).partition("python -c ")[2].strip('"')
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    load_inception(epath.Path(tmp_path / "pt_inception.safetensors"))


# --- CLIP score ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    tokenizer = train_tokenizer(["a red circle above a blue square", "a photo of a cow"], 300)
    ending = [(tokenizer.eos_token, tokenizer.eos_token_id)]  # CLIP embeds a prompt by the features of its end token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {ending[0][0]}", special_tokens=ending)
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {**narrow, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    vision = {**narrow, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.CLIPImageProcessorPil(**size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def clip_scores_by_hand(folder, images, prompts):
    model = transformers.CLIPModel.from_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        tokens = tokenizer(prompt)["input_ids"][:-1][:11] + [tokenizer.eos_token_id]
        with torch.no_grad():
            of_image = model.get_image_features(**processor(images=[image], return_tensors="pt")).pooler_output[0]
            of_prompt = model.get_text_features(input_ids=torch.tensor([tokens])).pooler_output[0]
        cosine = of_image @ of_prompt / of_image.norm() / of_prompt.norm()
        scores.append(100 * max(float(cosine), 0))
    return scores


def test_the_clip_score_is_a_hundred_cosines_clipped_at_nothing(clip_folder):
    images = random_images(5, size=(20, 30))
    prompts = ["a red circle", "a photo of a cow", "", "a blue square", "a red circle above a blue square " * 3]
    expected = clip_scores_by_hand(clip_folder, images, prompts)
    assert 0 in expected and max(expected) > 0  # cosines of both signs occur
    score = ClipScore(clip_folder)
    score.add(images[:2], prompts[:2])
    score.add(images[2:], prompts[2:])
    assert score.compute() == pytest.approx(np.mean(expected), rel=1e-4)
    assert score.num_truncated == 1


# --- folders -------------------------------------------------------------------------------------------------------

GENEVAL = ['{"prompt": "a cow", "tag": "x", "include": []}', '{"prompt": "a red kite", "tag": "x", "include": []}']
LAYOUTS = {
    "geneval": ("\n".join(GENEVAL), 2),
    "t2i_compbench": ("a cow\na red kite", 2),
    "dpg_bench": ('{"id": "b", "prompt": "a cow"}\n{"id": "a", "prompt": "a red kite"}', 4),
    "prompts": ("a cow\na red kite", 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("noted", [True, False])
def test_images_and_prompts_are_those_that_a_benchmark_wrote(tmp_path, name, noted):
    text, num_images = LAYOUTS[name]
    file, out = epath.Path(tmp_path / "prompts.txt"), epath.Path(tmp_path / "out")
    file.write_text(text)
    benchmark = open_benchmark(name, file, num_images)
    images = [random_images(num_images, seed) for seed in range(2)]
    for index in range(2):
        benchmark.write(out, index, images[index], png_texts(num_images))
    says_itself = name in ("geneval", "t2i_compbench")
    if noted:
        (out / "drawn_with.json").write_text(json.dumps({"benchmark": name, "num_images": num_images}))
    elif not says_itself:
        assert all(drawn.prompt is None for drawn in find_images_and_prompts(out, None))
        return
    found = {}
    for drawn in find_images_and_prompts(out, None if says_itself else file):
        found.setdefault(drawn.prompt, []).extend(drawn.read())
    assert set(found) == {"a cow", "a red kite"}
    for prompt, expected in zip(("a cow", "a red kite"), images, strict=True):
        np.testing.assert_array_equal(found[prompt], expected)


def test_sampled_images_have_the_prompts_of_their_file(tmp_path):
    folder = write_images(tmp_path / "out", random_images(4))
    save_png(random_images(1)[0], folder / "grid.png")
    prompts = epath.Path(tmp_path / "prompts.txt")
    prompts.write_text("a cow\n\na red kite\n")
    assert [drawn.prompt for drawn in find_images_and_prompts(folder, prompts)] == ["a cow"] * 2 + ["a red kite"] * 2
    assert [drawn.file.name for drawn in find_images_and_prompts(folder, None)] == [f"{i:05d}.png" for i in range(4)]
    prompts.write_text("a cow\na red kite\na dog")
    with pytest.raises(UserError, match="has 4 images, which is not a multiple of the 3 prompts"):
        find_images_and_prompts(folder, prompts)


def test_sampled_images_have_the_prompts_of_their_list(tmp_path):
    folder = write_images(tmp_path / "out", random_images(2))
    save_png(random_images(1)[0], folder / "grid.png")
    listed = [{"file": f"{i:05d}.png", "prompt": prompt, "seed": i} for i, prompt in enumerate(("a cow", "a kite"))]
    write_json(folder / "images.json", {"settings": {}, "images": listed})
    found = [(image.file.name, image.prompt) for image in find_images_and_prompts(folder, None)]
    assert found == [("00000.png", "a cow"), ("00001.png", "a kite")]
    prompts = epath.Path(tmp_path / "prompts.txt")
    prompts.write_text("a dog")
    assert {image.prompt for image in find_images_and_prompts(folder, prompts)} == {"a dog"}
    for images, says in (
        (listed[:1], r"1 images are not listed in images\.json, such as 00001\.png"),
        ([*listed, {"file": "00002.png", "prompt": "x", "seed": 2}], r"1 of 3 files are missing, such as 00002\.png"),
        ([{"file": "/etc/passwd", "prompt": "x"}], r"images\.json is damaged"),
    ):
        write_json(folder / "images.json", {"images": images})
        with pytest.raises(UserError, match=says):
            find_images_and_prompts(folder, None)


def test_a_benchmark_that_is_not_drawn_to_its_end_is_said(tmp_path):
    folder = write_images(tmp_path / "out", random_images(1), "0000{}_0.png")
    (folder / "drawn_with.json").write_text('{"benchmark": "prompts", "num_images": 1}')
    prompts = epath.Path(tmp_path / "prompts.txt")
    prompts.write_text("a cow\na red kite")
    with pytest.raises(UserError, match=r"1 of 2 files are missing, such as 00001_0\.png"):
        find_images_and_prompts(folder, prompts)
    (folder / "drawn_with.json").write_text('{"benchmark": "geneval", "num_images": 1}')
    with pytest.raises(UserError, match="has no image in a folder `samples`"):
        find_images_and_prompts(folder, None)
    save_png(random_images(1)[0], folder / "00000" / "samples" / "0000.png")
    with pytest.raises(UserError, match=r"metadata\.jsonl is missing"):
        find_images_and_prompts(folder, None)
    (folder / "drawn_with.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        find_images_and_prompts(folder, prompts)


def test_a_configs_images_are_those_that_training_sees():
    reference = config_reference(tiny_config(), "shapes", 40)
    images = list(reference.images)
    assert len(images) == reference.count == 40
    assert {image.shape for image in images} == {(32, 32, 3)} and images[0].dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 40


# --- the scores ----------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path, clip_folder, monkeypatch):
    """Request for both scores of four images, with mean colours as the features of FID."""
    monkeypatch.setattr("lidit_jax.fidelity.scores.load_network", lambda file: MeanColors())
    (tmp_path / "prompts.txt").write_text("a cow\na red kite\n")
    (tmp_path / "inception.safetensors").write_bytes(b"whatever")
    reference = write_images(tmp_path / "reference", random_images(6, seed=1, size=(10, 12)), "some/{}.png")
    return FidelityRequest(
        images=write_images(tmp_path / "images", random_images(4)),
        out=epath.Path(tmp_path / "out"),
        reference=folder_reference(reference, 5),
        inception=epath.Path(tmp_path / "inception.safetensors"),
        clip=clip_folder,
        prompts_file=epath.Path(tmp_path / "prompts.txt"),
    )


def test_both_scores_are_written_and_said(asked, clip_folder, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lidit_jax"), "propagate", True)
    with caplog.at_level(logging.INFO, "lidit_jax"):
        scores = score_fidelity(asked)
    images = random_images(4)
    prompts = ["a cow", "a cow", "a red kite", "a red kite"]
    assert scores["clip_score"] == pytest.approx(np.mean(clip_scores_by_hand(clip_folder, images, prompts)), rel=1e-4)
    reference = random_images(6, seed=1, size=(10, 12))
    kept = [reference[i] for i in (0, 1, 2, 3, 5)]  # five of six, at even intervals
    assert scores["fid"] == pytest.approx(frechet(images, kept), rel=1e-3)
    assert json.loads((asked.out / "fidelity.json").read_text()) == scores
    assert (scores["num_images"], scores["num_reference"]) == (4, 5)
    assert f"FID {scores['fid']:.3f}, CLIP score {scores['clip_score']:.3f} of 4 images" in caplog.text
    assert "biased" not in caplog.text  # four images exceed the three features


def test_few_images_for_the_features_are_warned_of(asked, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lidit_jax"), "propagate", True)
    few = folder_reference(epath.Path(str(asked.reference.name)), 3)
    score_fidelity(dataclasses.replace(asked, reference=few, clip=None, prompts_file=None))
    assert "FID of 3 images is biased upwards" in caplog.text


def test_scores_of_something_else_are_not_overwritten(asked):
    alone = dataclasses.replace(asked, clip=None, prompts_file=None)
    first = score_fidelity(alone)
    again = folder_reference(epath.Path(asked.reference.name), 5)  # the first one's iterator is exhausted
    assert score_fidelity(dataclasses.replace(alone, reference=again)) == first
    with pytest.raises(UserError, match="has scores of another clip"):
        score_fidelity(asked)
    (asked.out / "fidelity.json").write_text("[")
    with pytest.raises(UserError, match="is damaged: name another --out"):
        score_fidelity(alone)
    (asked.out / "fidelity.json").unlink()
    (asked.out / "mine.txt").write_text("not scores")
    with pytest.raises(UserError, match=r"is not empty and has no fidelity\.json"):
        score_fidelity(alone)


def test_what_can_not_be_scored_is_said(asked, tmp_path):
    def refused(message, **changes):
        with pytest.raises(UserError, match=message):
            score_fidelity(dataclasses.replace(asked, **changes))
        assert not asked.out.exists()

    empty = epath.Path(tmp_path / "empty")
    empty.mkdir()
    refused("has no image in it", images=empty)
    refused("no such folder", images=epath.Path(tmp_path / "nothing"))
    refused("nothing to score", inception=None, clip=None, reference=None)
    refused("FID needs --inception=FILE and either", reference=None)
    refused("does not store the prompts, which --clip needs", prompts_file=None)
    refused("no such file", inception=epath.Path(tmp_path / "nothing.safetensors"))
    refused("no such folder, and not a name on the Hugging Face hub", clip="nothing")
    single = folder_reference(epath.Path(asked.reference.name), 1)
    refused("needs at least 2 images", reference=single)
    damaged = (asked.images / "00002.png").read_bytes()[:-40]
    (asked.images / "00002.png").write_bytes(damaged)
    refused(r"00002\.png is damaged")
    with pytest.raises(UserError, match="has no image in it"):
        folder_reference(empty, None)


def test_the_command_scores_a_folder(clip_folder, tmp_path):
    folder = write_images(tmp_path / "images", random_images(2), "samples/a cow_{:06d}.png")
    command = [sys.executable, "-m", "lidit_jax.fidelity", f"--images={folder}", f"--clip={clip_folder}"]
    done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "CLIP score" in done.stderr and (tmp_path / "out" / "fidelity.json").exists()
