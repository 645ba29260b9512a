"""On an NVIDIA GPU: the kernel of `copy_pages`, which moves pages in any direction."""

from pallas_kernels.copy_pages.mosaic import scatter_pages, unavailable

__all__ = ["scatter_pages", "unavailable"]
