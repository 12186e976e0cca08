"""Data sets with random access: globally shuffled; batch k is a function of k alone."""

import collections
import logging
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from lidit_jax.data.assembler import Assembler
from lidit_jax.data.broken_count import check_broken
from lidit_jax.data.buckets import Bucket, assign
from lidit_jax.data.caption_lengths import TokenCounter
from lidit_jax.data.captions import list_field
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.dataset import Dataset, spread
from lidit_jax.data.indexed.loader import Loader, make_loader, make_plan, rows_of_process
from lidit_jax.data.indexed.source import IndexedSource
from lidit_jax.data.precomputed import PrecomputedSource
from lidit_jax.data.prompt_lengths import IndexedPromptLengths, PromptLengths
from lidit_jax.data.sources import BrokenExample, ConcatenatedSource, Source
from lidit_jax.data.stored_features import EncoderFingerprint, StoredPrompts
from lidit_jax.errors import UserError

logger = logging.getLogger(__name__)

_SAMPLED = 50  # records of a folder of latents that are read to name its caption fields


class IndexedDataset(Dataset):
    """A `Dataset` with random access.

    Attributes:
      source: random access to the examples.
      bucket_of_example: int32 [N], index of each example's bucket.
    """

    def __init__(
        self,
        config: DataConfig,
        buckets: tuple[Bucket, ...],
        source_configs: Mapping[str, DataConfig],
        sources: Iterable[Source],
        held_out: bool,
        with_captions: bool,
    ):
        """Checks the sources and assigns their examples to buckets.

        Args:
          config: as for `Dataset`.
          buckets: as for `Dataset`.
          source_configs: as for `Dataset`.
          sources: one source for each of `source_configs`.
          held_out: as for `Dataset`.
          with_captions: as for `Dataset`.

        Raises:
          UserError: too many samples are broken, or no sample has a caption field that the config names.
        """
        super().__init__(config, buckets, source_configs, held_out, with_captions)
        self._sources = []
        for name, source in zip(source_configs, sources, strict=True):
            self._sources.append(source)
            if isinstance(source, IndexedSource):
                self.broken += source.broken
                self.dropped += source.dropped
                self.num_examined += source.num_samples
                self.fields[name] = source.fields
        check_broken(self.num_examined, self.broken, config.max_broken)
        self._check_fields()
        self.source: Source = self._sources[0] if len(self._sources) == 1 else ConcatenatedSource(self._sources)
        self.bucket_of_example = assign(self.source.sizes(), self.buckets)

    @property
    def fingerprint(self) -> str:
        sizes = " ".join(str(bucket) for bucket in self.buckets)
        order = f" by {self._weights}" if self._weights else ""
        return f"{self.source.fingerprint} in {sizes}{order}"

    def summary(self) -> str:
        shares = make_plan(self.source, self.buckets, 1, 0, self._weights).shares()
        bucket_shares = [
            f"{bucket} {100 * share:.0f}%" for bucket, share in zip(self.buckets, shares, strict=False) if share
        ]
        lines = [f"data: {len(self.source)} images; buckets {', '.join(bucket_shares)}"]
        if len(self._source_configs) > 1:
            counts = np.bincount(self.source.source_of_example)
            rows = self._weights or counts.tolist()
            mixed = [
                f"{name} {count} images, {100 * weight / sum(rows):.0f}%"
                for name, count, weight in zip(self._source_configs, counts, rows, strict=True)
            ]
            lines.append(f"mixed of {'; '.join(mixed)}")
        return "; ".join(lines + self._describe_captions(self._sampled_fields()) + self._describe_left_out())

    def _sampled_fields(self) -> dict[str, collections.Counter[str]]:
        """Returns the number of samples with each text field, of up to `_SAMPLED` of each folder of latents."""
        sampled = {}
        for name, source in zip(self._source_configs, self._sources, strict=True):
            if self._with_captions and isinstance(source, PrecomputedSource):
                examples = source.describe(spread(len(source), _SAMPLED))
                found = (example["captions"] for example in examples if not isinstance(example, BrokenExample))
                sampled[name] = collections.Counter(field for texts in found for field in set(map(list_field, texts)))
        return sampled

    @property
    def holds_latents(self) -> bool:
        return self.source.content == "moments"

    def check_latents(self, vae_digest: str) -> None:
        """Raises UserError if latents were computed by a VAE with another digest."""
        for source_config, source in zip(self._source_configs.values(), self._sources, strict=True):
            if isinstance(source, PrecomputedSource) and source.manifest.vae != vae_digest:
                raise UserError(
                    f"{source_config.path}: computed by another VAE (digest {source.manifest.vae}) than that of "
                    f"vae.weights ({vae_digest}): name that one, or compute the latents again"
                )

    def stored_prompts(self) -> StoredPrompts | None:
        """Returns the precomputed features of the prompts; None if the data hold none.

        Raises:
          UserError: the sources of a mixture hold features of different encoders.
        """
        made_by = [getattr(source, "encoders", {}) for source in self._sources]
        if any(encoders != made_by[0] for encoders in made_by):
            raise UserError(
                "the mixture's latents hold the features of different encoders: compute them again with the same, or "
                "give --config.data.features=False"
            )
        return StoredPrompts(made_by[0], self._sources[0].constant) if made_by[0] else None

    def check_features(self, encoders: Mapping[str, EncoderFingerprint]) -> None:
        """Raises UserError if stored features were computed by other encoders than these."""
        for source_config, source in zip(self._source_configs.values(), self._sources, strict=True):
            stored = getattr(source, "encoders", {})
            if stored and stored != encoders:
                wrong = sorted(n for n in stored.keys() | encoders.keys() if stored.get(n) != encoders.get(n))
                raise UserError(
                    f"{source_config.path}: the stored features are of other encoders, or of other texts around the "
                    f"prompts ({', '.join(wrong)} differ): name those, compute the features again, or give "
                    "--config.data.features=False"
                )

    def check_batch_size(self, batch_size: int) -> None:
        rows_of_process(batch_size, jax.process_index(), jax.process_count())

    def smallest_side(self) -> int:
        return min(min(self.buckets[i]) for i in np.unique(self.bucket_of_example))

    def largest_bucket(self) -> Bucket:
        return self.buckets[int(np.bincount(self.bucket_of_example).argmax())]

    def captions(self, count: int, seed: int) -> list[str]:
        choosers = self._choosers(0.0)
        rng = np.random.default_rng(seed)
        examples = self.source.describe(spread(len(self.source), count))
        return [
            choosers[example.get("source", 0)](example["captions"], rng)
            for example in examples
            if not isinstance(example, BrokenExample)
        ]

    def images(self, count: int) -> list[np.ndarray]:
        if self.holds_latents:
            raise UserError("data.source='precomputed' holds latents, no images: name the source of the images")
        images = []
        for index in spread(len(self.source), count):
            [example] = self.source.load([index], self.buckets[self.bucket_of_example[index]])
            if isinstance(example, BrokenExample):
                logger.warning("%s; left out", example)
            else:
                images.append(example["image"])
        if not images:
            raise UserError(f"none of the {len(self.source)} images can be read: check the data files")
        return images

    def prompt_lengths(self, count_tokens: TokenCounter, num_lengths: int, max_length: int) -> PromptLengths:
        choosers = self._choosers(0.0)
        captions = [
            source.caption_lengths(chooser, count_tokens)
            for source, chooser in zip(self._sources, choosers, strict=True)
        ]
        return IndexedPromptLengths(captions, choosers, list(map(len, self._sources)), num_lengths, max_length)

    def _loader(self, assembler: Assembler, batch_size: int, first: int, prompts: PromptLengths | None) -> Loader:
        assert prompts is None or isinstance(prompts, IndexedPromptLengths)
        config = self.config
        return make_loader(
            self.source,
            assembler,
            batch_size,
            weights=self._weights,
            prompts=prompts,
            num_threads=config.num_threads,
            num_workers=config.num_workers,
            prefetch=config.prefetch,
            max_broken=config.max_broken,
            first_batch=first,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
