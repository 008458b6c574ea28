"""What a processor is loaded from, beside its tokenizer: files that training leaves as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers.utils import FEATURE_EXTRACTOR_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

# as transformers names them; not all of the names are exported
_FILES = (
    PROCESSOR_NAME,
    IMAGE_PROCESSOR_NAME,
    FEATURE_EXTRACTOR_NAME,
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
)


def copy_processor_files(source: Path, folder: Path) -> None:
    """Copy them, so that AutoProcessor loads from `folder`, unless the model there is only a part of the source's.

    Args:
        source: What the model was loaded from.
        folder: Holds the saved config.json.

    Raises:
        OSError: A file cannot be copied.
    """
    if _model_type(source) != _model_type(folder):
        return
    for name in dict.fromkeys(_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _model_type(folder: Path) -> object:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else None
