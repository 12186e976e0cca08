"""Table 1 of the LI-DiT paper (Ma et al. 2024, arXiv 2406.11831), as data."""

from collections.abc import Mapping

# Each benchmark's columns, in the table's order. GenEval's are fractions, the others per cent.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "t2i_compbench": ("color", "shape", "texture", "spatial"),
    "geneval": ("single", "two", "count", "colors", "position", "attr", "overall"),
    "dpg_bench": ("average",),
}

# Model, T2I-CompBench, GenEval, DPG-Bench; None where the table has no number.
_TABLE_1 = (
    ("SD v1.5", (37.50, 37.24, 41.59, 12.04), (0.97, 0.38, 0.35, 0.76, 0.04, 0.06, 0.43), (63.18,)),
    ("SD v2", (50.65, 42.21, 49.22, 13.42), (0.98, 0.51, 0.44, 0.85, 0.07, 0.17, 0.50), (68.09,)),
    ("SDXL", (63.69, 54.08, 56.37, 20.32), (0.98, 0.74, 0.39, 0.85, 0.15, 0.23, 0.55), (74.65,)),
    ("SD3-1B", None, (0.97, 0.72, 0.52, 0.78, 0.16, 0.34, 0.58), None),
    ("DALL-E 2", (57.50, 54.64, 63.74, 12.83), None, None),
    ("PixArt-alpha", (68.86, 55.82, 70.44, 20.82), (0.98, 0.50, 0.44, 0.80, 0.08, 0.07, 0.48), (71.11,)),
    ("LI-DiT-1B", (74.08, 59.34, 69.59, 27.57), (0.98, 0.69, 0.48, 0.86, 0.22, 0.37, 0.60), (81.65,)),
    ("DALL-E 3", (81.10, 67.50, 80.70, None), (0.96, 0.47, 0.47, 0.83, 0.43, 0.45, 0.67), (83.50,)),
    ("SD3-8B", None, (0.99, 0.94, 0.72, 0.89, 0.33, 0.60, 0.74), None),
    ("LI-DiT-10B", (83.78, 68.03, 78.50, 39.69), (0.99, 0.91, 0.65, 0.91, 0.47, 0.64, 0.76), (84.60,)),
)


def table_1(benchmark: str) -> dict[str, dict[str, float]]:
    """Returns model -> column -> score for the models with scores on this benchmark, in the table's order and units.

    The result is empty for a benchmark that is not in the table.
    """
    if benchmark not in COLUMNS:
        return {}
    index = list(COLUMNS).index(benchmark) + 1
    rows = {row[0]: zip(COLUMNS[benchmark], row[index], strict=True) for row in _TABLE_1 if row[index]}
    return {model: {column: score for column, score in row if score is not None} for model, row in rows.items()}
