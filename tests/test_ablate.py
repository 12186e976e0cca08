"""Tests the miniature ablations: rows, the language models' corpus, runs as processes, and tables."""

import collections
import contextlib
import itertools
import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_config
from etils import epath
from ml_collections import ConfigDict
from scipy import stats

from lidit_jax.ablate import language_models, report, runs
from lidit_jax.ablate.corpus import Corpus, DocumentStream, DocumentTokenizer, describe
from lidit_jax.ablate.language_models import FAMILIES, TUNED, _tokenizer, masked_token_task, next_token_task
from lidit_jax.ablate.report import Mean
from lidit_jax.ablate.rows import BASE_LLMS, OURS, ROWS, T5, TABLES
from lidit_jax.config import build, claim_workdir
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.shapes.layout import SceneLayout
from lidit_jax.data.shapes.source import ShapesSource
from lidit_jax.errors import UserError
from lidit_jax.evaluate.scenes import COUNTS, SCORES_FILE, named_at
from lidit_jax.experiment import Experiment
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.llm import LLMConfig
from lidit_jax.models.t5 import T5Config, T5Encoder
from lidit_jax.text.prompts import INSTRUCTION, PromptTokenizer
from lidit_jax.weights.huggingface_t5 import load_t5_encoder, save_t5_encoder
from lidit_jax.workdir_lock import lock

BASELINE = ROWS["table2_baseline"]
SCENES = ShapesSource(200, seed=7, layout=SceneLayout(shares=(0, 1, 1, 1)))
LANGUAGES = {"en": 0.6, "zh": 0.4}
T5_SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def corpus():
    return Corpus(SCENES, LANGUAGES, 0.5)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return _tokenizer(corpus, INSTRUCTION, 320)


def prompts(tokenizer, instruction, length=300):
    return PromptTokenizer(tokenizer, length, instruction, chat_template=False)


# --- rows --------------------------------------------------------------------------------------------------------


def test_rows_are_one_run_exactly_where_the_papers_scores_are_equal():
    entries = {f"table{table}_{name}": entry for table, rows in TABLES.items() for name, entry in rows.items()}
    of_paper = {name: entry for name, entry in entries.items() if entry.paper is not None}
    for (name, one), (other_name, other) in itertools.combinations(of_paper.items(), 2):
        assert (one.row == other.row) == (one.paper == other.paper), (name, other_name)


def test_rows_of_ours_differ_from_one_of_the_papers_rows_beside_them_and_are_in_no_table_of_the_paper():
    paper = {entry.row for table in TABLES.values() for entry in table.values() if entry.paper is not None}
    own = {name: entry for name, entry in TABLES[OURS].items() if entry.paper is None}
    assert own
    for name, entry in own.items():
        assert TABLES[OURS][entry.compared_with].row in paper
        assert entry.row not in paper
        assert ROWS[name] == entry.row
    assert all(entry.paper for table, rows in TABLES.items() if table != OURS for entry in rows.values())


def test_a_row_of_ours_sets_its_field_and_nothing_else():
    config, out = load_config("ablation_scenes"), epath.Path("/out")
    entry = TABLES[OURS]["refiner_without_rotary"]
    own = runs.run_config(config, runs.Run(entry.row, 5), out)
    other = runs.run_config(config, runs.Run(TABLES[OURS][entry.compared_with].row, 5), out)
    assert own.model.refiner_rotary is False
    assert "refiner_rotary" not in other.model and LIDiTConfig.refiner_rotary
    del own.model.refiner_rotary
    assert own.to_dict() == other.to_dict()


def test_rows_have_one_name_each():
    assert len({row.name for row in ROWS.values()}) == len(set(ROWS.values()))
    assert ROWS["table6_collaborative_refiner"].name == "llama3+qwen-instruction-2-blocks-collaborative"
    assert BASELINE.name == "llama3_base"


def test_the_instruction_goes_with_the_multimodal_llm_in_all_tables_but_the_one_about_it():
    for name, row in ((name, row) for name, row in ROWS.items() if name not in TABLES[OURS]):
        is_base = bool(set(row.encoders) & set(BASE_LLMS))
        if row.encoders != (T5,) and not name.startswith("table4_"):
            assert is_base == (not row.instruction), name
    table_4 = {(row.encoders, row.instruction) for name, row in ROWS.items() if name.startswith("table4_")}
    assert table_4 == set(itertools.product([("llama3",), ("llama3_base",)], [False, True]))


