"""Samples stored as records: ArrayRecord files of tf.train.Example, and TensorFlow Datasets (TFDS)."""

import functools
import io
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lidit_jax.data.formats.files import find_files, is_remote
from lidit_jax.data.formats.shards import (
    CLASS_FIELD,
    MAX_TEXT_BYTES,
    Place,
    Sample,
    Unusable,
    captions_of,
    check_image,
    class_name,
    decode_text,
    names_digest,
    scan_numbered,
)
from lidit_jax.errors import UserError

ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$")
_LABELS = ("class", "label")
_MAX_VALUES = 64  # per feature, e.g. several captions


class ArrayRecordShards:
    """ArrayRecord files of tf.train.Example; see `Shards`.

    The feature `image_key` holds the encoded image. Every other bytes feature is a caption, or captions "name/0",
    "name/1", … if it has several values; numbers are metadata. If class names are given, a number in "class" or "label"
    is a class.
    """

    def __init__(self, path: str | os.PathLike, image_key: str = "image", class_names: Sequence[str] = ()):
        """Finds the files; they are opened when first read.

        Args:
          path: a folder of .array_record files, one file, a glob pattern or a brace range; see `find_files`.
          image_key: feature with the encoded image.
          class_names: names of the classes, by number.

        Raises:
          UserError: there is no such file, or the path is remote.
        """
        if is_remote(os.fspath(path)):
            raise UserError(f"{path}: ArrayRecord files can only be read from a disk: copy or mount them")
        self.paths = find_files(path, ".array_record", ARRAY_RECORD)
        self._image_key, self._class_names = image_key, tuple(class_names)
        self.settings = f"{image_key} {names_digest(class_names)}"
        self._readers = RecordReaders(self.paths)

    def size(self, shard: int) -> int:
        return os.path.getsize(self.paths[shard])

    def scan(self, shard: int) -> Iterator[tuple[Place, Sample] | str]:
        yield from scan_numbered(shard, self._readers.count(shard), self.read)
        if not self._readers.is_intact(shard):
            yield "damaged ArrayRecord file"

    def read(self, places: Sequence[tuple[int, *Place]]) -> list[Sample | Unusable]:
        return [self._parse(shard, number) for shard, number, _ in places]

    def _parse(self, shard: int, number: int) -> Sample | Unusable:
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2  # takes a second to import

        try:
            features = tf_example_pb2.Example.FromString(self._readers.read(shard, number)).features.feature
            values = {name: _values(feature) for name, feature in features.items()}
            key = f"{os.path.basename(self.paths[shard])}#{number}"
            return make_sample(key, flatten(values), self._image_key, self._class_names)
        except DecodeError:
            return Unusable("not a tf.train.Example")
        except Unusable as reason:
            return reason


def _values(feature) -> list[Any]:
    kind = feature.WhichOneof("kind")
    return list(getattr(feature, kind).value[:_MAX_VALUES]) if kind else []


class RecordReaders:
    """Reads single records of ArrayRecord files. Picklable; each process opens a file once, when first read."""

    def __init__(self, paths: Sequence[str]):
        self.paths = tuple(paths)
        self._lock = threading.Lock()
        self._opened: dict[int, Any] = {}

    def __reduce__(self):
        return RecordReaders, (self.paths,)

    def count(self, shard: int) -> int:
        """Returns the number of records in a file.

        Raises:
          UserError: the file is not an ArrayRecord file, or cannot be read.
        """
        try:
            return self._reader(shard).num_records()
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"cannot read {self.paths[shard]!r}: {str(error).splitlines()[0][:150]}") from error

    def is_intact(self, shard: int) -> bool:
        """Returns True if the reader reports no damage; a file that it cannot read at all has no records.

        Raises:
          UserError: as for `count`.
        """
        self.count(shard)
        return self._reader(shard).ok()

    def read(self, shard: int, number: int) -> bytes:
        """Returns a record.

        Raises:
          Unusable: the record is damaged.
        """
        try:
            [record] = self._reader(shard).read([number])
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise Unusable("damaged record") from error
        return record

    def _reader(self, shard: int):
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            if shard not in self._opened:
                if not os.path.isfile(self.paths[shard]):  # the reader would abort the process
                    raise OSError("no such file")
                self._opened[shard] = ArrayRecordReader(self.paths[shard])
            return self._opened[shard]


