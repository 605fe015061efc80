"""DiSK in the Trainer of Hugging Face's transformers: ``DiSKTrainer(model=student, teacher=teacher, args=...)``.

``DistillationMixin`` does the same for a Trainer of your own, such as ``Seq2SeqTrainer``.
"""

from ..requirement import require

require("transformers", "4.57.1", "pip install 'transformers>=4.57.1' 'accelerate>=1.10'")

from .trainer import DiSKTrainer, DistillationMixin  # noqa: E402

__all__ = ["DiSKTrainer", "DistillationMixin"]
