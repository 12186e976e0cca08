"""Chooses the caption of an example: mixed caption fields, templates, and dropout for classifier-free guidance."""

import dataclasses
import string
from collections.abc import Collection, Mapping

import numpy as np

from lidit_jax.errors import UserError

# Default caption fields. If an example has any of them, its other texts, such as a licence, are not captions.
USUAL_FIELDS = ("txt", "caption", "text", "class")


def fields_of(captions: Mapping[str, str], fields: Collection[str] | None) -> list[str]:
    """Returns the caption fields of an example that training may use.

    Args:
      captions: {field: text}; blank texts are ignored.
      fields: allowed fields; None: those of `USUAL_FIELDS`, or all fields if the example has none of these.
    """
    present = [field for field in captions if captions[field].strip()]
    if fields is not None:
        return [field for field in present if field in fields]
    return [field for field in present if field in USUAL_FIELDS] or present


@dataclasses.dataclass(frozen=True)
class CaptionChooser:
    """Samples one of the captions of an example.

    Attributes:
      fields: weight of each field, in any unit (paper, 5.1: original and synthetic captions mixed; their shares are not
        given). The share of a field that an example lacks goes to those it has; weight 0 excludes a field. None: the
        default fields with equal weights, see `fields_of`.
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

    def sample(self, captions: Mapping[str, str], rng: np.random.Generator) -> tuple[str | None, str]:
        """Samples a caption; with probability `dropout`, the empty one.

        Args:
          captions: {field: text}.
          rng: generator of the random numbers.

        Returns:
          (field, text): the sampled field with its text, or None with the empty caption or with all captions, joined
          by " = ".

        Raises:
          UserError: the example has none of the fields, or lacks a field that its template names.
        """
        # Always draw both numbers, so that changing the dropout does not change the captions of other examples.
        dropped, position = rng.random() < self.dropout, rng.random()
        if dropped:
            return None, ""
        shares = self._shares(captions)
        if self.join:
            fields = rng.permutation(list(shares)).tolist()
            return None, " = ".join(self._fill(field, captions) for field in fields)
        bounds = np.cumsum(list(shares.values()))
        sampled = min(int(np.searchsorted(bounds, position * bounds[-1], side="right")), len(bounds) - 1)
        field = list(shares)[sampled]
        return field, self._fill(field, captions)

    def _shares(self, captions: Mapping[str, str]) -> dict[str, float]:
        """Returns the weights of the fields that the example has."""
        present = fields_of(captions, self.used)
        if not present:
            wanted = sorted(self.used or USUAL_FIELDS)
            raise UserError(
                f"an example has captions {sorted(captions)} but none of the fields {wanted}: "
                "name its fields, or filter out examples without a caption"
            )
        if self.fields is None:
            return dict.fromkeys(sorted(present), 1.0)
        return {field: share for field, share in self.fields.items() if field in present}

    def filled(self, captions: Mapping[str, str]) -> dict[str, str]:
        """Returns every caption that can be sampled, in its template: {field: text}."""
        return {field: self._fill(field, captions) for field in fields_of(captions, self.used)}

    def _fill(self, field: str, captions: Mapping[str, str]) -> str:
        if field not in self.templates:
            return captions[field]
        try:
            return self.templates[field].format_map(captions)
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
