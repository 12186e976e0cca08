"""Report on what a run trains on, logged by `main` before training and by `preview`.

It describes the data and what is left out of them, shows captions, and states for every encoder what precedes a prompt
and how many prompts are truncated.
"""

import logging
from collections.abc import Iterable, Sequence

import jax

from lidit_jax.data.dataset import Dataset, spread
from lidit_jax.experiment import Experiment
from lidit_jax.text.load_encoder import open_encoder
from lidit_jax.text.prompts import PromptTokenizer

logger = logging.getLogger(__name__)

_SAMPLED_CAPTIONS = 300  # the share of truncated prompts is estimated on these
_SHOWN_CAPTIONS = 3
_SHOWN_LENGTH = 300  # characters


def log_data(experiment: Experiment, dataset: Dataset) -> list[str]:
    """Logs the summary of the data and, if captions are trained on, some of them; on the first host only.

    Returns:
      Captions for `log_prompts`; none on other hosts.
    """
    if jax.process_index():
        return []
    logger.info("%s", dataset.summary())
    if not experiment.has_lidit:
        return []
    captions = dataset.captions(_SAMPLED_CAPTIONS, experiment.config.seed)
    for i in spread(len(captions), _SHOWN_CAPTIONS):
        logger.info("caption: %s", _shown(captions[i]))
    return captions


def log_prompts(experiment: Experiment, captions: Sequence[str], encoders: Iterable[str]) -> None:
    """Logs what precedes every prompt, and the share of truncated prompts; on the first host only.

    Args:
      experiment: the run.
      captions: what `log_data` returned.
      encoders: names of the encoders to report on, whose folders must exist.
    """
    if jax.process_index():
        return
    for name in encoders:
        folder, dtype = experiment.encoder_folder(name), experiment.encoders[name].dtype
        prompts = open_encoder(folder, experiment.prompt_tokenizer, dtype=dtype).tokenizer
        logger.info("encoders.%s: before every prompt, %s: %s", name, _template(prompts), _shown(prompts.prefix_text()))
        if captions:
            truncated = float(prompts(captions)["truncated"].mean())
            log = logger.warning if truncated else logger.info
            log(
                "encoders.%s: %.1f%% of prompts (%d sampled) are longer than text.max_length=%d tokens and truncated",
                *(name, 100 * truncated, len(captions), prompts.max_length),
            )


def _template(prompts: PromptTokenizer) -> str:
    if prompts.uses_chat_template:
        return "in the tokenizer's chat template"
    return "as plain text (" + ("no chat template" if prompts.chat_template else "text.chat_template=False") + ")"


def _shown(text: str) -> str:
    """Returns a text on one line, shortened if it is long."""
    return repr(text if len(text) <= _SHOWN_LENGTH else text[:_SHOWN_LENGTH] + "…")
