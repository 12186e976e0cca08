"""The Inception-v3 network that defines FID, in PyTorch, with its image preprocessing.

It is TensorFlow's network of December 2015 (Szegedy et al. 2016; Heusel et al. 2017), whose weights the `pytorch-fid`
and `torch-fidelity` packages distribute. It differs from torchvision's: average pools exclude the padding, the pool of
the last block is a max pool, and there are 1008 classes. Images are resized like in TensorFlow 1.
"""

from typing import NamedTuple

import numpy as np
import torch
from etils import epath
from torch import nn

from lidit_jax.errors import UserError
from lidit_jax.weights.safetensors_file import SafetensorsFile

SIDE = 299  # height and width of the network's input in pixels
NUM_CLASSES = 1008
BATCH_NORM_EPSILON = 1e-3


class Layer(NamedTuple):
    """Convolution, named after its weights. With stride 1 it is padded to keep the size of its input."""

    name: str
    channels: int
    kernel: tuple[int, int]
    stride: int = 1


def _layer(name: str, channels: int, *kernel: int, stride: int = 1) -> Layer:
    return Layer(name, channels, kernel if len(kernel) == 2 else kernel * 2, stride)


# Each branch is a sequence of layers. Layers in an inner list share their input; their outputs are concatenated.
Branches = list[list[Layer | list[Layer]]]


def _block_35x35() -> Branches:
    return [
        [_layer("branch1x1", 64, 1)],
        [_layer("branch5x5_1", 48, 1), _layer("branch5x5_2", 64, 5)],
        [_layer("branch3x3dbl_1", 64, 1), _layer("branch3x3dbl_2", 96, 3), _layer("branch3x3dbl_3", 96, 3)],
    ]


def _reduction_35_to_17() -> Branches:
    return [
        [_layer("branch3x3", 384, 3, stride=2)],
        [_layer("branch3x3dbl_1", 64, 1), _layer("branch3x3dbl_2", 96, 3), _layer("branch3x3dbl_3", 96, 3, stride=2)],
    ]


def _block_17x17(width: int) -> Branches:
    return [
        [_layer("branch1x1", 192, 1)],
        [_layer("branch7x7_1", width, 1), _layer("branch7x7_2", width, 1, 7), _layer("branch7x7_3", 192, 7, 1)],
        [
            _layer("branch7x7dbl_1", width, 1),
            _layer("branch7x7dbl_2", width, 7, 1),
            _layer("branch7x7dbl_3", width, 1, 7),
            _layer("branch7x7dbl_4", width, 7, 1),
            _layer("branch7x7dbl_5", 192, 1, 7),
        ],
    ]


def _reduction_17_to_8() -> Branches:
    return [
        [_layer("branch3x3_1", 192, 1), _layer("branch3x3_2", 320, 3, stride=2)],
        [
            _layer("branch7x7x3_1", 192, 1),
            _layer("branch7x7x3_2", 192, 1, 7),
            _layer("branch7x7x3_3", 192, 7, 1),
            _layer("branch7x7x3_4", 192, 3, stride=2),
        ],
    ]


def _block_8x8() -> Branches:
    return [
        [_layer("branch1x1", 320, 1)],
        [_layer("branch3x3_1", 384, 1), [_layer("branch3x3_2a", 384, 1, 3), _layer("branch3x3_2b", 384, 3, 1)]],
        [
            _layer("branch3x3dbl_1", 448, 1),
            _layer("branch3x3dbl_2", 384, 3),
            [_layer("branch3x3dbl_3a", 384, 1, 3), _layer("branch3x3dbl_3b", 384, 3, 1)],
        ],
    ]


