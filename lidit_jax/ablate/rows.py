"""Rows of the paper's ablation tables (section 5.3), with what each changes and the paper's scores, and rows of ours.

A row uses the base LLM or the multi-modal (instruction-tuned) one. The paper states which for Table 2's baseline, "DiT
with pre-trained LLaMA3-8B", and for Table 4, which has a column for it. For the other rows it is inferred from the
assumption that equal scores are one trained model.

- 38.72/66.15 stands in Table 2 (baseline), Table 3 (LLaMA3 without refiner) and Table 4 (neither tick): base.
- 48.41/73.45 stands in Table 2 (instruction) and Table 4 (both ticks): multi-modal.
- 54.02/77.08, the refiner without the instruction, stands in Tables 2, 3 and 5. Table 3 compares it with the base LLM,
  so it is on the base LLM too, and with it the rest of Tables 3 and 5, Qwen's rows included.
- 56.79/78.62, instruction and refiner, stands in Tables 2 and 6. The instruction row above is multi-modal, so these and
  the rest of Table 6 are too.

Rows of ours ask what the paper does not: they have no scores of the paper and are compared with a row of the paper.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

# Names of the encoders in a config: LLMs after multi-modal instruction tuning, the same before it, and T5.
LLAMA, QWEN = "llama3", "qwen"
BASE_LLAMA, BASE_QWEN = "llama3_base", "qwen_base"
T5 = "t5"
BASE_LLMS = (BASE_LLAMA, BASE_QWEN)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to condition the DiT on prompts; equal rows share one training run, whichever tables they are in.

    Attributes:
      encoders: names, sorted as the model's branches are.
      instruction: True puts the instruction before every prompt (Table 2).
      refiner_blocks, refiner_causal, refiner_gated, fusion: as in `LIDiTConfig`.
      changes: further fields of `LIDiTConfig` as (name, value), for rows of ours.
    """

    encoders: tuple[str, ...]
    instruction: bool = False
    refiner_blocks: int = 0
    refiner_causal: bool = False
    refiner_gated: bool = True
    fusion: str = "collaborative"
    changes: tuple[tuple[str, Any], ...] = ()

    def model(self) -> dict[str, Any]:
        """Returns the fields of the config's `model` section that the row sets."""
        names = ("refiner_blocks", "refiner_causal", "refiner_gated", "fusion")
        return {name: getattr(self, name) for name in names} | dict(self.changes)

    @property
    def name(self) -> str:
        """Name of the row's runs, the same in all tables: "llama3-instruction-2-blocks"."""
        words = ["+".join(self.encoders)]
        words += ["instruction"] * self.instruction
        if self.refiner_blocks:
            words.append(f"{self.refiner_blocks}-block{'s' * (self.refiner_blocks > 1)}")
            words += ["causal"] * self.refiner_causal + ["no-gate"] * (not self.refiner_gated)
        if len(self.encoders) > 1:
            words.append(self.fusion)
        words += [f"{name}={value}" for name, value in self.changes]
        return "-".join(words)


class Scores(NamedTuple):
    """The paper's scores in per cent: mean over T2I-CompBench's three attributes, and DPG-Bench."""

    t2i_compbench: float
    dpg_bench: float


class TableRow(NamedTuple):
    """A row of a table.

    Attributes:
      label: shown in our tables.
      row: what to train.
      paper: the paper's scores; None for a row of ours.
      compared_with: for a row of ours, the name of the row in the same table that it is compared with.
    """

    label: str
    row: Row
    paper: Scores | None
    compared_with: str = ""


_PLAIN = Row((BASE_LLAMA,))
_REFINED = dataclasses.replace(_PLAIN, refiner_blocks=2)
_INSTRUCTED = Row((LLAMA,), instruction=True)
_FULL = dataclasses.replace(_INSTRUCTED, refiner_blocks=2)
_BOTH = dataclasses.replace(_FULL, encoders=(LLAMA, QWEN))

