"""Shows answers of language models side by side: as text, JSON and an image."""

import dataclasses
import itertools
from collections.abc import Sequence

from etils import epath
from PIL import Image

from lidit_jax.describe.answers import Answer, DescribeRequest
from lidit_jax.errors import cannot_write
from lidit_jax.files import created_folder, write_bytes, write_json
from lidit_jax.images import save_png, text_table

JSON_FILE, TEXT_FILE, IMAGE_FILE = "describe.json", "describe.txt", "describe.png"
_LABEL_WIDTH, _ANSWER_WIDTH = 110, 320  # pixels
_MAX_SHOWN = 50  # prompts in the image
_NOTHING = "(nothing)"


def write_answers(answers: Sequence[Answer], request: DescribeRequest, out: epath.Path) -> None:
    """Writes `describe.json`, `describe.txt` and `describe.png` into the folder.

    Raises:
      UserError: the folder cannot be written.
    """
    values = dataclasses.asdict(request) | {"image": request.image and str(request.image)}
    try:
        with created_folder(out):
            write_json(out / JSON_FILE, {**values, "answers": [dataclasses.asdict(answer) for answer in answers]})
            write_bytes(out / TEXT_FILE, f"{format_answers(answers)}\n".encode())
            save_png(draw_answers(answers), out / IMAGE_FILE)
    except OSError as error:
        raise cannot_write(f"--out={out}", error) from error


def format_answers(answers: Sequence[Answer]) -> str:
    """Formats the answers by prompt, then by model; control characters are replaced."""
    lines: list[str] = []
    for prompt, of_prompt in _by_prompt(answers):
        lines += [*([""] if lines else []), f"prompt: {_printable(prompt)}"]
        for answer in of_prompt:
            cut = "" if answer.complete else f" [cut off after {answer.tokens} tokens]"
            text = _printable(answer.text or _NOTHING).replace("\n", "\n      ")
            lines += [f"  {answer.weights}, {_label(answer)}:", f"      {text}{cut}"]
    return "\n".join(lines)


def draw_answers(answers: Sequence[Answer]) -> Image.Image:
    """Draws a table with a column for each model: for each prompt its answers alone and after the instruction.

    Returns:
      An RGB image; of more than 50 prompts, it shows the first 50.
    """
    models = list(dict.fromkeys(answer.weights for answer in answers))
    rows: list[list[str]] = [["", *(epath.Path(name).name or name for name in models)]]
    for prompt, of_prompt in itertools.islice(_by_prompt(answers), _MAX_SHOWN):
        rows.append([prompt or "(empty prompt)"])
        by_label: dict[str, dict[str, str]] = {}
        for answer in of_prompt:
            by_label.setdefault(_label(answer), {})[answer.weights] = (answer.text or _NOTHING) + (
                "" if answer.complete else " …"
            )
        rows += [[label, *(texts.get(name, "") for name in models)] for label, texts in by_label.items()]
    return text_table(rows, [_LABEL_WIDTH, *[_ANSWER_WIDTH] * len(models)])


def _by_prompt(answers: Sequence[Answer]) -> list[tuple[str, list[Answer]]]:
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.prompt, []).append(answer)
    return list(found.items())


def _label(answer: Answer) -> str:
    return "with instruction" if answer.instruction else "prompt alone"


def _printable(text: str) -> str:
    """Replaces control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