def test_jobs_are_found_by_the_names_they_print():
    jobs = [runs.SharedNetwork(name, 3) for name in ("vae", "llama3", "llama3_base", "qwen", "qwen_base", "t5")]
    jobs += [runs.Run(row, 2) for row in ROWS.values()]
    for job in jobs:
        assert runs.find_job(str(job)) == job


@pytest.mark.parametrize("name", ["llama3", "llama3/x", "llama2/0", "parts/0/nothing", "parts/vae", "parts/x/vae", ""])
def test_a_job_that_is_none_is_refused(name):
    with pytest.raises(UserError, match="name ROW/SEED"):
        runs.find_job(name)


def test_a_run_differs_from_another_by_its_row_and_seed_alone():
    config = load_config("ablation_scenes")
    run = runs.run_config(config, runs.Run(ROWS["table2_collaborative_refiner"], 5), epath.Path("/out"))
    assert run.seed == 5
    assert run.text.instruction == INSTRUCTION
    assert list(run.encoders) == ["llama3", "qwen"]
    assert run.encoders.qwen.weights == "/out/parts/5/encoders/qwen"
    assert run.model.refiner_blocks == 2
    baseline = runs.run_config(config, runs.Run(BASELINE, 5), epath.Path("/out"))
    assert baseline.encoders.to_dict() == {
        "llama3_base": {"weights": "/out/parts/5/encoders/llama3_base", "dtype": "float32"}
    }
    assert baseline.text.instruction == ""
    assert baseline.model.refiner_blocks == 0
    for section in ("data", "train", "diffusion", "sample", "evaluate", "vae"):
        assert run[section] == baseline[section]
    assert run.vae.weights == "/out/parts/5/vae"
    assert [str(part) for part in runs.Run(BASELINE, 5).parts()] == ["parts/5/vae", "parts/5/llama3_base"]


def test_seeds_change_the_shared_networks_too():
    config = load_config("ablation_scenes")
    one, other = (runs.parts_config(config, seed) for seed in (0, 1))
    assert (one.seed, other.seed) == (0, 1)
    del one.seed, other.seed
    assert one == other


def test_a_run_begins_once_its_networks_are_there(tmp_path):
    out, rows = epath.Path(tmp_path), (BASELINE, ROWS["table3_t5"])
    wanted = [runs.Run(row, seed) for seed in range(2) for row in rows]
    waiting = list(dict.fromkeys(job for run in wanted for job in (*run.parts(), run)))
    assert len(waiting) == 2 * (3 + 2)
    first = runs._take_ready(waiting, 2, out)
    assert list(map(str, first)) == ["parts/0/vae", "parts/0/llama3_base"]
    assert not runs._take_ready(waiting, 0, out)
    for job in first:
        job.folder(out).mkdir(parents=True)
    assert list(map(str, runs._take_ready(waiting, 2, out))) == ["llama3_base/0", "parts/0/t5"]
    runs.SharedNetwork("t5", 0).folder(out).mkdir(parents=True)
    assert list(map(str, runs._take_ready(waiting, 9, out))) == [
        "t5/0",
        "parts/1/vae",
        "parts/1/llama3_base",
        "parts/1/t5",
    ]
    assert list(map(str, waiting)) == ["llama3_base/1", "t5/1"]


# --- captions of the full-scale rows ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captions", "shares"),
    [
        ({"txt": "alt text", "synthetic": "a long text"}, {"alt text": 0.5, "a long text": 0.5}),
        ({"class": "tench", "synthetic": "a long text"}, {"a photo of tench": 0.5, "a long text": 0.5}),
        ({"txt": "alt text"}, {"alt text": 1.0}),
        ({"class": "tench"}, {"a photo of tench": 1.0}),
        ({"synthetic": "a long text", "license": "CC0"}, {"a long text": 1.0}),
        ({"class": "tench", "synthetic": " "}, {"a photo of tench": 1.0}),
    ],
    ids=["CC12M", "ImageNet", "CC12M without synthetic", "ImageNet without synthetic", "synthetic alone", "blank"],
)
def test_original_and_synthetic_captions_are_mixed_where_a_sample_has_both(captions, shares):
    config = load_config("ablation", "table2_baseline")
    config.data.path = "shards"
    choose, rng = build(DataConfig, config.data, "data").chooser(0.0), np.random.default_rng(0)
    counts = collections.Counter(choose(captions, rng) for _ in range(2000))
    assert {text: count / 2000 for text, count in counts.items()} == pytest.approx(shares, abs=0.04)


