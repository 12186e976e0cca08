"""LI-DiT's text-to-image pipeline: frozen LLMs encode instruction and prompt, a diffusion transformer denoises.

This file is self-contained. It belongs to the exported weights in this folder and needs torch, diffusers and
transformers:

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True, dtype=torch.bfloat16).to("cuda")
    pipe("a red circle left of a blue square").images[0]
"""

import inspect
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # newest version of the `lidit` object in model_index.json that this file reads
MAX_ENCODERS = 4
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Index in transformers' hidden states of the output of the third-to-last block, which is an LLM's feature. They begin
# with the embeddings and end with the normalised output of the last block.
THIRD_TO_LAST = -3


class PromptFeatures(NamedTuple):
    """Features of B prompts: lists with one entry per text encoder.

    Attributes:
      embeds: features [B, L_i, D_i] of the prompts, padded on the right.
      masks: bool [B, L_i], True on the prompts' tokens.
      instructions: features of the prefix (system prompt and instruction): [P_i, D_i] from a causal encoder, where all
        prompts share them, or [B, P_i, D_i] from a bidirectional encoder, where they depend on the prompt.
    """

    embeds: list[Tensor]
    masks: list[Tensor]
    instructions: list[Tensor]


class LIDiTPipeline(DiffusionPipeline):
    """Generates images from text with LI-DiT.

    Args:
      transformer: LI-DiT.
      vae: autoencoder of its latents.
      scheduler: scheduler with the noise schedule of the training run.
      text_encoder: first text encoder; `text_encoder_2` to `text_encoder_4` follow in the order of training.
      tokenizer: tokenizer of the first text encoder; `tokenizer_2` to `tokenizer_4` belong to the others.
      lidit: facts about the training run: format_version, resolution, sample (steps, guidance_scale), and encoders,
        with kind ("llm" or "t5"), dtype, prefix (token ids before every prompt), separator and max_length of each.
      text_encoder_sources: component name -> {"name", "revision", "class"} of the encoders that the folder does not
        contain. They are loaded from the Hugging Face hub or a local folder, in their training dtype. `{}` loads none,
        for callers that pass `prompt_embeds`.

    Raises:
      ValueError: the folder is not an export of LI-DiT, or has a newer format than this file reads.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->text_encoder_4->transformer->vae"
    _optional_components = [
        *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"),
        *("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4"),
    ]
    _callback_tensor_inputs = ["latents", "noise_pred"]

    def __init__(
        self,
        transformer: ModelMixin,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder_2: PreTrainedModel,
        tokenizer_2: PreTrainedTokenizerBase,
        text_encoder_3: PreTrainedModel,
        tokenizer_3: PreTrainedTokenizerBase,
        text_encoder_4: PreTrainedModel,
        tokenizer_4: PreTrainedTokenizerBase,
        lidit: dict | None = None,
        text_encoder_sources: dict | None = None,
    ):
        super().__init__()
        _check_facts(lidit)
        given = {
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "text_encoder_2": text_encoder_2,
            "tokenizer_2": tokenizer_2,
            "text_encoder_3": text_encoder_3,
            "tokenizer_3": tokenizer_3,
            "text_encoder_4": text_encoder_4,
            "tokenizer_4": tokenizer_4,
        }
        sources = dict(text_encoder_sources or {})
        for index, facts in enumerate(lidit["encoders"]):
            encoder, tokenizer_name = component_names(index)
            if encoder not in sources:
                continue
            if given[encoder] is None:
                given[encoder] = _load_encoder(encoder, sources[encoder], getattr(torch, facts["dtype"]))
            if given[tokenizer_name] is None:
                given[tokenizer_name] = _load_tokenizer(encoder, sources[encoder])
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, **given)
        self.register_to_config(lidit=lidit, text_encoder_sources=sources)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: PromptFeatures | None = None,
        negative_prompt_embeds: PromptFeatures | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Generates images.

        Args:
          prompt: one prompt or several.
          negative_prompt: prompt that guidance steers away from: one for all, or one per prompt. Training dropped
            prompts to "", the default.
          height: height in pixels; default: the training resolution.
          width: width in pixels; default: the training resolution.
          num_inference_steps: number of sampling steps; default: that of the training run.
          guidance_scale: scale of classifier-free guidance; default: that of the training run. 1 turns guidance off and
            halves the compute.
          num_images_per_prompt: images per prompt, which are adjacent in the output. All images form one batch.
          generator: random generator of the noise, or a list with one per image.
          latents: standard normal noise [B, C, height / factor, width / factor] to start from.
          prompt_embeds: features from `encode_prompt`, in place of `prompt`.
          negative_prompt_embeds: features from `encode_prompt`, in place of `negative_prompt`.
          output_type: "pil", "np", "pt", or "latent" for [B, C, h, w] in the transformer's scale.
          return_dict: False returns a tuple.
          callback_on_step_end: called as (pipeline, step, timestep, {name: tensor}) after each step. If it returns a
            dict with "latents", they replace the current ones.
          callback_on_step_end_tensor_inputs: names of the tensors passed to the callback: "latents", "noise_pred".

        Returns:
          An output with `.images`, or a tuple that contains only the images.

        Raises:
          ValueError: an argument is invalid; the message says which values are valid.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        facts = self.config.lidit
        height = facts["resolution"] if height is None else height
        width = facts["resolution"] if width is None else width
        steps = facts["sample"]["steps"] if num_inference_steps is None else num_inference_steps
        scale = facts["sample"]["guidance_scale"] if guidance_scale is None else guidance_scale
        self._check_arguments(
            height, width, steps, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs
        )
        self._guidance_scale, self._interrupt = scale, False

        text = self._features(prompt, prompt_embeds, "prompt")
        count = text.masks[0].shape[0]
        if self.do_classifier_free_guidance:
            negative = self._negative_features(negative_prompt, negative_prompt_embeds, count)
            text = _concatenated(text, negative)  # conditional rows first
        text = _repeated(text, num_images_per_prompt)
        latents = self.prepare_latents(count * num_images_per_prompt, height, width, generator, latents)
        latents = self._denoise(
            latents, text, steps, generator, callback_on_step_end, callback_on_step_end_tensor_inputs
        )

        if output_type == "latent":
            images = latents
        else:
            images = self.image_processor.postprocess(self.decode_latents(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # --- the prompt --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> PromptFeatures:
        """Returns the features of one prompt or several.

        Raises:
          ValueError: an encoder is not loaded.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        embeds, masks, instructions = [], [], []
        for index, facts in enumerate(self.config.lidit["encoders"]):
            encoder, tokenizer = (getattr(self, name) for name in component_names(index))
            if encoder is None or tokenizer is None:
                name = component_names(index)[0]
                raise ValueError(f"{name} is not loaded: load the pipeline with it, or pass prompt_embeds")
            tokens, mask = tokenize(tokenizer, prompts, facts)
            hidden, mask = self._encode(encoder, facts, tokens, mask)
            length = len(facts["prefix"])
            embeds.append(hidden[:, length:])
            masks.append(mask)
            # In a causal encoder the features of the prefix do not depend on the prompt.
            instructions.append(hidden[:, :length] if facts["kind"] == "t5" else hidden[0, :length])
        return PromptFeatures(embeds, masks, instructions)

    def _encode(
        self, encoder: PreTrainedModel, facts: Mapping[str, Any], tokens: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """tokens and mask [B, L] -> features [B, P + L, D] of prefix and prompt, and mask [B, L]."""
        prefix = torch.tensor(facts["prefix"], dtype=torch.long).expand(len(tokens), -1)
        # With offloading hooks, the module moves its inputs to its execution device by itself.
        device = self._execution_device if hasattr(encoder, "_hf_hook") else encoder.device
        tokens = torch.cat([prefix, tokens], dim=1).to(device)
        full_mask = torch.cat([torch.ones_like(prefix, dtype=torch.bool), mask], dim=1).to(device)
        if facts["kind"] == "t5":
            hidden = encoder(input_ids=tokens, attention_mask=full_mask.long()).last_hidden_state
        else:
            outputs = encoder(
                input_ids=tokens, attention_mask=full_mask.long(), output_hidden_states=True, use_cache=False
            )
            hidden = outputs.hidden_states[THIRD_TO_LAST]
        return hidden.to(self._execution_device), mask.to(self._execution_device)

    def _features(self, prompt: Any, features: PromptFeatures | None, name: str) -> PromptFeatures:
        if (prompt is None) == (features is None):
            raise ValueError(f"pass either {name} or {name}_embeds")
        if features is not None:
            return self._on_device(features, name)
        if isinstance(prompt, str):
            return self.encode_prompt(prompt)
        if not isinstance(prompt, list | tuple) or not prompt or not all(isinstance(text, str) for text in prompt):
            raise ValueError(f"{name} must be a string or a list of strings, not {prompt!r:.80}")
        return self.encode_prompt(prompt)

    def _negative_features(self, prompt: Any, features: PromptFeatures | None, count: int) -> PromptFeatures:
        """Returns the features of the negative prompts, one row for each of `count` prompts."""
        if features is None:
            features = self._features("" if prompt is None else prompt, None, "negative_prompt")
        else:
            features = self._on_device(features, "negative_prompt")
        found = features.masks[0].shape[0]
        if found == 1:
            return _repeated(features, count)
        if found != count:
            raise ValueError(f"there are {found} negative prompts for {count} prompts: pass one, or one for each")
        return features

    def _on_device(self, features: PromptFeatures, name: str) -> PromptFeatures:
        expected = len(self.config.lidit["encoders"])
        if len(features) != 3 or any(len(part) != expected for part in features):
            raise ValueError(f"{name}_embeds must be the output of encode_prompt, for {expected} encoders")
        return PromptFeatures(*([x.to(self._execution_device) for x in part] for part in features))

    # --- the image ---------------------------------------------------------------------------------------------------

    def prepare_latents(
        self,
        count: int,
        height: int,
        width: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Returns the initial latents, float32 [count, C, height / factor, width / factor].

        Args:
          count: number of images.
          height: height of the images in pixels.
          width: width of the images in pixels.
          generator: random generator of the noise, or a list with one per image.
          latents: standard normal noise to use instead.

        Raises:
          ValueError: the given latents have another shape, or there is not one generator per image.
        """
        factor = self.vae_scale_factor
        shape = (count, self.vae.config.latent_channels, height // factor, width // factor)
        if latents is None:
            if isinstance(generator, list) and len(generator) != count:
                raise ValueError(f"there are {len(generator)} generators for {count} images: pass one, or one for each")
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}, these images need {shape}")
        # Keep the latents in float32 throughout: lower precision would show in the sum of many small steps.
        latents = latents.to(self._execution_device, torch.float32)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _denoise(
        self,
        latents: Tensor,
        text: PromptFeatures,
        steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """Denoises the initial latents [B, C, h, w] with the scheduler -> float32 [B, C, h, w]."""
        self.scheduler.set_timesteps(steps, device=latents.device)
        self._num_timesteps = len(self.scheduler.timesteps)
        # The rows of `text` fix whether guidance is on, even if a callback changes its scale.
        is_guided = self.do_classifier_free_guidance
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        with self.progress_bar(total=self._num_timesteps) as progress:
            for step, timestep in enumerate(self.scheduler.timesteps):
                if self._interrupt:
                    continue
                noise_pred = self._predict(latents, timestep, text, is_guided)
                latents = self.scheduler.step(noise_pred, timestep, latents, return_dict=False, **options)[0]
                if callback is not None:
                    tensors = {"latents": latents, "noise_pred": noise_pred}
                    tensors = {name: tensors[name] for name in callback_inputs}
                    latents = (callback(self, step, timestep, tensors) or {}).get("latents", latents)
                progress.update()
        return latents

    def _predict(self, latents: Tensor, timestep: Tensor, text: PromptFeatures, is_guided: bool) -> Tensor:
        """Returns the model output for the scheduler's `step`, with guidance applied: float32 [B, C, h, w]."""
        x = latents
        if hasattr(self.scheduler, "scale_model_input"):  # flow-matching schedulers lack it
            x = self.scheduler.scale_model_input(x, timestep)
        if is_guided:
            x = torch.cat([x, x])
        output = self.transformer(
            hidden_states=x,  # float32: the transformer casts it, and returns float32
            timestep=timestep.to(x.device, torch.float32).expand(len(x)),
            encoder_hidden_states=text.embeds,
            encoder_attention_mask=text.masks,
            instruction_hidden_states=text.instructions,
            return_dict=False,
        )[0].float()
        if not is_guided:
            return output
        conditional, unconditional = output.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decodes latents [B, C, h, w] in the transformer's scale -> images [B, 3, H, W], mostly in [-1, 1]."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and std is not None:  # per-channel statistics instead of a single shift
            mean, std = (
                torch.tensor(x, dtype=latents.dtype, device=latents.device)[:, None, None] for x in (mean, std)
            )
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        dtype = self.vae.dtype
        overflows = dtype == torch.float16 and getattr(config, "force_upcast", False)
        if overflows:
            self.vae.to(torch.float32)
        images = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float()
        if overflows:
            self.vae.to(dtype)
        return images

    def enable_vae_slicing(self) -> None:
        """Decodes images one at a time, to save memory."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decodes large images in tiles, to save memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True after a callback has set `_interrupt`: the remaining steps are skipped."""
        return self._interrupt

    def _check_arguments(
        self, height: int, width: int, steps: int, num_images: int, output_type: str, callback_inputs: Sequence[str]
    ) -> None:
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        for name, side in (("height", height), ("width", width)):
            if not isinstance(side, int) or side < multiple or side % multiple:
                below = max(multiple, side // multiple * multiple) if isinstance(side, int) else multiple
                raise ValueError(
                    f"{name}={side!r:.40} is not a multiple of {multiple}: use {below} or {below + multiple}"
                )
        for name, value in (("num_inference_steps", steps), ("num_images_per_prompt", num_images)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r:.40} must be an integer of at least 1")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r:.40} is unknown: use one of {', '.join(OUTPUT_TYPES)}")
        for name in callback_inputs:
            if name not in self._callback_tensor_inputs:
                known = ", ".join(self._callback_tensor_inputs)
                raise ValueError(f"callback_on_step_end_tensor_inputs has {name!r:.40}: use any of {known}")

    # --- saving ------------------------------------------------------------------------------------------------------

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Saves the code with the config, so that the folder of `save_pretrained` loads like this one."""
        super().save_config(save_directory, **kwargs)
        _copy_code(type(self), Path(save_directory))
        _copy_code(type(_unwrapped(self.transformer)), Path(save_directory) / "transformer")

    def to_json_string(self) -> str:
        """Returns the contents of model_index.json, which names classes of the folder's own code by their files."""
        values = json.loads(super().to_json_string())
        values["_class_name"] = _file_and_class(type(self))
        values["transformer"] = _file_and_class(type(_unwrapped(self.transformer)))
        sources = values["text_encoder_sources"] or {}
        # Drop the sources of encoders that are loaded: the saved folder contains them.
        values["text_encoder_sources"] = {
            name: source for name, source in sources.items() if getattr(self, name) is None
        }
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def component_names(index: int) -> tuple[str, str]:
    """Returns the component names of an encoder and its tokenizer.

    Index 0 -> ("text_encoder", "tokenizer"), index 1 -> ("text_encoder_2", "tokenizer_2"), …
    """
    suffix = f"_{index + 1}" if index else ""
    return f"text_encoder{suffix}", f"tokenizer{suffix}"


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], facts: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Tokenises prompts, each followed by an end token and padded on the right.

    Long prompts are truncated with a warning. An empty prompt consists of its end token.

    Args:
      tokenizer: tokenizer of the encoder.
      prompts: B prompts.
      facts: facts about the encoder: separator, which makes a prompt's first word the same token as after the
        instruction, and max_length, L.

    Returns:
      Token ids, int64 [B, L], and a mask, bool [B, L], True on tokens of the prompt and its end token.
    """
    length, end = facts["max_length"], tokenizer.eos_token_id
    texts = [text if not text or text.startswith(" ") else facts["separator"] + text for text in prompts]
    # Replace lone surrogates, which are not valid text. The name of a special token is text: do not parse it as one.
    texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    tokens = torch.full((len(prompts), length), end, dtype=torch.long)
    mask = torch.zeros((len(prompts), length), dtype=torch.bool)
    for row, ids in enumerate(encoded):
        if len(ids) > length - 1:
            truncated = tokenizer.decode(ids[length - 1 :])
            logger.warning("a prompt is longer than %d tokens; the end of it is ignored: %.500s", length - 1, truncated)
        ids = [*ids[: length - 1], end]
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    return tokens, mask


def _check_facts(facts: Any) -> None:
    """Checks the `lidit` object of model_index.json.

    Raises:
      ValueError: it is missing or damaged, or of a newer format.
    """
    if not isinstance(facts, dict) or not isinstance(facts.get("encoders"), list):
        raise ValueError("model_index.json has no lidit object with encoders: use an exported LI-DiT")
    version = facts.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"this folder has format_version {version!r:.40}, its pipeline_lidit.py reads up to {FORMAT_VERSION}: use "
            "the pipeline_lidit.py of a newer lidit-jax"
        )
    if not 1 <= len(facts["encoders"]) <= MAX_ENCODERS:
        raise ValueError(f"model_index.json lists {len(facts['encoders'])} encoders, but must list 1 to {MAX_ENCODERS}")


def _load_encoder(component: str, source: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    cls = getattr(transformers, source["class"])
    return cls.from_pretrained(
        _checked_location(component, source), revision=_revision(source), dtype=dtype, use_safetensors=True
    )


def _load_tokenizer(component: str, source: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    cls = transformers.PreTrainedTokenizerFast
    # An encoder inside an exported folder has its tokenizer in a folder next to it, which the source names.
    source = source | {"name": source.get("tokenizer") or source["name"]}
    return cls.from_pretrained(_checked_location(component, source), revision=_revision(source))


def _checked_location(component: str, source: Mapping[str, Any]) -> str:
    name = source["name"]
    if os.path.isabs(name) and not os.path.isdir(name):
        raise ValueError(
            f"{component} is not in this folder but in {name}, which does not exist: pass {component}= to "
            "from_pretrained, or export with --text_encoders=copy"
        )
    return name


def _revision(source: Mapping[str, Any]) -> str:
    return source.get("revision") or "main"


def _concatenated(first: PromptFeatures, second: PromptFeatures) -> PromptFeatures:
    """Concatenates two batches of features; instructions that all prompts share are kept once."""
    instructions = [
        a if a.ndim == 2 else torch.cat([a, b]) for a, b in zip(first.instructions, second.instructions, strict=True)
    ]
    embeds = [torch.cat(pair) for pair in zip(first.embeds, second.embeds, strict=True)]
    masks = [torch.cat(pair) for pair in zip(first.masks, second.masks, strict=True)]
    return PromptFeatures(embeds, masks, instructions)


def _repeated(features: PromptFeatures, times: int) -> PromptFeatures:
    """Repeats each prompt's features `times` times in adjacent rows; shared instructions are not repeated."""
    if times == 1:
        return features
    return PromptFeatures(
        [x.repeat_interleave(times, dim=0) for x in features.embeds],
        [x.repeat_interleave(times, dim=0) for x in features.masks],
        [x if x.ndim == 2 else x.repeat_interleave(times, dim=0) for x in features.instructions],
    )


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model inside the wrappers of `torch.compile` and data parallelism."""
    for name in ("_orig_mod", "module"):
        model = getattr(model, name, model)
    return model


def _copy_code(cls: type, folder: Path) -> None:
    """Copies the file that defines a class into a folder."""
    folder.mkdir(exist_ok=True)
    source = Path(inspect.getfile(cls)).resolve()
    if source != (folder / source.name).resolve():  # unless it is already there
        shutil.copyfile(source, folder / source.name)


def _file_and_class(cls: type) -> list[str]:
    return [Path(inspect.getfile(cls)).stem, cls.__name__]
