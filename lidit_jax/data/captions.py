"""Chooses the caption of an example: mixed caption fields, templates, and dropout for classifier-free guidance."""

import dataclasses
import re
import string
from collections.abc import Collection, Mapping

import numpy as np

from lidit_jax.errors import UserError

# Caption fields of stored data whose config names none. Other texts of a sample, such as its URL or licence, are never
# captions. In alphabetical order, in which they are sampled.
USUAL_FIELDS = ("Caption", "TEXT", "Text", "caption", "captions", "captions/text", "class", "text", "txt")


def list_field(name: str) -> str:
    """Returns the field of a text: "caption" for "caption/1", the second text of a list, and "caption" for itself."""
    return re.sub(r"/[0-9]+$", "", name)


def fields_of(captions: Mapping[str, str], fields: Collection[str] | None) -> list[str]:
    """Returns the names of the captions of an example.

    Args:
      captions: {name: text}; blank texts are ignored, and "caption/0", "caption/1", … are the field "caption".
      fields: fields that are captions; None: all.
    """
    present = [name for name in captions if captions[name].strip()]
    if fields is None:
        return present
    return [name for name in present if is_used(name, fields)]


def is_used(name: str, fields: Collection[str]) -> bool:
    """Returns True if a text belongs to one of the fields, by its own name or as an entry of a list."""
    return name in fields or list_field(name) in fields


@dataclasses.dataclass(frozen=True)
class CaptionChooser:
    """Samples one of the captions of an example.

    Attributes:
      fields: weight of each field, in any unit (paper, 5.1: original and synthetic captions mixed; their shares are not
        given). The share of a field that an example lacks goes to those it has; weight 0 excludes a field. The texts of
        a list share the weight of their field. None: all fields with equal weights.
      dropout: probability of the empty caption, from which the model learns the unconditional prediction
        (classifier-free guidance, Ho & Salimans 2022).
      templates: text around a field, e.g. {"class": "a photo of {class}"} (paper, 5.1: its ImageNet ablations); a
        template may name other fields as well.
      join: join all captions of an example, in random order, instead of sampling one. A small language model is
        trained on such texts: to continue the first caption with the next (the same content in other words or another
        language) a model must track which colour belongs to which object; to continue a single caption it need not.

    Raises:
      UserError: `dropout` is not a probability, the weights are invalid, or a template has something other than field
        names in its braces.
    """

    fields: Mapping[str, float] | None = None
    dropout: float = 0.0
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    join: bool = False

    def __post_init__(self):
        if not 0 <= self.dropout <= 1:
            raise UserError(f"caption dropout is {self.dropout}: use a probability, 0 to 1")
        shares = () if self.fields is None else self.fields.values()
        if any(isinstance(share, bool) or not isinstance(share, int | float) for share in shares):
            raise UserError(f"caption fields are {dict(self.fields)}: every share must be a number")
        if self.fields is not None and not (self.used and all(0 <= p < np.inf for p in self.fields.values())):
            raise UserError(f"caption fields are {dict(self.fields)}: name at least one with a share above 0")
        for field, template in self.templates.items():
            _check_template(field, template)

    @property
    def used(self) -> tuple[str, ...] | None:
        """Fields with a weight above 0; None if `fields` is None."""
        return None if self.fields is None else tuple(field for field, share in self.fields.items() if share > 0)

    def __call__(self, captions: Mapping[str, str], rng: np.random.Generator) -> str:
        """Samples a caption as `sample` does, and returns its text alone."""
        return self.sample(captions, rng)[1]

    def sample(
        self, captions: Mapping[str, str], rng: np.random.Generator, planned: str | None = None
    ) -> tuple[str | None, str]:
        """Samples a caption; with probability `dropout`, the empty one.

        Args:
          captions: {name: text}.
          rng: generator of the random numbers.
          planned: name of the caption to use unless it is dropped; None samples one.

        Returns:
          (name, text): name and text of the sampled caption; or None with the empty caption, or with all captions,
          joined by " = ".

        Raises:
          UserError: the example has none of the fields, or lacks a field that its template names or the planned
            caption.
        """
        # Always draw both numbers, so that changing the dropout does not change the captions of other examples.
        dropped, position = rng.random() < self.dropout, rng.random()
        if dropped:
            return None, ""
        if planned is not None:
            if planned not in captions:
                raise UserError(f"an example no longer has the caption {planned!r}: the data changed; start again")
            return planned, self._fill(planned, captions)
        shares = self.shares(captions)
        if self.join:
            names = rng.permutation(list(shares)).tolist()
            return None, " = ".join(self._fill(name, captions) for name in names)
        bounds = np.cumsum(list(shares.values()))
        sampled = min(int(np.searchsorted(bounds, position * bounds[-1], side="right")), len(bounds) - 1)
        name = list(shares)[sampled]
        return name, self._fill(name, captions)

    def shares(self, captions: Mapping[str, str]) -> dict[str, float]:
        """Returns the weights, in any unit, of the captions that the example has, {name: weight}.

        Raises:
          UserError: the example has none of the fields.
        """
        texts: dict[str, list[str]] = {}  # names by field
        for name in sorted(fields_of(captions, self.used)):
            texts.setdefault(name if name in (self.used or ()) else list_field(name), []).append(name)
        if not texts:
            raise UserError(
                f"an example has captions {sorted(captions)} but none of the fields {sorted(self.used or ())}: "
                "name its fields, or filter out examples without a caption"
            )
        weights = dict.fromkeys(sorted(texts), 1.0) if self.fields is None else self.fields
        fields = [field for field in weights if field in texts]
        return {name: weights[field] / len(texts[field]) for field in fields for name in texts[field]}

    def filled(self, captions: Mapping[str, str]) -> dict[str, str]:
        """Returns every caption that can be sampled, in its template: {name: text}."""
        return {name: self._fill(name, captions) for name in fields_of(captions, self.used)}

    def _fill(self, name: str, captions: Mapping[str, str]) -> str:
        field = list_field(name)
        if field not in self.templates:
            return captions[name]
        try:
            return self.templates[field].format_map({**captions, field: captions[name]})
        except KeyError as error:
            raise UserError(
                f"caption template {self.templates[field]!r} names {error}, which an example lacks"
            ) from error


def _check_template(field: str, template: str) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"caption template {template!r} of field {field!r}: {error}") from error
    for _, name, specification, conversion in parts:
        if name is not None and (not name or not name.replace("-", "_").isidentifier() or specification or conversion):
            raise UserError(
                f"caption template {template!r} of field {field!r}: write field names in braces, as {{class}}"
            )
