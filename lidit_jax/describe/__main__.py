"""Shows what language models generate for a prompt, alone and after the instruction (Figure 4 of the paper).

    python -m lidit_jax.describe --weights=LLAMA_FOLDER --weights=T5_FOLDER --prompt="a blue backpack and a red orange"

--weights takes a folder in Hugging Face's format, or a model's name on the hub, and may be repeated: LLMs with a head,
T5s with a decoder, and vision-language models, which can be given an --image too. A chat model answers after its chat
template, with the tokens that LI-DiT's encoder reads before the prompt; any other model continues the text. Answers are
the most likely ones (greedy decoding). With --out the answers are also written there, as describe.json, describe.txt
and describe.png.
"""

from absl import flags
from etils import epath

from lidit_jax import cli

_WEIGHTS = flags.DEFINE_multi_string("weights", [], "folder of a model, or its name on the hub; may be repeated")
_PROMPT = flags.DEFINE_string("prompt", None, "prompt that the models are given")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "UTF-8 text file, one prompt per line, in place of --prompt")
_INSTRUCTION = flags.DEFINE_string(
    "instruction", None, "text before the prompt (default: the paper's); --instruction= gives the prompts alone"
)
_SYSTEM_PROMPT = flags.DEFINE_string("system_prompt", "", "text before the instruction, in a turn of its own")
_CHAT_TEMPLATE = flags.DEFINE_bool("chat_template", True, "use the tokenizer's chat template if it has one")
_IMAGE = flags.DEFINE_string("image", None, "image that vision-language models are given before the text")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "longest answer in tokens", lower_bound=1, upper_bound=8192)
_OUT = flags.DEFINE_string("out", None, "output folder for the answers")


def main() -> None:
    from lidit_jax.describe.answers import DescribeRequest, generate_answers
    from lidit_jax.describe.report import format_answers, write_answers
    from lidit_jax.files import check_writable
    from lidit_jax.text.prompts import INSTRUCTION
    from lidit_jax.text.prompts_file import read_prompts

    out = _OUT.value and epath.Path(_OUT.value)
    request = DescribeRequest(
        weights=cli.require_list(_WEIGHTS.name),
        prompts=read_prompts(_PROMPT.value, _PROMPTS_FILE.value),
        instruction=INSTRUCTION if _INSTRUCTION.value is None else _INSTRUCTION.value,
        system_prompt=_SYSTEM_PROMPT.value,
        chat_template=_CHAT_TEMPLATE.value,
        image=_IMAGE.value and epath.Path(_IMAGE.value),
        max_tokens=_MAX_TOKENS.value,
    )
    if out:
        check_writable(out, f"--out={out}")
    answers = generate_answers(request)
    cli.write_text(format_answers(answers))
    if out:
        write_answers(answers, request, out)


if __name__ == "__main__":
    cli.run(main)