class TfdsShards:
    """One split of a TFDS data set, prepared as ArrayRecord files; see `Shards`.

    Texts are captions, and so is the name of a class label (field "class"); numbers are metadata.
    """

    def __init__(self, name: str, split: str, data_dir: str = "", image_key: str = ""):
        """Opens a prepared data set.

        Args:
          name: name in TFDS ("imagenet2012:5.1.0"), or the folder of a prepared data set.
          split: a split ("train"), or a slice of one ("train[:90%]").
          data_dir: folder of prepared data sets; "": the default of TFDS.
          image_key: feature with the image; required if there are several images.

        Raises:
          UserError: the data set is unknown, not prepared or in another format, or lacks the image or the split.
        """
        self._name, self._split, self._data_dir = name, split, data_dir
        builder, info = self._builder
        images, labels = _image_and_label_features(info)
        if image_key and image_key not in images or len(images) != 1 and not image_key:
            raise UserError(
                f"data set {name!r} has the images {', '.join(sorted(images)) or '(none)'}: "
                "name one with --config.data.image_key"
            )
        self._image_key = image_key or images.pop()
        self._labels = labels
        self.settings = self._image_key
        self.paths = (str(builder.data_path / re.sub(r"[^\w.+-]", "_", split)),)
        _ = self._records  # raises if the split or its format is wrong

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name not in ("_records", "_builder")}

    @functools.cached_property
    def _builder(self):
        tfds = _import_tfds()
        try:
            if os.path.isdir(self._name) or is_remote(self._name):
                builder = tfds.builder_from_directory(self._name)
            else:
                builder = tfds.builder(self._name, data_dir=self._data_dir or None)
        except Exception as error:  # TFDS has its own exceptions for unreadable names, versions and metadata
            raise UserError(f"TFDS data set {self._name!r}: {' '.join(str(error).split())[:200]}") from error
        return builder, builder.info

    @functools.cached_property
    def _records(self):
        tfds = _import_tfds()
        builder, _ = self._builder
        decoders = _nested(self._image_key, tfds.decode.SkipDecoding())
        try:
            return builder.as_data_source(self._split, decoders=decoders)
        except Exception as error:  # as above: not prepared, no such split, another file format
            raise UserError(
                f"TFDS data set {self._name!r}, split {self._split!r}: {' '.join(str(error).split())[:200]} "
                "(prepare it with file_format='array_record')"
            ) from error

    def size(self, shard: int) -> int:
        del shard
        return len(self._records)

    def scan(self, shard: int) -> Iterator[tuple[Place, Sample] | str]:
        return scan_numbered(shard, len(self._records), self.read)

    def read(self, places: Sequence[tuple[int, *Place]]) -> list[Sample | Unusable]:
        return [self._parse(number) for _, number, _ in places]

    def _parse(self, number: int) -> Sample | Unusable:
        try:
            record = self._records[number]
        except MemoryError:
            raise
        except Exception:  # TFDS decoders raise many types, protobuf's among them
            return Unusable("damaged record")
        values = flatten(record)
        try:
            for name, names in self._labels.items():
                field, label = CLASS_FIELD if len(self._labels) == 1 else name, values.pop(name, None)
                if not isinstance(label, int):
                    raise Unusable("damaged record")
                values[field] = class_name(label, names).encode()
            return make_sample(f"{self._split}#{number}", values, self._image_key, ())
        except Unusable as reason:
            return reason


def _import_tfds():
    import tensorflow_datasets as tfds  # takes a second to import

    return tfds


def _image_and_label_features(info) -> tuple[set[str], dict[str, tuple[str, ...]]]:
    """Returns the names of the image features, and {name: class names} of the class labels."""
    tfds = _import_tfds()
    images, labels = set(), {}

    def visit(features: Mapping[str, Any], prefix: str) -> None:
        for name, feature in features.items():
            if isinstance(feature, tfds.features.Image):
                images.add(prefix + name)
            elif isinstance(feature, tfds.features.ClassLabel):
                labels[prefix + name] = tuple(feature.names or ())
            elif isinstance(feature, tfds.features.FeaturesDict):
                visit(feature, f"{prefix}{name}/")

    visit(info.features, "")
    return images, labels


def _nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split("/")):
        value = {name: value}
    return value


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested dicts, lists and arrays to keys "a/b" and "a/0", "a/1", ….

    A list of one value is replaced by the value.
    """
    if hasattr(values, "tolist"):  # numpy's scalars and arrays
        values = values.tolist()
    if isinstance(values, Mapping):
        items = [(str(name), value) for name, value in values.items()]
    elif isinstance(values, list | tuple):
        if len(values) == 1:
            return flatten(values[0], prefix)
        items = [(str(number), value) for number, value in enumerate(values[:_MAX_VALUES])]
    else:
        return {prefix: values}
    flat = {}
    for name, value in items:
        flat |= flatten(value, f"{prefix}/{name}" if prefix else name)
    return flat


def make_sample(key: str, values: Mapping[str, Any], image_key: str, class_names: Sequence[str]) -> Sample:
    """Returns the sample of a record.

    Args:
      key: key of the sample.
      values: flat values; bytes and texts other than the image are captions, the rest is metadata.
      image_key: key of the image.
      class_names: names of the classes, by number.

    Raises:
      Unusable: there is no image, a text is not UTF-8, or a class has no name.
    """
    values = dict(values)
    image = values.pop(image_key, None)
    if not isinstance(image, bytes):
        names = ", ".join(sorted(values))
        raise Unusable(f"no feature {image_key!r} (there are {names})"[:200])
    check_image(len(image))
    texts, metadata = {}, {}
    for name, value in values.items():
        if isinstance(value, int) and name in _LABELS and class_names:
            texts[CLASS_FIELD] = class_name(value, class_names)
        elif isinstance(value, bytes):
            if len(value) > MAX_TEXT_BYTES:
                continue  # another image, or a mask
            texts[name] = decode_text(value)
        elif isinstance(value, str):
            texts[name] = value
        else:
            metadata[name] = value
    return Sample(key, captions_of(texts), metadata, io.BytesIO(image))