class Convolution(nn.Module):
    """Convolution, batch normalisation with stored statistics, and ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=BATCH_NORM_EPSILON)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)).relu()


class Mixed(nn.Module):
    """Inception block: parallel branches, the last one a pool, with concatenated outputs.

    Attributes:
      out_channels: number of channels of the output.
    """

    def __init__(self, in_channels: int, branches: Branches, pool: nn.Module, pool_channels: int = 0):
        """Creates the layers.

        Args:
          in_channels: number of channels of the input.
          branches: layers of all branches but the pool.
          pool: the pool.
          pool_channels: number of channels of the convolution after the pool; 0 for no convolution.
        """
        super().__init__()
        self._branches, self._pool = branches, pool
        self.out_channels = sum(self._add(branch, in_channels) for branch in branches)
        if pool_channels:
            self.branch_pool = Convolution(in_channels, pool_channels, (1, 1), 1, (0, 0))
        self.out_channels += pool_channels or in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self._pool(x)
        if hasattr(self, "branch_pool"):
            pooled = self.branch_pool(pooled)
        return torch.cat([*(self._apply_branch(branch, x) for branch in self._branches), pooled], dim=1)

    def _add(self, branch: list[Layer | list[Layer]], channels: int) -> int:
        for step in branch:
            layers = step if isinstance(step, list) else [step]
            for layer in layers:
                padding = tuple(side // 2 for side in layer.kernel) if layer.stride == 1 else (0, 0)
                module = Convolution(channels, layer.channels, layer.kernel, layer.stride, padding)
                self.add_module(layer.name, module)
            channels = sum(layer.channels for layer in layers)
        return channels

    def _apply_branch(self, branch: list[Layer | list[Layer]], x: torch.Tensor) -> torch.Tensor:
        for step in branch:
            layers = step if isinstance(step, list) else [step]
            x = torch.cat([self.get_submodule(layer.name)(x) for layer in layers], dim=1)
        return x


class FIDInception(nn.Module):
    """Inception network that computes the features of FID: float32 [B, 3, 299, 299] in [-1, 1] -> [B, 2048].

    Attributes:
      num_features: size of the features, 2048.
    """

    num_features = 2048

    def __init__(self):
        super().__init__()
        average = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), 2, (0, 0))
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), 1, (0, 0))
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3), 1, (1, 1))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1), 1, (0, 0))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), 1, (0, 0))
        self._max_pool = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b = Mixed(192, _block_35x35(), average, 32)
        self.Mixed_5c = Mixed(256, _block_35x35(), average, 64)
        self.Mixed_5d = Mixed(288, _block_35x35(), average, 64)
        self.Mixed_6a = Mixed(288, _reduction_35_to_17(), self._max_pool)
        self.Mixed_6b = Mixed(768, _block_17x17(128), average, 192)
        self.Mixed_6c = Mixed(768, _block_17x17(160), average, 192)
        self.Mixed_6d = Mixed(768, _block_17x17(160), average, 192)
        self.Mixed_6e = Mixed(768, _block_17x17(192), average, 192)
        self.Mixed_7a = Mixed(768, _reduction_17_to_8(), self._max_pool)
        self.Mixed_7b = Mixed(1280, _block_8x8(), average, 192)
        self.Mixed_7c = Mixed(2048, _block_8x8(), nn.MaxPool2d(3, stride=1, padding=1), 192)
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self._max_pool(x)))  # [B, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self._max_pool(x))))  # [B, 288, 35, 35]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # [B, 768, 17, 17]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B, 2048, 8, 8]
        return x.mean(dim=(2, 3))

    @staticmethod
    def prepare(image: np.ndarray) -> torch.Tensor:
        """Resizes and scales an image: uint8 [H, W, 3] -> float32 [3, 299, 299] in [-1, 1].

        Resizes like TensorFlow 1's `resize_bilinear`, on which published scores are based: output pixel i interpolates
        between the two neighbours of input position i H / 299, without aligned corners, half-pixel centres or
        anti-aliasing.
        """
        x = torch.from_numpy(np.array(image, np.float32, order="C"))
        x = torch.einsum("ih,hwc->ciw", _bilinear(image.shape[0]), x)
        return (torch.einsum("jw,ciw->cij", _bilinear(image.shape[1]), x) - 128) / 128


def _bilinear(side: int) -> torch.Tensor:
    """Returns the interpolation matrix [299, side]: the weight of each input pixel in each output pixel."""
    positions = torch.arange(SIDE) * (side / SIDE)
    lower = positions.floor().long()
    upper_weight = positions - lower
    weights = torch.zeros(SIDE, side)
    rows = torch.arange(SIDE)
    weights[rows, lower] += 1 - upper_weight
    weights[rows, (lower + 1).clamp(max=side - 1)] += upper_weight
    return weights


def load_inception(file: epath.Path) -> FIDInception:
    """Loads FID's Inception from a safetensors file with the tensor names of `pytorch-fid` and `torch-fidelity`.

    Raises:
      UserError: the file is missing, is not a safetensors file (pickles are never read), or has weights of another
        network.
    """
    if file.suffix != ".safetensors":
        raise UserError(
            f"--inception={file} is not a .safetensors file, and pickles are never read: convert it once with "
            f'python -c "import torch, safetensors.torch as s; s.save_file({{k: v.contiguous() for k, v in '
            f"torch.load('{file.name}', weights_only=True).items()}}, '{file.stem}.safetensors')\""
        )
    model, weights = FIDInception(), SafetensorsFile(file)
    try:
        # FID does not use the last layer, but its shape tells this network from torchvision's, with the same names.
        _read(weights, "fc.weight", (NUM_CLASSES, FIDInception.num_features))
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if not name.endswith(".num_batches_tracked"):
                    tensor.copy_(torch.from_numpy(_read(weights, name, tuple(tensor.shape))))
    finally:
        weights.close()
    return model


def _read(weights: SafetensorsFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in weights.names:
        raise UserError(
            f"{weights.file}: tensor {name} is missing: these are not the weights that define FID; use "
            "pt_inception-2015-12-05 of pytorch-fid or weights-inception-2015-12-05 of torch-fidelity"
        )
    weights.check(name, shape, "FID's Inception")
    value = weights.read(name).astype(np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"{weights.file}: tensor {name} has values that are not finite; copy the file again")
    return value