def test_a_base_llm_gets_the_instruction_as_plain_text():
    for row, is_tuned in (("table4_base_llm_instruction", False), ("table4_multimodal_llm_instruction", True)):
        text = load_config("ablation", row).text
        assert (text.instruction, text.chat_template) == (INSTRUCTION, is_tuned)
    assert load_config("ablation", "table2_baseline").text.instruction == ""


# --- training text of the language models -----------------------------------------------------------------------


def test_a_description_names_every_object_in_the_captions_order(corpus):
    source = ShapesSource(20, seed=7, num_objects=4)
    for index in range(len(source)):
        scene = source.scene(index)
        parts = describe(scene).split(", ")
        for item, part in zip(scene.objects, parts, strict=True):
            assert part.startswith(f"a {item.size} {item.color} {item.shape} at the ")
            assert ("left" in part) == (item.x < 0.5)
            assert ("top" in part) == (item.y < 0.5)


def test_half_of_the_documents_follow_the_instruction_and_all_are_functions_of_their_number(corpus):
    documents = [corpus[i] for i in range(len(corpus))]
    assert documents == [corpus[i] for i in range(len(corpus))]
    assert 0.35 < np.mean([bool(document.answer) for document in documents]) < 0.65


def test_base_models_read_the_same_captions_and_no_instruction(corpus):
    base = Corpus(SCENES, LANGUAGES, 0.0)
    assert [base[i].caption for i in range(len(base))] == [corpus[i].caption for i in range(len(corpus))]
    assert not any(base[i].answer for i in range(len(base)))
    assert base.fingerprint != corpus.fingerprint
    assert {name for name in FAMILIES if name not in TUNED} == {*BASE_LLMS, T5}


class Recorded(Exception):
    """Stops `train_encoder` before it trains."""


def test_base_and_tuned_models_differ_in_their_documents_alone(tmp_path, monkeypatch):
    config, seen = load_config("ablation_scenes"), {}
    config.data.num_examples = 500

    def record(experiment, task, training, batches, mesh, rules, provenance, later_steps):
        with contextlib.closing(batches(0)) as stream:
            seen[task.name] = experiment.config.seed, training, provenance["data"], next(stream)
        raise Recorded

    monkeypatch.setattr(language_models, "train_network", record)
    monkeypatch.setattr(language_models, "TOKENIZER_DOCUMENTS", 200)
    parts = Experiment(runs.parts_config(config, 0), epath.Path(tmp_path))
    for name in FAMILIES:
        with pytest.raises(Recorded):
            language_models.train_encoder(parts, name, config.language_models, None, None)
    (seed, training, tuned_on, tuned), (base_seed, base_training, base_on, base) = seen["llama3"], seen["llama3_base"]
    assert (seed, training) == (base_seed, base_training)
    assert tuned_on != base_on
    is_plain = (tuned["tokens"] == base["tokens"]).all(axis=1)
    assert 0 < is_plain.sum() < len(is_plain)  # documents without the instruction are equal
    assert (tuned["mask"].sum(1) > base["mask"].sum(1))[~is_plain].all()
    for name, like in (("qwen", "llama3"), ("qwen_base", "llama3_base"), ("t5", "llama3_base")):
        np.testing.assert_array_equal(seen[name][-1]["tokens"], seen[like][-1]["tokens"])
    other = Experiment(runs.parts_config(config, 1), epath.Path(tmp_path))
    with pytest.raises(Recorded):
        language_models.train_encoder(other, "llama3", config.language_models, None, None)
    assert seen["llama3"][0] == seed + 1 and seen["llama3"][2] != tuned_on  # another seed has another corpus


def test_settings_of_an_older_config_are_rejected(tmp_path):
    config = load_config("ablation_scenes")
    del config.language_models.instructed_share
    parts = Experiment(runs.parts_config(config, 0), epath.Path(tmp_path))
    with pytest.raises(UserError, match="language_models.instructed_share is missing"):
        language_models.train_encoder(parts, "llama3_base", config.language_models, None, None)


