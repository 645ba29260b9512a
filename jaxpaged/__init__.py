"""jaxpaged: PagedAttention inference in JAX."""
from jaxpaged.version import __version__
