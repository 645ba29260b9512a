"""What vendors publish about GPUs: bytes, bytes per second, operations per second. Knows no model and no efficiency."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpaged.config import ConfigError, nearest


@dataclass(frozen=True)
class Gpu:
    """The peaks of one GPU.

    Args:
      memory_gib: what a program can see of it. Data sheets say GB, and drivers report about as many GiB.
      bytes_per_s: of its memory.
      flops_per_s: dense bfloat16 products summed in float32. Data sheets print twice as much, for sparse ones.
    """

    name: str
    memory_gib: float
    bytes_per_s: float
    flops_per_s: float
    source: str

    @property
    def memory_bytes(self) -> int:
        """The same in bytes."""
        return int(self.memory_gib * 2**30)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 2.039e12, 312e12, "NVIDIA A100 data sheet, SXM 80GB"),
        Gpu("A100-40GB", 40, 1.555e12, 312e12, "NVIDIA A100 data sheet, SXM 40GB"),
        Gpu("H100", 80, 3.35e12, 989.4e12, "NVIDIA H100 data sheet, SXM: 1,979 sparse"),
        Gpu("H200", 141, 4.8e12, 989.4e12, "NVIDIA H200 data sheet, SXM: 1,979 sparse"),
        Gpu("B200", 180, 8.0e12, 2250e12, "NVIDIA DGX B200 data sheet, an eighth of it: 4,500 sparse"),
        # A sixteenth of GDDR6 with error correction is taken by its check bits.
        Gpu("L40S", 45, 0.864e12, 362.05e12, "NVIDIA L40S data sheet: 48 GB with ECC, 733 sparse"),
        Gpu("RTX4090", 24, 1.008e12, 165.2e12, "NVIDIA Ada GPU architecture whitepaper, appendix A: float32 accumulation"),
    )
}


def named_gpu(name: str) -> Gpu:
    """A GPU of the list, whatever the case of its letters.

    Raises:
      ConfigError: it is not in the list; the nearest name is told.
    """
    if name.upper() not in GPUS:
        raise ConfigError(f"gpu: got {name!r}{nearest(name.upper(), tuple(GPUS))} (of: {', '.join(GPUS)})")
    return GPUS[name.upper()]
