"""Reads DPG-Bench's questions from the official dpg_bench.csv."""

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping

from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.files import read_text

MAX_FIELD = 1 << 16  # characters
ID, NUMBER, PARENTS, TUPLE, TEXT = COLUMNS = (
    "item_id",
    "proposition_id",
    "dependency",
    "tuple",
    "question_natural_language",
)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a prompt's images.

    Attributes:
      text: such as "Is the cat black?".
      parents: numbers of the questions that must be answered "yes" for this one to count.
      category: level-2 category, such as "attribute - color".
    """

    text: str
    parents: tuple[int, ...]
    category: str

    @property
    def broad_category(self) -> str:
        """Level-1 category, such as "attribute"."""
        return self.category.split("-")[0].strip()


# Number -> question, in the file's order: `dpg.image_score` depends on it.
Questions = Mapping[int, Question]


def read_questions(file: epath.Path) -> tuple[dict[str, Questions], str]:
    """Reads the official dpg_bench.csv.

    Returns:
      Prompt's id -> questions, and the id of the prompt of the file's first question.

    Raises:
      UserError: there is no such file, or it is not dpg_bench.csv.
    """
    if not file.is_file():
        raise UserError(f"--questions={file}: no such file: name dpg_bench.csv of TencentQQGYLab/ELLA")
    text = read_text(file, f"--questions={file}", "dpg_bench.csv")
    prompts: dict[str, dict[int, Question]] = {}
    for line, row in _rows(file, text):
        prompts.setdefault(row[ID], {})[_number(file, line, row[NUMBER])] = Question(
            row[TEXT].strip(),
            tuple(n for n in (_number(file, line, field) for field in row[PARENTS].split(",")) if n),
            row[TUPLE].split("(")[0].strip(),
        )
    if not prompts:
        raise UserError(f"--questions={file}: it has no questions: name dpg_bench.csv of TencentQQGYLab/ELLA")
    return prompts, next(iter(prompts))


def _rows(file: epath.Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (number of the last line, from 1; column -> value) of each row.

    Raises:
      UserError: a column is missing or empty, or the file is no CSV.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(MAX_FIELD)
    try:
        missing = sorted(set(COLUMNS) - set(reader.fieldnames or ()))
        if missing:
            raise UserError(f"--questions={file}: no column {missing[0]!r}; is it dpg_bench.csv?")
        for row in reader:
            if any(not row.get(column) for column in COLUMNS):
                raise UserError(f"--questions={file}, line {reader.line_num}: a column is empty; is it dpg_bench.csv?")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"--questions={file}, line {reader.line_num}: {error}; is it dpg_bench.csv?") from None
    finally:
        csv.field_size_limit(limit)


def _number(file: epath.Path, line: int, text: str) -> int:
    text = text.strip().removesuffix(".0")  # pandas writes integers so if the column has gaps
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise UserError(f"--questions={file}, line {line}: {text!r:.40} is not a question's number")
    return int(text)