OURS = "ours"  # table of our rows, beside the paper's rows that they are compared with
# Table -> {the row's name in this code: the row}.
TABLES: Mapping[str, Mapping[str, TableRow]] = {
    "2": {
        "baseline": TableRow("baseline", _PLAIN, Scores(38.72, 66.15)),
        "instruction": TableRow("+ instruction", _INSTRUCTED, Scores(48.41, 73.45)),
        "token_refiner": TableRow("+ token refiner", _REFINED, Scores(54.02, 77.08)),
        "instruction_and_token_refiner": TableRow("+ both", _FULL, Scores(56.79, 78.62)),
        "collaborative_refiner": TableRow("+ both, two LLMs, collaborative refiner", _BOTH, Scores(60.31, 80.25)),
    },
    "3": {
        "t5": TableRow("T5", Row((T5,)), Scores(48.82, 73.56)),
        "t5_token_refiner": TableRow("T5 + refiner", Row((T5,), refiner_blocks=2), Scores(49.52, 74.63)),
        "qwen": TableRow("Qwen", Row((BASE_QWEN,)), Scores(38.11, 65.61)),
        "qwen_token_refiner": TableRow("Qwen + refiner", Row((BASE_QWEN,), refiner_blocks=2), Scores(53.81, 76.49)),
        "llama": TableRow("LLaMA", _PLAIN, Scores(38.72, 66.15)),
        "llama_causal_token_refiner": TableRow(
            "LLaMA + refiner, causal", dataclasses.replace(_REFINED, refiner_causal=True), Scores(45.84, 71.01)
        ),
        "llama_token_refiner": TableRow("LLaMA + refiner, full attention", _REFINED, Scores(54.02, 77.08)),
    },
    "4": {
        "base_llm": TableRow("base LLM", _PLAIN, Scores(38.72, 66.15)),
        "base_llm_instruction": TableRow(
            "base LLM + instruction", dataclasses.replace(_PLAIN, instruction=True), Scores(38.47, 65.84)
        ),
        "multimodal_llm": TableRow("multi-modal LLM", Row((LLAMA,)), Scores(44.22, 71.81)),
        "multimodal_llm_instruction": TableRow("multi-modal LLM + instruction", _INSTRUCTED, Scores(48.41, 73.45)),
    },
    "5": {
        "1_block": TableRow("1 block", dataclasses.replace(_REFINED, refiner_blocks=1), Scores(48.25, 73.83)),
        "2_blocks": TableRow("2 blocks", _REFINED, Scores(54.02, 77.08)),
        "3_blocks": TableRow("3 blocks", dataclasses.replace(_REFINED, refiner_blocks=3), Scores(55.13, 77.65)),
        "2_blocks_without_gate": TableRow(
            "2 blocks, no gate", dataclasses.replace(_REFINED, refiner_gated=False), Scores(53.47, 76.68)
        ),
    },
    "6": {
        "llama": TableRow("LLaMA alone", _FULL, Scores(56.79, 78.62)),
        "qwen": TableRow("Qwen alone", dataclasses.replace(_FULL, encoders=(QWEN,)), Scores(56.13, 78.49)),
        "concatenate": TableRow(
            "both, concatenated", dataclasses.replace(_BOTH, fusion="concatenate"), Scores(58.32, 79.04)
        ),
        "collaborative_refiner": TableRow("both, collaborative refiner", _BOTH, Scores(60.31, 80.25)),
    },
    OURS: {
        "token_refiner": TableRow("LLaMA + refiner", _REFINED, Scores(54.02, 77.08)),
        # The refiner's rotary positions are ours: cross-attention to bare features has no positions.
        "refiner_without_rotary": TableRow(
            "LLaMA + refiner without rotary positions",
            dataclasses.replace(_REFINED, changes=(("refiner_rotary", False),)),
            paper=None,
            compared_with="token_refiner",
        ),
        "multimodal_llm_token_refiner": TableRow(
            "multi-modal LLM + refiner",
            dataclasses.replace(_REFINED, encoders=(LLAMA,)),
            paper=None,
            compared_with="token_refiner",
        ),
        "collaborative_refiner": TableRow("+ both, two LLMs, collaborative refiner", _BOTH, Scores(60.31, 80.25)),
        # The paper's only image positions; in all other rows they are those of the config.
        "position_conv": TableRow(
            "the same with position=conv",
            dataclasses.replace(_BOTH, changes=(("position", "conv"),)),
            paper=None,
            compared_with="collaborative_refiner",
        ),
    },
}
# All rows by their names in `configs/ablation.py`: "table2_baseline"; rows of ours by their names alone.
ROWS: Mapping[str, Row] = {
    name if entry.paper is None else f"table{table}_{name}": entry.row
    for table, entries in TABLES.items()
    for name, entry in entries.items()
    if table != OURS or entry.paper is None
}
