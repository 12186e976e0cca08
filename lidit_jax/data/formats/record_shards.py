"""Samples stored as records: ArrayRecord files of tf.train.Example, and TensorFlow Datasets (TFDS)."""

import functools
import io
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from lidit_jax.data.captions import USUAL_FIELDS
from lidit_jax.data.formats.array_record import array_record_module
from lidit_jax.data.formats.files import find_files, is_remote
from lidit_jax.data.formats.shards import (
    CLASS_FIELD,
    MAX_LIST,
    Place,
    Sample,
    Unusable,
    captions_of,
    check_image,
    check_text,
    class_name,
    decode_text,
    flatten,
    names_digest,
    printable,
    scan_numbered,
    with_class_name,
)
from lidit_jax.errors import UserError

ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$")
_LABELS = ("class", "label")


class ArrayRecordShards:
    """ArrayRecord files of tf.train.Example; see `Shards`.

    The feature `image_key` holds the encoded image. Every other bytes feature that is text may be a caption; its values
    are named "name/0", "name/1", … if there are several. Single numbers are metadata. If class names are given, a
    number in "class" or "label" is a class. Other features, such as masks, tensors and bounding boxes, are ignored.
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
        try:
            values = parse_example(self._readers.read(shard, number))
            key = f"{printable(os.path.basename(self.paths[shard]))}#{number}"
            return make_sample(key, flatten(values), self._image_key, self._class_names)
        except Unusable as reason:
            return reason


def parse_example(record: bytes, names: Collection[str] | None = None) -> dict[str, Any]:
    """Returns the texts, images and single numbers of a tf.train.Example; lists of numbers are left out unread.

    Args:
      record: the encoded example.
      names: features to return; None: all.

    Raises:
      Unusable: the record is not a tf.train.Example.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2  # takes a second to import

    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise Unusable("not a tf.train.Example") from error
    found = {}
    for name in features if names is None else names:
        if name not in features:  # looking it up would add it
            continue
        kind = features[name].WhichOneof("kind")
        values = getattr(features[name], kind).value if kind else ()
        if kind == "bytes_list":
            found[name] = list(values[:MAX_LIST])
        elif len(values) == 1:
            found[name] = values[0]
    return found


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
        with self._lock:
            if shard not in self._opened:
                if not os.path.isfile(self.paths[shard]):  # the reader would abort the process
                    raise OSError("no such file")
                self._opened[shard] = array_record_module().ArrayRecordReader(self.paths[shard])
            return self._opened[shard]


class TfdsShards:
    """One split of a TFDS data set, prepared as ArrayRecord files; see `Shards`.

    Texts may be captions, and so may the name of a class label (field "class"); single numbers are metadata. Other
    features (masks and further images, audio, video, tensors, bounding boxes) are not decoded.
    """

    def __init__(self, name: str, split: str, data_dir: str = "", image_key: str = ""):
        """Opens a prepared data set.

        Args:
          name: name in TFDS ("imagenet2012:5.1.0"), or the folder of a prepared data set.
          split: a split ("train"), or a slice of one ("train[:90%]").
          data_dir: folder of prepared data sets; "": the default of TFDS.
          image_key: feature with the image; "": the only image, or the one called "image".

        Raises:
          UserError: the data set is unknown, not prepared or in another format, or lacks the image or the split.
        """
        self._name, self._split, self._data_dir = name, split, data_dir
        builder, info = self._builder
        images, labels, others = _usable_features(info)
        if not image_key:
            image_key = "image" if len(images) != 1 else next(iter(images))
        if not images:
            raise UserError(
                f"data set {name!r} has no image: its features are {', '.join(info.features)}; images in sequences "
                "and videos are not read"
            )
        if image_key not in images:
            raise UserError(
                f"data set {name!r} has the images {', '.join(sorted(images))}: name one with --config.data.image_key"
            )
        self._image_key = image_key
        self._labels = labels
        self._names = (self._image_key, *labels, *others)
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
        # TFDS would decode every feature: with a segmentation mask that takes a hundred times longer.
        try:
            return builder.as_data_source(self._split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
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
            values = flatten(parse_example(self._records[number], self._names))
        except MemoryError:
            raise
        except Exception:  # each version of the reader raises its own types
            return Unusable("damaged record")
        try:
            for name, names in self._labels.items():
                field, label = CLASS_FIELD if len(self._labels) == 1 else name, values.pop(name, None)
                if not isinstance(label, int):
                    raise Unusable("damaged record")
                if name := class_name(label, names):
                    values[field] = name
            return make_sample(f"{self._split}#{number}", values, self._image_key, None)
        except Unusable as reason:
            return reason


def _import_tfds():
    import tensorflow_datasets as tfds  # takes a second to import

    return tfds


def _usable_features(info) -> tuple[set[str], dict[str, tuple[str, ...]], list[str]]:
    """Returns the features that samples are made of, by their names in a record.

    Returns:
      The images, {name: class names} of the class labels, and the texts (or sequences of texts) and single numbers.
    """
    tfds = _import_tfds()
    images, labels, others = set(), {}, []

    def visit(features: Mapping[str, Any], prefix: str, in_sequence: bool) -> None:
        for name, feature in features.items():
            path, sequence = prefix + name, in_sequence
            while type(feature) is tfds.features.Sequence:
                feature, sequence = feature.feature, True
            if isinstance(feature, tfds.features.FeaturesDict):
                visit(feature, f"{path}/", sequence)
            elif isinstance(feature, tfds.features.Text):
                others.append(path)
            elif sequence:
                continue
            elif isinstance(feature, tfds.features.Image):
                images.add(path)
            elif isinstance(feature, tfds.features.ClassLabel):
                labels[path] = tuple(feature.names or ())
            elif isinstance(feature, tfds.features.Tensor) and feature.shape == ():
                others.append(path)

    visit(info.features, "", False)
    return images, labels, others


def make_sample(key: str, values: Mapping[str, Any], image_key: str, class_names: Sequence[str] | None) -> Sample:
    """Returns the sample of a record.

    Args:
      key: key of the sample.
      values: flat values: texts, also as bytes; bytes that are no text, which are ignored; and metadata.
      image_key: key of the image.
      class_names: names of the classes, by number; None: the classes have their names already.

    Raises:
      Unusable: there is no image, a usual caption field is not UTF-8 or too long, or a class has no name.
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
            texts |= with_class_name({CLASS_FIELD: value}, class_names)
        elif isinstance(value, bytes | str):
            try:
                text = _text_of(value)
            except Unusable:
                if name.split("/")[0] in USUAL_FIELDS:
                    raise
                continue  # another image, a mask, audio, a document, …
            if "\0" in text:
                continue
            is_unnamed = name == CLASS_FIELD and class_names is not None
            texts |= with_class_name({name: text}, class_names) if is_unnamed else {name: text}
        else:
            metadata[name] = value
    return Sample(key, captions_of(texts), metadata, io.BytesIO(image))


def _text_of(value: bytes | str) -> str:
    if isinstance(value, bytes):
        return decode_text(value)
    check_text(len(value))
    return value
