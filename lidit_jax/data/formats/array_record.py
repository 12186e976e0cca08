"""The package that reads and writes ArrayRecord files, which Windows lacks."""

from types import ModuleType

from lidit_jax.errors import UserError


def array_record_module() -> ModuleType:
    """Returns the module with `ArrayRecordReader` and `ArrayRecordWriter`.

    Raises:
      UserError: it is not installed.
    """
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise UserError(
            "ArrayRecord files, and so TFDS data and precomputed latents, need the package array-record, which Windows "
            f"lacks ({error}): use data.source='tar', 'parquet' or 'folder'"
        ) from error
    return array_record_module