def test_documents_begin_with_the_tokens_that_prompts_are_encoded_with(corpus, tokenizer):
    plain, instructed = prompts(tokenizer, ""), prompts(tokenizer, INSTRUCTION)
    documents = [corpus[i] for i in range(20)]
    found = DocumentTokenizer(plain, instructed, 300)(documents)
    for document, tokens, mask in zip(documents, found["tokens"], found["mask"], strict=True):
        of_prompt = instructed if document.answer else plain
        encoded = of_prompt([document.caption])
        begin = [*of_prompt.prefix(), *encoded["tokens"][0][encoded["mask"][0]]]
        assert tokens[: len(begin)].tolist() == begin
        assert bool(document.answer) == (mask.sum() > len(begin))
        assert tokens[mask.sum() - 1] == tokenizer.eos_token_id
        assert tokenizer.mask_token_id not in tokens


def test_the_stream_resumes_at_any_batch_and_hosts_share_its_rows(corpus, tokenizer):
    documents = DocumentTokenizer(prompts(tokenizer, ""), prompts(tokenizer, INSTRUCTION), 300)
    whole = DocumentStream(corpus, documents, 8, 0, range(8))
    batches = [next(whole) for _ in range(3)]
    later = DocumentStream(corpus, documents, 8, 0, range(8))
    later.restore([{**whole.get_state(), "next_batch": 2}])
    np.testing.assert_array_equal(next(later)["tokens"], batches[2]["tokens"])
    half = DocumentStream(corpus, documents, 8, 1, range(4, 8))
    np.testing.assert_array_equal(next(half)["tokens"], batches[1]["tokens"][4:])
    for stream in (whole, later, half):
        stream.close()


@pytest.mark.parametrize("kind", ["next", "masked"])
def test_padding_is_not_trained_on(kind):
    if kind == "next":
        config = LLMConfig(64, 16, 24, 3, 2, 1, tie_word_embeddings=True, dtype="float32")
        task = next_token_task("lm", config)
    else:
        task = masked_token_task("t5", T5Config(vocab_size=64, **T5_SIZES), 63)
    params = jax.tree.map(lambda x: x.unbox(), task.init(jax.random.key(0)), is_leaf=lambda x: hasattr(x, "unbox"))
    tokens = np.random.default_rng(0).integers(0, 60, (4, 12)).astype(np.int32)
    mask = np.arange(12) < np.array([12, 7, 4, 9])[:, None]

    def loss(tokens):
        return task.loss(params, None, {"tokens": tokens, "mask": mask}, jax.random.key(1), 0)[0].mean

    first = loss(jnp.asarray(tokens))
    assert np.isfinite(first)
    assert first == pytest.approx(float(loss(jnp.where(mask, tokens, 5))), rel=1e-6)
    assert first != pytest.approx(float(loss(jnp.where(mask, 5, tokens))), rel=1e-3)


