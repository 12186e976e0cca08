"""The models that score, from folders of transformers.

PyTorch is imported where it is first needed: the rest of this package does without it.
"""

import functools
from typing import Any

from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.weights.folders import find_folder, is_there


@functools.cache
def device() -> Any:
    """The torch.device on which models run: a GPU where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_folder(flag: str, name: str) -> epath.Path:
    """The folder on this machine that `--FLAG=NAME` names.

    Raises:
      UserError: there is none, or no model in it.
    """
    folder = find_folder(name)
    if "://" in str(folder):
        raise UserError(f"--{flag}={name} is in a bucket: copy it to this machine first")
    if not is_there(folder):
        raise UserError(f"--{flag}={name}: no such folder, and no name of the Hugging Face hub (OWNER/NAME)")
    if not (folder / "config.json").exists():
        raise UserError(f"--{flag}={name}: no config.json in it; name a model's folder as transformers saves it")
    return folder


def load_model(class_name: str, flag: str, name: str, **options: Any) -> Any:
    """A PyTorch model of transformers, ready to be asked.

    Args:
      class_name: of transformers, as "CLIPModel" or "AutoModelForObjectDetection".
      flag: which named it.
      name: a folder, or a name of the hub.
      options: of transformers, as dtype="float32"; without, the weights stay as they were saved.

    Raises:
      UserError: there is no such folder, or a model of another kind in it.
    """
    import transformers

    folder = model_folder(flag, name)
    transformers.utils.logging.disable_progress_bar()  # of loading: the one of the pictures is enough
    try:
        model, found = getattr(transformers, class_name).from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # of many types: of the config, of the weights, of the class
        raise UserError(f"--{flag}={name} can't be loaded as {class_name} ({_reason(error)})") from error
    # transformers fills what a folder does not have with random numbers, and only warns.
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found.get("mismatched_keys", ()))
    if missing:
        raise UserError(f"--{flag}={name} is no {class_name}: {len(missing)} of its weights, as {missing[0]}, lack")
    return model.to(device()).eval()


def load_processor(class_name: str, flag: str, name: str, **options: Any) -> Any:
    """What prepares a model's pictures or texts, as "AutoImageProcessor" or "AutoTokenizer".

    Raises:
      UserError: the folder has none.
    """
    import transformers

    folder = model_folder(flag, name)
    try:
        return getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # of many types, as above
        raise UserError(f"--{flag}={name}: its {class_name} can't be loaded ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
