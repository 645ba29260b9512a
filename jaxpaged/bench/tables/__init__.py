"""The tables of the report, one module each with one interface; `measuring.Table` says which. They are listed here alone."""

from __future__ import annotations

from jaxpaged.bench.tables import batching, block_size, chunks, compiled, grid, growth, paging, prefix
from jaxpaged.bench.tables.measuring import Table

_ALL: tuple[Table, ...] = (
    *(grid, batching, chunks, prefix, block_size, paging, compiled),
    *(growth.sequences, growth.context, growth.pool),
)
TABLES = {table.name: table for table in _ALL}
