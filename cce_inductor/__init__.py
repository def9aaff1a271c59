"""Cut Cross-Entropy for torch.compile: the loss of a language model without its logits, and no change to the model.

    model = torch.compile(model, backend="cce")

See the README for what is rewritten and what is not, and `explain` to ask about one model.
"""

from .api import linear_cross_entropy
from .backend import cce_backend, disable, enable, explain
from .options import Options
from .report import Refusal, RefusedError, Report, Rewrite, capture_reports
from .verify import VerificationError

__all__ = [
    "Options",
    "Refusal",
    "RefusedError",
    "Report",
    "Rewrite",
    "VerificationError",
    "capture_reports",
    "cce_backend",
    "disable",
    "enable",
    "explain",
    "linear_cross_entropy",
]
