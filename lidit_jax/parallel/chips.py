"""Peak FLOP/s, memory and bandwidth of each accelerator chip, as its maker states them.

The TPU figures are those of Cloud TPU's system architecture pages. FLOP/s are for bfloat16 inputs with float32
accumulation, without sparsity.
"""

import dataclasses

import jax

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one accelerator chip.

    Attributes:
      name: TPU generation as a topology string has it ("v5p" in "v5p:4x4x4"), or the maker's product name.
      flops: peak bfloat16 FLOP/s.
      memory: device memory in bytes.
      memory_bandwidth: bytes per second between the chip and its device memory.
      network_bandwidth: bytes per second that the chip can send to others of its slice, over all links, one way.
    """

    name: str
    flops: float
    memory: float
    memory_bandwidth: float
    network_bandwidth: float


V4 = Chip("v4", 275e12, 32 * GB, 1228 * GB, 300 * GB)
V5E = Chip("v5e", 197e12, 16 * GB, 819 * GB, 200 * GB)
V5P = Chip("v5p", 459e12, 95 * GB, 2765 * GB, 600 * GB)
V6E = Chip("v6e", 918e12, 32 * GB, 1640 * GB, 448 * GB)
TPUS = {chip.name: chip for chip in (V4, V5E, V5P, V6E)}

# Keys are prefixes of `jax.Device.device_kind`; the longest match wins.
_CHIPS = {
    "TPU v4": V4,
    "TPU v5 lite": V5E,
    "TPU v5e": V5E,
    "TPU v5p": V5P,
    "TPU v5": V5P,
    "TPU v6 lite": V6E,
    "TPU v6e": V6E,
    "NVIDIA A100": Chip("A100", 312e12, 80 * GB, 2039 * GB, 300 * GB),
    "NVIDIA H100": Chip("H100", 989e12, 80 * GB, 3350 * GB, 450 * GB),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 80 * GB, 2039 * GB, 300 * GB),
    "NVIDIA H200": Chip("H200", 989e12, 141 * GB, 4800 * GB, 450 * GB),
}


def chip_of(device: jax.Device) -> Chip | None:
    """Returns the device's peak figures, or None for a device that the table lacks, such as a CPU."""
    prefixes = [kind for kind in _CHIPS if device.device_kind.startswith(kind)]
    return _CHIPS[max(prefixes, key=len)] if prefixes else None
