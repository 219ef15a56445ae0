"""The Inception Score: how sure a classifier is of each sample, and how even over all."""

import torch
from torch import Tensor

from ..process import checked_count


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp(E_x KL(p(y | x) || p(y))) of each part of the samples: mean and standard deviation over the parts.

    logits  [N, K] of a classifier. The parts are ``splits`` runs of rows, so that the order must not be that of classes

    Between 1 and K. It knows no real images: it is a measure of samples from what the classifier was trained on alone
    (Salimans et al. 2016). In float64. Raises TypeError or ValueError.
    """
    splits = checked_count("splits", splits)
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(f"logits: expected [at least {splits}, K], got {tuple(logits.shape)}")
    scores = []
    for part in range(splits):
        rows = slice(part * len(logits) // splits, (part + 1) * len(logits) // splits)
        log_p = logits[rows].double().log_softmax(1)
        p = log_p.exp()
        mean = p.mean(0)  # log p(y) is -inf where every p(y | x) is 0: the term is 0
        scores.append((p * log_p).sum(1).mean() - torch.special.xlogy(mean, mean).sum())
    found = torch.stack(scores).exp()
    return found.mean().item(), found.std(correction=0).item()
