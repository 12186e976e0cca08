"""Benchmarks the data loader against its upper limit and webdataset: `python -m lidit_jax.benchmarks.data`.

Tar shards of JPEGs whose shorter side is about 512 px become batches of 256 px squares. The limit is a bare loop that
decodes and downsizes images held in memory with the fastest decoder and resizer installed here, without any reading,
shuffling or batching. All contestants use the same shards, and one thread unless `--workers` says otherwise.
With `--parquet` the same images are read from Parquet files as well, as the library `datasets` writes them and with the
images uncompressed. With `--memory=200000` our loader alone loads that many samples, and its resident memory is printed
ten times.
"""

import concurrent.futures
import functools
import importlib.util
import io
import itertools
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from absl import flags
from PIL import Image

from lidit_jax import cli
from lidit_jax.benchmarks import shared_flags
from lidit_jax.benchmarks.contest import Contestant, Result, contest, describe_host, format_table
from lidit_jax.data.buckets import Bucket, resize_to_cover_and_crop
from lidit_jax.data.data_config import MAX_SIDE, DataConfig
from lidit_jax.data.formats import decoding
from lidit_jax.errors import UserError

_SAMPLES = shared_flags.define_samples("samples", 1024, "samples per round")
_IMAGES = cli.define_num_images(1024, "number of different images")
_BATCH = shared_flags.define_batch(32, "samples per batch")
_ROUNDS = shared_flags.define_rounds(7)
_WORKERS = flags.DEFINE_integer(
    "workers", 1, "threads of our loader and of the limit; webdataset has one", lower_bound=1, upper_bound=4096
)
_SHORTER = flags.DEFINE_list("shorter", ["512", "512"], "smallest and largest shorter side of the images, in pixels")
_MEMORY = shared_flags.define_samples(
    "memory", 0, "print our loader's memory while it loads so many samples; 0 runs the benchmark", lowest=0
)
_PARQUET = flags.DEFINE_bool("parquet", False, "also read the images from Parquet files")
_SEQUENTIAL = flags.DEFINE_bool("sequential", False, "with --memory: read shards in sequence, without their indexes")

SIDE = 256
TARGET = Bucket(SIDE, SIDE)
_REPORTS = 10  # lines that --memory prints


def main() -> None:
    print(describe_host("simplejpeg", "pillow", "webdataset", "torch"))
    samples, batch = _SAMPLES.value, _BATCH.value
    if samples % batch:
        raise UserError(f"--samples={samples} is not a multiple of --batch={batch}: use {-(-samples // batch) * batch}")
    try:
        shorter = [int(side) for side in _SHORTER.value]
    except ValueError:
        shorter = []
    if len(shorter) != 2 or not SIDE <= shorter[0] <= shorter[1] <= MAX_SIDE:
        raise UserError(
            f"--shorter={','.join(_SHORTER.value)} is not a range of sides in pixels from {SIDE} to {MAX_SIDE}: use, "
            "for example, --shorter=480,640"
        )
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), _IMAGES.value, shorter)
        if _MEMORY.value:
            watch_memory(folder, _MEMORY.value, batch, _WORKERS.value, _SEQUENTIAL.value)
            return
        arguments = folder, samples, batch, _WORKERS.value
        fastest = fastest_decoder(folder)
        prepare_functions = {
            "lidit_jax": ours,
            "sequential": functools.partial(ours, sequential=True),
            "limit": functools.partial(limit, decoder=fastest),
            "webdataset": webdataset,
        }
        if _PARQUET.value:
            for compression in ("snappy", "none"):
                files = write_parquet(Path(folder), compression)
                for name, sequential in ((f"parquet, {compression}", False), (f"{compression}, sequential", True)):
                    prepare_functions[name] = functools.partial(ours, sequential=sequential, parquet=str(files))
        contestants = [
            Contestant(name, functools.partial(prepare, *arguments)) for name, prepare in prepare_functions.items()
        ]
        results = contest(contestants, _ROUNDS.value)
    print(f"shorter side {shorter[0]} to {shorter[1]} px to {SIDE} px; {_WORKERS.value} worker(s); limit: {fastest}")
    print(format_table(results, samples, "samples"))
    print(f"lidit_jax reaches {share_of_limit(results):.0%} of the limit")


def share_of_limit(results: Sequence[Result]) -> float:
    """Returns the loader's speed relative to the bare loop's: median of the rounds' ratios."""
    seconds = {result.name: np.array(result.seconds) for result in results}
    return float(np.median(seconds["limit"] / seconds["lidit_jax"]))


