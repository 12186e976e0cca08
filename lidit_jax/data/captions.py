"""Which caption of an example a batch gets: mixed fields, templates and dropout for classifier-free guidance."""

import dataclasses
import string
from collections.abc import Collection, Mapping

import numpy as np

from lidit_jax.errors import UserError

# What captions are called where nobody names the fields; other texts, as a licence, are no captions beside these.
USUAL_FIELDS = ("txt", "caption", "text", "class")


def fields_of(captions: Mapping[str, str], fields: Collection[str] | None) -> list[str]:
    """The fields of an example that training may draw from: those named, else the usual ones, else all."""
    present = [field for field in captions if captions[field].strip()]
    if fields is not None:
        return [field for field in present if field in fields]
    return [field for field in present if field in USUAL_FIELDS] or present


@dataclasses.dataclass(frozen=True)
class CaptionChooser:
    """Draws one of an example's captions.

    Attributes:
      fields: field -> how often it is drawn, in any unit (paper: original and synthetic captions mixed; the share is
        open). A field that an example lacks leaves its share to those it has; 0 leaves a field out. None: the
        usual ones alike, see `fields_of`.
      dropout: probability of the empty caption, from which the model learns the unconditional prediction
        (classifier-free guidance, Ho & Salimans 2022).
      templates: field -> text around it, e.g. {"class": "a photo of {class}"} (paper: its ImageNet ablations); it may
        name other fields as well.
      join: all of an example's captions in one text, in random order, instead of one of them: what a small language
        model is trained on. To continue the first caption with the next (the same content in other words or another
        language) a model must carry which colour belongs to which object; to continue a caption alone it need not.

    Raises:
      UserError: a probability that is none, a template with something else than field names in its braces.
    """

    fields: Mapping[str, float] | None = None
    dropout: float = 0.0
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
    join: bool = False

    def __post_init__(self):
        if not 0 <= self.dropout <= 1:
            raise UserError(f"caption dropout is {self.dropout}: it is a probability, 0 to 1")
        shares = () if self.fields is None else self.fields.values()
        if any(isinstance(share, bool) or not isinstance(share, int | float) for share in shares):
            raise UserError(f"caption fields are {dict(self.fields)}: a share is a number")
        if self.fields is not None and not (self.used and all(0 <= p < np.inf for p in self.fields.values())):
            raise UserError(f"caption fields are {dict(self.fields)}: name at least one with a share above 0")
        for field, template in self.templates.items():
            _check_template(field, template)

    @property
    def used(self) -> tuple[str, ...] | None:
        """The fields that can be drawn; None: any."""
        return None if self.fields is None else tuple(field for field, share in self.fields.items() if share > 0)

    def __call__(self, captions: Mapping[str, str], rng: np.random.Generator) -> str:
        """The text alone of what `draw` draws."""
        return self.draw(captions, rng)[1]

    def draw(self, captions: Mapping[str, str], rng: np.random.Generator) -> tuple[str | None, str]:
        """Draws from {field: text}, or joins them with " = "; "" with probability `dropout`.

        Returns:
          (the field that was drawn; None for the empty caption and for joined ones, its text).

        Raises:
          UserError: the example has none of the fields, or lacks one that its template names.
        """
        # Both are drawn in any case, so that changing the dropout does not change which caption the others get.
        dropped, position = rng.random() < self.dropout, rng.random()
        if dropped:
            return None, ""
        shares = self._shares(captions)
        if self.join:
            fields = rng.permutation(list(shares)).tolist()
            return None, " = ".join(self._fill(field, captions) for field in fields)
        bounds = np.cumsum(list(shares.values()))
        drawn = min(int(np.searchsorted(bounds, position * bounds[-1], side="right")), len(bounds) - 1)
        field = list(shares)[drawn]
        return field, self._fill(field, captions)

    def _shares(self, captions: Mapping[str, str]) -> dict[str, float]:
        """Of the fields that the example has."""
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
        """Every text that could be drawn, in its template: {field: text}."""
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
