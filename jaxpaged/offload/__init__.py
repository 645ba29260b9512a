"""Pages outside the device: in host memory, and on a disk below it. Imports nothing here: the disk's part needs no jax."""
