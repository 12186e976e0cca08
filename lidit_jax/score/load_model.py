"""Loads scoring models and their processors from folders that transformers saved.

PyTorch is imported inside functions: the rest of this package works without it.
"""

import functools
from pathlib import Path
from typing import Any

from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.text.tokenizer_trial import try_tokenizer
from lidit_jax.weights.folders import TOKENIZER_FILES, find_folder, is_there


@functools.cache
def device() -> Any:
    """Returns the torch.device on which models run: a GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_folder(flag: str, name: str) -> epath.Path:
    """Returns the local folder that `--FLAG=NAME` names.

    Raises:
      UserError: there is none, it is in a bucket, or there is no model in it.
    """
    folder = find_folder(name)
    if "://" in str(folder):
        raise UserError(f"--{flag}={name} is in a bucket: copy it to this host first")
    if not is_there(folder):
        raise UserError(f"--{flag}={name}: no such folder, and not a name on the Hugging Face hub (OWNER/NAME)")
    if not (folder / "config.json").exists():
        raise UserError(f"--{flag}={name}: no config.json in it: name a folder that transformers saved a model to")
    return folder


def load_model(class_name: str, flag: str, name: str, **options: Any) -> Any:
    """Loads a PyTorch model of transformers onto `device()`, in evaluation mode.

    Args:
      class_name: in transformers, such as "CLIPModel" or "AutoModelForObjectDetection".
      flag: name of the flag that gave the model, for error messages.
      name: a folder, or a model's name on the hub.
      **options: of `from_pretrained`, such as dtype="float32"; without a dtype, weights keep the saved one.

    Raises:
      UserError: there is no such folder, or the model in it is of another class.
    """
    import transformers

    folder = model_folder(flag, name)
    transformers.utils.logging.disable_progress_bar()  # of loading; scoring has its own
    try:
        model, found = getattr(transformers, class_name).from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # of many types, from the config, the weights or the class
        raise UserError(f"--{flag}={name} can't be loaded as {class_name} ({_reason(error)})") from error
    # transformers initialises missing weights randomly and only warns.
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found.get("mismatched_keys", ()))
    if missing:
        raise UserError(
            f"--{flag}={name} lacks weights that {class_name} needs ({len(missing)}, such as {missing[0]}): "
            "name a complete model of this kind"
        )
    return model.to(device()).eval()


def load_processor(class_name: str, flag: str, name: str, **options: Any) -> Any:
    """Loads a model's image processor or tokenizer; arguments as in `load_model`.

    Raises:
      UserError: there is no such folder, or no such processor in it.
    """
    import transformers

    folder = model_folder(flag, name)
    if (folder / "tokenizer.json").exists():
        try_tokenizer(Path(folder), TOKENIZER_FILES)
    try:
        return getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # of many types, as above
        raise UserError(f"--{flag}={name}: its {class_name} can't be loaded ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
