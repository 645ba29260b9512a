"""Convert checkpoints: Hugging Face safetensors <-> an orbax directory, streamed, and safe against a kill.

    python -m convert SRC DST            safetensors -> orbax
    python -m convert --to-hf SRC DST    back
    python -m convert --verify DIR       recompute every digest

Knows files and their order. Refuses to know devices and engines. Importing this package costs nothing: `convert.cli` answers
--help without jax.
"""