def test_a_trained_t5_is_read_by_transformers_and_by_us(tmp_path, tokenizer):
    import torch
    import transformers

    config = T5Config(vocab_size=320, **T5_SIZES)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 9)).astype(np.int32)
    mask = np.arange(9) < np.array([9, 5])[:, None]
    model = T5Encoder(config)
    params = model.init(jax.random.key(0), tokens, mask)["params"]
    save_t5_encoder(tmp_path / "t5", config, params, tokenizer)
    with pytest.raises(UserError, match="t5"):
        save_t5_encoder(tmp_path / "t5", config, params, tokenizer)
    ours, loaded = load_t5_encoder(tmp_path / "t5")
    assert ours == config
    features = model.apply({"params": loaded}, tokens, mask)
    torch_model = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5")
    with torch.no_grad():
        theirs = torch_model(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    np.testing.assert_allclose(np.asarray(features)[mask], theirs[mask], atol=2e-5)


# --- tables ------------------------------------------------------------------------------------------------------


def test_intervals_are_students():
    assert Mean((1.0, 2.0, 3.0)).half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
    assert str(Mean((1.0, 2.0, 3.0))) == "2.0 ± 2.5"
    assert str(Mean((2.0,))) == "2.0"


@pytest.mark.parametrize(
    ("difference", "words"),
    [((5.0, 6.0, 7.0), "yes"), ((-5.0, -6.0, -7.0), "**reversed**"), ((-1.0, 1.0, 2.0), "inconclusive")],
)
def test_an_ordering_appears_only_outside_of_its_interval(difference, words):
    mean, single = Mean(difference), Mean(difference[:1])
    assert report.verdict(mean, mean.p_value) == words
    assert (mean.p_value < 0.05) == (abs(mean.value) > mean.half_width)
    assert report.verdict(single, single.p_value) == "inconclusive"
    assert report.verdict(mean, 0.06) == "inconclusive"  # after the correction


def test_a_p_value_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 5), rng.normal(0, 1, 5)
    assert (Mean(tuple(a)) - Mean(tuple(b))).p_value == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert (Mean((2.0, 2.0)).p_value, Mean((0.0, 0.0)).p_value) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the example of R's p.adjust(method="holm")
        ([0.9, 0.8, 0.02], [1.0, 1.0, 0.06]),
        ([0.02], [0.02]),
        ([], []),
        ([float("nan")] * 2, [float("nan")] * 2),
    ],
)
def test_p_values_are_corrected_by_holms_method(p_values, corrected):
    np.testing.assert_allclose(report.holm(p_values), corrected)


def test_orderings_are_the_papers():
    found = [(worse.label, better.label) for worse, better in report.orderings(TABLES["2"])]
    assert ("baseline", "+ instruction") in found
    assert len(found) == 10
    assert ("LLaMA", "T5") in [(worse.label, better.label) for worse, better in report.orderings(TABLES["3"])]


def write_scores(out, row, seed, right):
    """Writes scores with `right` of 100 correct in every group, and 20 fewer for objects named 4th."""
    groups = ["all scenes", "the held-out pair itself", *(named_at(COUNTS[4], place) for place in range(4))]
    names = ("objects", "pair", "scenes")
    workdir = runs.Run(row, seed).workdir(out)
    workdir.mkdir(parents=True)
    cells = {group: {"correct": right - 20 * ("4th" in group), "total": 100, "interval": [0, 1]} for group in groups}
    scores = {group: dict.fromkeys(names, cell) for group, cell in cells.items()}
    (workdir / SCORES_FILE).write_text(json.dumps(scores))