def write_shards(folder: Path, count: int, shorter: Sequence[int]) -> None:
    """Writes random JPEGs with some detail, aspect ratios from 1:2 to 2:1, about 100 kB each, 256 to a shard.

    Args:
      folder: where the shards go.
      count: number of images.
      shorter: smallest and largest shorter side, in pixels.
    """
    random = np.random.default_rng(0)
    for first in range(0, count, 256):
        with tarfile.open(folder / f"{first // 256:05}.tar", "w") as tar:
            for number in range(first, min(first + 256, count)):
                side, aspect = random.integers(shorter[0], shorter[1] + 1), 2 ** random.uniform(-1, 1)
                size = (int(side * max(aspect, 1)), int(side * max(1 / aspect, 1)))  # width, height
                coarse = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8))
                pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
                pixels += random.integers(-10, 11, pixels.shape, dtype=np.int16)
                buffer = io.BytesIO()
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
                for name, data in ((f"{number:06}.jpg", buffer.getvalue()), (f"{number:06}.txt", b"a picture")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_parquet(folder: Path, compression: str) -> Path:
    """Writes the images of a folder's tar shards to Parquet files with row groups of 100; returns the files' folder."""
    parquet = folder / compression
    parquet.mkdir()
    for path in sorted(folder.glob("*.tar")):
        images = [{"bytes": data, "path": None} for data in read_jpegs(str(path.parent), path.name)]
        table = pa.table({"image": images, "text": ["a picture"] * len(images)})
        pq.write_table(table, parquet / f"{path.stem}.parquet", row_group_size=100, compression=compression)
    return parquet


# --- contestants ------------------------------------------------------------------------------------------------


def ours(
    folder: str, samples: int, batch: int, workers: int, sequential: bool = False, parquet: str = ""
) -> Callable[[], np.ndarray]:
    """Prepares our loader: random access through the shards' indexes, or `sequential` reading without them."""
    from lidit_jax.data.open_dataset import open_dataset

    source, path = ("parquet", parquet) if parquet else ("tar", folder)
    config = DataConfig(source, SIDE, path, sequential=sequential, num_threads=workers, prefetch=2 * workers)
    dataset = open_dataset(config, 8)
    start = itertools.count(0, samples // batch)

    def work() -> np.ndarray:
        # A new loader each round: one that lives on would prefetch during the other contestants' turns.
        batches = dataset.batches(batch, 0, None, first=next(start), with_captions=True)
        for _ in range(samples // batch):
            images = next(batches)["image"]
        batches.close()
        return images

    return work


def limit(folder: str, samples: int, batch: int, workers: int, *, decoder: str) -> Callable[[], np.ndarray]:
    """Prepares the bare loop over images in memory, with a decoder of `DECODERS`."""
    jpegs, decode = read_jpegs(folder), DECODERS[decoder]

    def loop(first: int) -> np.ndarray:
        for number in range(first, samples, workers):
            image = decode(jpegs[number % len(jpegs)])
        return image

    if workers == 1:
        return lambda: loop(0)
    pool = concurrent.futures.ThreadPoolExecutor(workers)
    return lambda: list(pool.map(loop, range(workers)))[0]


def webdataset(folder: str, samples: int, batch: int, workers: int) -> Callable[[], np.ndarray]:
    """Prepares webdataset as its documentation does: shards and samples shuffled, Pillow decodes, one process."""
    del workers
    import torch
    import webdataset as wds

    torch.set_num_threads(1)
    shards = sorted(str(path) for path in Path(folder).glob("*.tar"))
    data = wds.WebDataset(shards, shardshuffle=100, empty_check=False).shuffle(100).decode("pil").to_tuple("jpg", "txt")
    data = data.map_tuple(_crop_and_resize, str).batched(batch).repeat()
    loader = wds.WebLoader(data, batch_size=None, num_workers=0)

    def work() -> np.ndarray:
        for images, _ in itertools.islice(iter(loader), samples // batch):
            last = np.asarray(images)
        return last

    return work


def _crop_and_resize(image: Image.Image) -> np.ndarray:
    """Resizes the central square to uint8 [256, 256, 3]."""
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX, _central_square(image)))


def _central_square(image: Image.Image) -> tuple[int, int, int, int]:
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return left, top, left + side, top + side


# --- decoders ---------------------------------------------------------------------------------------------------


def read_jpegs(folder: str, pattern: str = "*.tar") -> list[bytes]:
    """Reads all JPEG files of a folder's shards."""
    jpegs = []
    for path in sorted(Path(folder).glob(pattern)):
        with tarfile.open(path) as tar:
            jpegs += [tar.extractfile(member).read() for member in tar if member.name.endswith("jpg")]
    return jpegs


def _decode_with_pillow(data: bytes) -> np.ndarray:
    return _crop_and_resize(Image.open(io.BytesIO(data)))


def _decode_with_pillow_draft(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (SIDE, SIDE))
    return _crop_and_resize(image)


def _decode_with_simplejpeg(data: bytes) -> np.ndarray:
    return resize_to_cover_and_crop(simplejpeg.decode_jpeg(data), TARGET)


def _decode_with_simplejpeg_reduced(data: bytes) -> np.ndarray:
    image = simplejpeg.decode_jpeg(data, min_height=SIDE, min_width=SIDE, min_factor=2)
    return resize_to_cover_and_crop(image, TARGET)


def _decode_with_ours(data: bytes) -> np.ndarray:
    return resize_to_cover_and_crop(decoding.decode(data, 1 << 26, TARGET), TARGET)


def _decode_with_opencv(data: bytes) -> np.ndarray:
    import cv2

    cv2.setNumThreads(1)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return cv2.resize(image[top : top + side, left : left + side], (SIDE, SIDE), interpolation=cv2.INTER_AREA)


# Name of a decoder -> function from a JPEG file to uint8 [256, 256, 3].
DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "Pillow": _decode_with_pillow,
    "Pillow, reduced": _decode_with_pillow_draft,
    "libjpeg-turbo (simplejpeg) + Pillow": _decode_with_simplejpeg,
    "libjpeg-turbo (simplejpeg), reduced + Pillow": _decode_with_simplejpeg_reduced,
    "lidit_jax's decoding": _decode_with_ours,
}
if importlib.util.find_spec("cv2"):  # optional: no extra of this package installs it
    DECODERS["OpenCV"] = _decode_with_opencv


def fastest_decoder(folder: str) -> str:
    """Returns the decoder of `DECODERS` with the smallest median time on 64 images.

    Prints the time of each, and its PSNR against `_reference` over all pixels of the images.
    """
    jpegs = read_jpegs(folder)[:64]
    seconds: dict[str, list[float]] = {name: [] for name in DECODERS}
    errors: dict[str, list[float]] = {name: [] for name in DECODERS}
    for data in jpegs:
        reference = _reference(data)
        for name, decode in DECODERS.items():
            started = time.perf_counter()
            image = decode(data)
            seconds[name].append(time.perf_counter() - started)
            errors[name].append(float(np.square(image - reference).mean()))
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        psnr = -10 * np.log10(max(np.mean(errors[name]), 1e-10) / 255**2)
        print(f"{name:46}{1e3 * median:6.2f} ms per image, PSNR {psnr:.1f} dB")
    return min(medians, key=medians.get)


def _reference(data: bytes) -> np.ndarray:
    """Decodes at full size and resizes with a Lanczos filter: the quality to compare with, float32 [256, 256, 3]."""
    image = Image.fromarray(simplejpeg.decode_jpeg(data))
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, _central_square(image)), np.float32)


# --- memory -----------------------------------------------------------------------------------------------------


def watch_memory(folder: str, samples: int, batch: int, workers: int, sequential: bool) -> None:
    """Loads `samples` samples over as many epochs as that takes, and prints the process's resident memory."""
    from lidit_jax.data.open_dataset import open_dataset
    from lidit_jax.metrics import duration

    config = DataConfig("tar", SIDE, folder, sequential=sequential, num_threads=workers)
    batches = open_dataset(config, 8).batches(batch, 0, None, with_captions=True)
    count = -(-samples // batch)
    started, marks = time.monotonic(), {count * (i + 1) // _REPORTS for i in range(_REPORTS)}
    for number in range(1, count + 1):
        next(batches)
        if number in marks:
            elapsed = time.monotonic() - started
            loaded, left = number * batch, elapsed / number * (count - number)
            print(f"{loaded:9} samples  {resident_memory() >> 20} MiB  {loaded / elapsed:.0f} samples/s  "
                  f"eta {duration(left)}", flush=True)  # fmt: skip
    batches.close()


def resident_memory() -> int:
    """Returns the resident memory of this process in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    cli.run(main)
