"""Names that users and several rooms know: environment variables, prefixes of logged quantities, kinds of metrics."""

from __future__ import annotations

import re
from typing import Literal

VARIABLE = "LIGHTNING_EFFICIENT"  # a YAML file of methods for any training script
RUN_VARIABLE = "LIGHTNING_EFFICIENT_RUN"  # set by `ablate` for the processes it starts
COST = "efficient/run_cost/"
EXPORTED = "efficient/export/"
_LOWER = re.compile("loss|err|error|mse|mae|rmse|nll|ppl|perplexity|bpc|bpb|wer|cer|fid")
_HIGHER = re.compile(
    "acc|accuracy|f1|auc|auroc|iou|miou|map|bleu|rouge|precision|recall|psnr|ssim|r2|top1|top5|dice|kappa|mcc|r2score|ndcg|mrr|rouge1|rouge2|rougel"
)


def direction(metric: str) -> Literal["min", "max"] | None:
    """``"min"`` or ``"max"``, whichever is better for a metric of this name; ``None`` if the name does not tell.

    Args:
        metric: As a user logs it.
    """
    words = re.split(r"[^a-z0-9]+", metric.lower())
    if any(map(_LOWER.fullmatch, words)) or words[-1].endswith("loss"):
        return "min"
    return "max" if any(map(_HIGHER.fullmatch, words)) else None