def test_tables_say_what_the_runs_scored(tmp_path):
    out = epath.Path(tmp_path)
    tables = report.choose(["2", "figure3"])
    rows = dict.fromkeys(entry.row for table in tables.values() for entry in table.values())
    for place, row in enumerate(rows):
        for seed in range(3):
            write_scores(out, row, seed, 40 + 5 * place + seed)
    report.write(out, tables, 3)
    text = (out / "tables.md").read_text()
    scores = "41.0 ± 2.5 | 41.0 ± 2.5 | 41.0 ± 2.5 | 41.0 ± 2.5 | 40.0, 41.0, 42.0 | 38.72 | 66.15"
    assert f"| baseline | base LLaMA | {scores} |" in text
    assert "| + both, two LLMs, collaborative refiner | tuned LLaMA and tuned Qwen |" in text
    assert "| + instruction over baseline | +9.69 | +5.0 ± 0.0 | 3 of 3 | +5.0 ± 0.0 | < 0.001 | yes |" in text
    assert "| base LLaMA | 41.0 ± 2.5 | 41.0 ± 2.5 | 41.0 ± 2.5 | 21.0 ± 2.5 | -20.0 ± 0.0 |" in text
    assert json.loads((out / "tables.json").read_text())["rows"]["llama3_base"]["pairs"] == [40.0, 41.0, 42.0]
    for name in ("table2.png", "figure3.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_table_marks_rows_of_ours_and_compares_them_with_the_papers(tmp_path):
    out = epath.Path(tmp_path)
    tables = report.choose([OURS])
    for place, entry in enumerate(tables[OURS].values()):
        for seed in range(3):
            write_scores(out, entry.row, seed, 40 + 5 * place + seed)
    report.write(out, tables, 3)
    text = (out / "tables.md").read_text()
    scores = "46.0 ± 2.5 | 46.0 ± 2.5 | 46.0 ± 2.5 | 46.0 ± 2.5 | 45.0, 46.0, 47.0"
    assert f"| LLaMA + refiner without rotary positions | base LLaMA | {scores} | ours | ours |" in text
    assert "| LLaMA + refiner without rotary positions, LLaMA + refiner | +5.0 ± 0.0 | 3 of 3 | +5.0 ± 0.0 |" in text
    assert "over LLaMA + refiner without" not in text  # the paper has no ordering of it
    assert (out / "ours.png").read_bytes().startswith(b"\x89PNG")


def test_every_row_has_its_own_description():
    labels = {row: report.describe(row) for row in ROWS.values()}
    assert len(set(labels.values())) == len(labels)
    assert labels[ROWS["table3_llama_causal_token_refiner"]] == "base LLaMA + causal refiner"
    assert labels[ROWS["table5_2_blocks_without_gate"]] == "base LLaMA + refiner without gate"
    assert labels[ROWS["refiner_without_rotary"]] == "base LLaMA + refiner + refiner_rotary=False"
    assert labels[ROWS["table6_qwen"]] == "tuned Qwen + instruction + refiner"


@pytest.mark.parametrize("names", [["7"], ["2", "x"]])
def test_an_unknown_table_is_rejected(names):
    with pytest.raises(UserError, match="choose from 2, 3, 4, 5, 6, ours, figure3"):
        report.choose(names)


# --- the command ------------------------------------------------------------------------------------------------


def tiny_flags() -> list[str]:
    counts = [f"--config.evaluate.{kind}=4" for kind in load_config("ablation_scenes").evaluate]
    small = {
        "data.num_examples": 500,
        "language_models.model.hidden_size": 16,
        "language_models.model.intermediate_size": 24,
        "language_models.model.num_hidden_layers": 3,
        "language_models.model.num_attention_heads": 2,
        "language_models.model.num_key_value_heads": 1,
        "language_models.t5.d_model": 16,
        "language_models.t5.num_layers": 1,
        "language_models.t5.num_heads": 2,
        "language_models.train.steps": 2,
        "language_models.train.batch_size": 8,
        "vae.train.steps": 2,
        "model.depth": 1,
        "model.hidden_size": 16,
        "model.scan_unroll": 1,
        "train.steps": 3,
        "train.tensorboard": "False",
        "vae.train.tensorboard": "False",
        "language_models.train.tensorboard": "False",
        "train.batch_size": 8,
        "sample.steps": 2,
        "sample.batch_size": 8,
    }
    return [*counts, *(f"--config.{key}={value}" for key, value in small.items())]


def ablate(*arguments):
    command = [sys.executable, "-m", "lidit_jax.ablate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


def test_what_is_wrong_is_said_in_one_line_before_anything_is_trained(tmp_path):
    found = ablate("--table=2", "--seeds=0", f"--out={tmp_path}/a")
    assert (found.returncode, found.stderr) == (2, "error: flag --seeds=0: 0 is not a positive integer\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text(json.dumps({"seed": 1}))
    found = ablate("--table=2", f"--out={tmp_path}/b")
    assert found.returncode == 2
    assert "was created with another config" in found.stderr
    for out, words in (("gs://bucket/a", "local folders only"), (ROOT / "setup.py", "is a file: name a folder")):
        found = ablate("--table=ours", f"--out={out}")
        assert found.returncode == 2
        assert words in found.stderr
    assert not (tmp_path / "a").exists()
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["config.json"]


@pytest.mark.slow
def test_a_table_is_made_and_made_again_without_training(tmp_path):
    out = tmp_path / "out"
    arguments = ["--table=figure3", "--seeds=1", f"--out={out}", "--jobs=2", *tiny_flags()]
    found = ablate(*arguments)
    assert found.returncode == 0, found.stderr
    rows = ("llama3_base", "llama3_base-2-blocks", "t5")
    assert sorted(path.name for path in (out / "runs").iterdir()) == sorted(rows)
    first = (out / "tables.json").read_text()
    stamps = [(out / "runs" / row / "0" / "scores.json").stat().st_mtime_ns for row in rows]
    assert ablate(*arguments).returncode == 0
    assert stamps == [(out / "runs" / row / "0" / "scores.json").stat().st_mtime_ns for row in rows]
    assert (out / "tables.json").read_text() == first
    another = ablate(*arguments, "--config.train.steps=4")
    assert another.returncode == 2
    assert "train.steps was 3, now 4" in another.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.__delitem__("language_models"), "no language_models or no evaluate"),
        (lambda config: config.evaluate.update(four_objects=0), "four_objects=0"),
        (lambda config: config.model.update(hidden_size=127), "model.hidden_size=127"),
        (lambda config: config.language_models.model.update(num_hidden_layers=2), "at least 3 blocks"),
        (lambda config: config.language_models.train.update(stepz=1), "language_models.train.stepz is unknown"),
        (lambda config: config.language_models.update(instructed_share=0.0), "instructed_share=0.0 is a share"),
        (lambda config: config.data.update(object_shares=(0, 1)), "1, 2, 3 and 4 objects"),
    ],
)
def test_a_config_that_cannot_be_trained_is_refused_before_anything_is_written(tmp_path, change, words):
    config = load_config("ablation_scenes")
    with config.language_models.train.unlocked():
        change(config)
    out = epath.Path(tmp_path / "out")
    with pytest.raises(UserError, match=words):
        runs.run_all(config, out, [runs.Run(BASELINE, 0)], 1)
    assert not out.exists()


