"""Benchmark images, written in the folder layouts of the official scorers."""

import json

import numpy as np
import pytest
from conftest import png_texts
from etils import epath
from PIL import Image

from lidit_jax.errors import UserError
from lidit_jax.evaluate import generate
from lidit_jax.evaluate.benchmarks import GenEval, open_benchmark
from lidit_jax.evaluate.generate import Request, generate_benchmark, seed_of
from lidit_jax.pipeline import Pipeline
from lidit_jax.text.batch_prompts import SharedPrompts

GENEVAL = [
    {"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "cow", "count": 1}], "prompt": "a cow"},
    {"tag": "colors", "include": [{"class": "kite", "count": 1, "color": "红"}], "prompt": "a red kite"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "two clocks"},
]


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def geneval(tmp_path):
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in GENEVAL), encoding="utf-8")
    return epath.Path(file)


def request(workdir, benchmark, file, out, **more):
    more = {"steps": 1, "num_images": 2} | more
    return Request(workdir=epath.Path(workdir), benchmark=benchmark, file=file, out=epath.Path(out), **more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 33}, "height=33 is not a multiple of 8: use 32 or 40"),
        ({"sampler": "ddim"}, "euler"),
    ],
)
def test_options_that_do_not_fit_are_reported_before_weights_are_loaded(
    trained_workdir, geneval, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr("lidit_jax.trained_model.load", None)
    with pytest.raises(UserError, match=message):
        generate_benchmark(request(trained_workdir, "geneval", geneval, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_geneval_is_drawn_and_goes_on_where_it_was_stopped(trained_workdir, geneval, tmp_path, monkeypatch):
    out = tmp_path / "out"
    asked = request(trained_workdir, "geneval", geneval, out, num_images=3)
    generate_benchmark(asked)
    of_a_prompt = ["metadata.jsonl", *(f"samples/{i:04}.png" for i in range(3))]
    assert files_of(out) == sorted([*(f"{i:05}/{name}" for i in range(3) for name in of_a_prompt), "drawn_with.json"])
    for i, entry in enumerate(GENEVAL):
        [line] = (out / f"{i:05}" / "metadata.jsonl").read_text().splitlines()
        assert json.loads(line) == entry
    before = {name: (out / name).read_bytes() for name in files_of(out)}
    assert before["00000/samples/0000.png"] != before["00000/samples/0001.png"]
    text = Image.open(out / "00001/samples/0002.png").text
    assert text["prompt"] == GENEVAL[1]["prompt"] and text["seed"] == str(generate.seed_of(text["prompt"], 2))
    settings = json.loads(text["settings"])
    assert settings["model"] == str(trained_workdir) and settings["step"] == 6 and settings["sampler"] == "euler"

    (out / "00001" / "metadata.jsonl").unlink()  # as after a kill during the second prompt
    (out / "00001" / "samples" / "0002.png").unlink()
    written = []
    write = GenEval.write
    monkeypatch.setattr(
        GenEval,
        "write",
        lambda self, out, index, *rest: (written.append(index), write(self, out, index, *rest)),
    )
    generate_benchmark(asked)
    assert written == [1]
    assert {name: (out / name).read_bytes() for name in files_of(out)} == before


def test_all_batches_are_sampled_by_one_program(trained_workdir, geneval, tmp_path, monkeypatch):
    pipelines, batches = [], []
    load, draw = generate.trained_model.load, Pipeline.__call__
    monkeypatch.setattr(
        generate.trained_model,
        "load",
        lambda *args, **options: (loaded := load(*args, **options), pipelines.append(loaded.pipeline))[0],
    )
    monkeypatch.setattr(Pipeline, "__call__", lambda self, *args: (batches.append(len(args[1])), draw(self, *args))[1])
    generate_benchmark(request(trained_workdir, "geneval", geneval, tmp_path / "out", num_images=4))
    assert batches == [2, 1]  # eight images per batch
    [pipeline] = pipelines
    assert pipeline._sample_program._cache_size() == 1


def test_more_images_of_a_prompt_than_are_drawn_at_once(trained_workdir, tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n")
    encode, batches = SharedPrompts.batch, []
    monkeypatch.setattr(SharedPrompts, "batch", lambda self, *a: (batches.append(self.num_images), encode(self, *a))[1])
    generate_benchmark(request(trained_workdir, "prompts", epath.Path(file), tmp_path / "out", num_images=11))
    assert files_of(tmp_path / "out") == sorted([*(f"00000_{i}.png" for i in range(11)), "drawn_with.json"])
    assert batches == [8, 8]  # no more than `sample.batch_size`


def test_another_model_or_another_way_to_draw_needs_another_folder(trained_workdir, geneval, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("not images of a benchmark")
    with pytest.raises(UserError, match=r"is not empty and has no drawn_with\.json"):
        generate_benchmark(request(trained_workdir, "geneval", geneval, out))
    assert files_of(out) == ["mine.txt"]
    (out / "mine.txt").unlink()
    asked = request(trained_workdir, "geneval", geneval, out)
    model = generate.trained_model.load(asked.workdir)
    benchmark = open_benchmark("geneval", geneval, 2)
    provenance = generate._provenance(asked, benchmark, model)
    generate._claim(asked.out, provenance)
    generate._claim(asked.out, provenance)
    for changed in ({"step": 7}, {"config": "another"}, {"weights": "params"}, {"num_images": 4}):
        with pytest.raises(UserError, match=f"has images of another {next(iter(changed))} "):
            generate._claim(asked.out, provenance | changed)
    (out / "drawn_with.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        generate._claim(asked.out, provenance)


def test_t2i_compbench_names_its_images_by_prompt_and_number(tmp_path):
    file = tmp_path / "color_val.txt"
    file.write_text("a green bench and a blue bowl\n\na blue bench\tcolor\n")
    benchmark = open_benchmark("t2i_compbench", epath.Path(file), 2)
    for index in range(2):
        benchmark.write(epath.Path(tmp_path / "out"), index, np.full((2, 4, 4, 3), index, np.uint8), png_texts(2))
    assert files_of(tmp_path / "out") == [
        "samples/a blue bench_000002.png",
        "samples/a blue bench_000003.png",
        "samples/a green bench and a blue bowl_000000.png",
        "samples/a green bench and a blue bowl_000001.png",
    ]
    assert benchmark.last_file(0) == "samples/a green bench and a blue bowl_000001.png"


@pytest.mark.parametrize("official", [True, False])
def test_dpg_bench_is_a_grid_of_four_by_id(tmp_path, official):
    if official:
        file = tmp_path / "prompts"
        file.mkdir()
        (file / "COCOval1.txt").write_text("two dogs\n")
        (file / "0.txt").write_text("a cabbage")
    else:
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"id": "0", "prompt": "a cabbage"}\n{"id": "COCOval1", "prompt": "two dogs"}\n')
    benchmark = open_benchmark("dpg_bench", epath.Path(file), 4)
    assert benchmark.prompts == ["a cabbage", "two dogs"]
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    benchmark.write(epath.Path(tmp_path / "out"), 1, images, png_texts(4))
    [name] = files_of(tmp_path / "out")
    assert Image.open(tmp_path / "out" / name).text["seed"] == "0 1 2 3"
    assert name == "COCOval1.png" == benchmark.last_file(1)
    sheet = np.asarray(Image.open(tmp_path / "out" / name))[..., 0]
    np.testing.assert_array_equal(sheet, [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    with pytest.raises(UserError, match="writes grids of 4 images, or 1 image"):
        open_benchmark("dpg_bench", epath.Path(file), 2)


def test_a_list_of_prompts_is_drawn(trained_workdir, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n红色圆形\n", encoding="utf-8")
    generate_benchmark(request(trained_workdir, "prompts", epath.Path(file), tmp_path / "out"))
    names = ["00000_0.png", "00000_1.png", "00001_0.png", "00001_1.png", "drawn_with.json"]
    assert files_of(tmp_path / "out") == names


def test_a_images_seed_is_of_its_prompt_and_number():
    seeds = {seed_of(prompt, index) for prompt in ("a", "b", "红", "\ud800") for index in range(4)}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seed_of("a", 0) == seed_of("a", 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("genval", "x", "use one of geneval, t2i_compbench"),
        ("geneval", "a photo of a bench\n", "line 1: not JSON"),
        ("geneval", '{"prompt": "a bench"}', "line 1: no 'tag' of type str"),
        ("geneval", '{"prompt": 3, "tag": "x", "include": []}', "line 1: no 'prompt' of type str"),
        ("geneval", "[" * 100_000, "line 1: not JSON"),
        ("geneval", "\n\n", "no prompt in it"),
        ("t2i_compbench", "a dog/a cat\n", "cannot be part of a file name"),
        ("t2i_compbench", "x" * 300, "cannot be part of a file name"),
        ("dpg_bench", '{"id": "../../etc", "prompt": "x"}', "cannot be the name of an image"),
        ("dpg_bench", '{"id": "1", "prompt": "x"}\n{"id": "1", "prompt": "y"}', "two prompts have the same id"),
        ("prompts", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_files_that_are_not_the_benchmarks_are_said(tmp_path, name, content, message):
    file = tmp_path / "file"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        open_benchmark(name, epath.Path(file), 4)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        open_benchmark("geneval", epath.Path(tmp_path / "nothing"), 4)
    with pytest.raises(UserError, match="is a folder"):
        open_benchmark("geneval", epath.Path(tmp_path), 4)
