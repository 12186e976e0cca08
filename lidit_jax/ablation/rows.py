"""The rows of the paper's ablation tables: what each changes, and what the paper measured."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

LLAMA, QWEN, T5, BASE_LLAMA = "llama3", "qwen", "t5", "llama3_base"


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to give prompts to the DiT.

    Attributes:
      encoders: in the order of their names, which is that of the model's branches.
      instruction: whether prompts follow the instruction (Table 2).
      refiner_blocks, refiner_causal, refiner_gated, fusion: as in `LIDiTConfig`.
    """

    encoders: tuple[str, ...] = (LLAMA,)
    instruction: bool = False
    refiner_blocks: int = 0
    refiner_causal: bool = False
    refiner_gated: bool = True
    fusion: str = "collaborative"

    def model(self) -> dict[str, Any]:
        """What goes under `model` in a config."""
        names = ("refiner_blocks", "refiner_causal", "refiner_gated", "fusion")
        return {name: getattr(self, name) for name in names}

    @property
    def name(self) -> str:
        """Of what it is, whichever table it stands in: "llama3-instruction-2-blocks"."""
        words = ["+".join(self.encoders)]
        words += ["instruction"] * self.instruction
        if self.refiner_blocks:
            words.append(f"{self.refiner_blocks}-block{'s' * (self.refiner_blocks > 1)}")
            words += ["causal"] * self.refiner_causal + ["no-gate"] * (not self.refiner_gated)
        if len(self.encoders) > 1:
            words.append(self.fusion)
        return "-".join(words)


class Scores(NamedTuple):
    """The paper's, in per cent: mean of T2I-CompBench's three attributes, and DPG-Bench."""

    t2i_compbench: float
    dpg_bench: float


class TableRow(NamedTuple):
    """A row as the paper's table has it."""

    label: str
    row: Row
    paper: Scores


_PLAIN = Row()
_REFINED = Row(refiner_blocks=2)
_FULL = Row(refiner_blocks=2, instruction=True)
_BOTH = dataclasses.replace(_FULL, encoders=(LLAMA, QWEN))

# Table -> {its row's name here: the row}.
TABLES: Mapping[str, Mapping[str, TableRow]] = {
    "2": {
        "baseline": TableRow("baseline", _PLAIN, Scores(38.72, 66.15)),
        "instruction": TableRow("+ instruction", Row(instruction=True), Scores(48.41, 73.45)),
        "token_refiner": TableRow("+ token refiner", _REFINED, Scores(54.02, 77.08)),
        "instruction_and_token_refiner": TableRow("+ both", _FULL, Scores(56.79, 78.62)),
        "collaborative_refiner": TableRow("+ both, two LLMs, collaborative refiner", _BOTH, Scores(60.31, 80.25)),
    },
    "3": {
        "t5": TableRow("T5", Row((T5,)), Scores(48.82, 73.56)),
        "t5_token_refiner": TableRow("T5 + refiner", Row((T5,), refiner_blocks=2), Scores(49.52, 74.63)),
        "qwen": TableRow("Qwen", Row((QWEN,)), Scores(38.11, 65.61)),
        "qwen_token_refiner": TableRow("Qwen + refiner", Row((QWEN,), refiner_blocks=2), Scores(53.81, 76.49)),
        "llama": TableRow("LLaMA", _PLAIN, Scores(38.72, 66.15)),
        "llama_causal_token_refiner": TableRow(
            "LLaMA + refiner, causal", dataclasses.replace(_REFINED, refiner_causal=True), Scores(45.84, 71.01)
        ),
        "llama_token_refiner": TableRow("LLaMA + refiner, full attention", _REFINED, Scores(54.02, 77.08)),
    },
    "4": {
        "base_llm": TableRow("base LLM", Row((BASE_LLAMA,)), Scores(38.72, 66.15)),
        "base_llm_instruction": TableRow(
            "base LLM + instruction", Row((BASE_LLAMA,), instruction=True), Scores(38.47, 65.84)
        ),
        "multimodal_llm": TableRow("multi-modal LLM", _PLAIN, Scores(44.22, 71.81)),
        "multimodal_llm_instruction": TableRow(
            "multi-modal LLM + instruction", Row(instruction=True), Scores(48.41, 73.45)
        ),
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
}
# Every row by "table2_baseline", as `configs/ablation.py` names it.
ROWS: Mapping[str, Row] = {
    f"table{table}_{name}": entry.row for table, entries in TABLES.items() for name, entry in entries.items()
}