def test_runs_that_are_judged_otherwise_are_not_put_into_one_table(tmp_path):
    config, out = load_config("ablation_scenes"), epath.Path(tmp_path / "out")
    claim_workdir(out, config, may_grow=False)
    config.evaluate.four_objects = 8
    with pytest.raises(UserError, match="evaluate.four_objects was 512, now 8"):
        runs.run_all(config, out, [runs.Run(BASELINE, 0)], 1)


def test_after_its_hours_the_runs_are_stopped(tmp_path, monkeypatch):
    started = []

    def start(job, out):
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[-1]

    monkeypatch.setattr(runs, "_start", start)
    out = epath.Path(tmp_path / "out")
    assert not runs.run_all(load_config("ablation_scenes"), out, [runs.Run(BASELINE, 0)], 1, hours=0.001)
    assert [process.poll() for process in started] == [-signal.SIGTERM]


def test_seeds_count_as_complete_if_no_row_lacks_them(tmp_path):
    out, tables = epath.Path(tmp_path), report.choose(["figure3"])
    rows = [entry.row for entry in tables["figure3"].values()]
    assert report.complete_seeds(out, tables, 3) == 0
    for row, seeds in zip(rows, (3, 2, 1), strict=True):
        for seed in range(seeds):
            write_scores(out, row, seed, 40)
    assert report.complete_seeds(out, tables, 3) == 1
    write_scores(out, rows[2], 1, 40)
    assert [report.complete_seeds(out, tables, seeds) for seeds in (1, 2, 3)] == [1, 2, 2]


def test_two_processes_do_not_train_the_same(tmp_path):
    out, job = epath.Path(tmp_path / "out"), runs.SharedNetwork("vae", 0)
    claim_workdir(out, load_config("ablation_scenes"))
    with (
        lock(job.log(out).with_suffix(".lock"), "it"),
        pytest.raises(UserError, match="parts/0/vae is in use by process"),
    ):
        runs.run_job(out, job)


@pytest.mark.parametrize("text", ["{", "[]", '{"all scenes": {"pair": {"correct": 1, "total": 0}}}'])
def test_damaged_scores_are_said_in_one_line(tmp_path, text):
    out, row = epath.Path(tmp_path), BASELINE
    workdir = runs.Run(row, 0).workdir(out)
    workdir.mkdir(parents=True)
    (workdir / SCORES_FILE).write_text(text)
    with pytest.raises(UserError, match="remove it to evaluate its run again"):
        report.Result.read(out, row, 1)


def test_a_folder_that_is_none_of_ablations_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ConfigDict({"seed": 0}).to_dict()))
    with pytest.raises(UserError, match="is not a folder of ablations"):
        runs.run_job(epath.Path(tmp_path), runs.SharedNetwork("vae", 0))


def test_the_papers_position_embedding_has_a_row_of_its_own():
    row, full = load_config("ablation", "position_conv"), load_config("ablation", "table2_collaborative_refiner")
    assert row.model.position == "conv"
    assert full.model.position == LIDiTConfig.position != "conv"
    row.model.position = full.model.position
    assert row.to_dict() == full.to_dict()
