"""A small model that ships with the package, so that everything runs offline: its folders, its corpus, its training.

Knows where the two exported folders lie. Refuses to import anything heavy: `jaxpaged.demo.MODEL_DIR` must cost nothing.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
DRAFT_DIR = Path(__file__).parent / "draft"  # same tokenizer, about a tenth of the parameters: for speculative decoding
