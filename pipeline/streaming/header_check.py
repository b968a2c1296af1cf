"""Whether a student's files hold the student, for an engine that loads them in its own way."""

from __future__ import annotations

import torch

from pipeline.config import ModelConfig
from pipeline.models import load as models
from pipeline.models.files import check_model_files
from pipeline.models.resolve import resolve
from pipeline.streaming.weights import SafetensorsCheckpoint, locate


def check_checkpoint(cfg: ModelConfig) -> None:
    """Refuse weights that are not the whole model, or more than it, for an engine that would not say so. Reads names
    and shapes alone; what is quantised is left to that engine. Raises `ModelError`.
    """
    source = resolve(cfg)
    if source.quantisation is not None:
        return
    directory = source.directory
    check_model_files(directory)
    model = models.load_skeleton(cfg, torch.device("meta"))
    places = locate(model, SafetensorsCheckpoint(directory))
    models.check_weight_names(cfg, places.lacking(model), places.unexpected)
