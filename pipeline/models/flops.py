"""FLOPs of a model, for the prediction of `redpen plan` and for a run's ledger.

With N parameters of a model that a token is multiplied by (`meta_model.Weights.multiplied`), of which F are frozen, A
trained parameters (an adapter's, or all), and n tokens:

    sampling, scoring    2 N n      one forward; a sampler computes a prompt once, a scorer for every rollout
    training             4 F n + 6 A n, and 2 (F + A) n more with gradient checkpointing
                                    forward and the gradient of activations through all weights, and the gradient of
                                    those that are trained

Attention's own products and the optimizer are left out: a few percent at these lengths. (Kaplan et al., "Scaling Laws
for Neural Language Models", arXiv 2001.08361, section 2.1.)
"""

from __future__ import annotations


def forward(multiplied: float, tokens: float) -> float:
    """Of scoring or sampling `tokens` tokens."""
    return 2.0 * multiplied * tokens


def training(multiplied: float, adapter: float | None, tokens: float, *, recomputed: bool) -> float:
    """Of a forward and backward over `tokens` tokens.

    Args:
        adapter: parameters of the LoRA that is trained; None if the model's own weights are trained.
        recomputed: by gradient checkpointing.
    """
    frozen, trained = (0.0, multiplied) if adapter is None else (multiplied, adapter)
    return (4.0 * frozen + 6.0 * trained + (2.0 * (frozen + trained) if recomputed else 0.0)) * tokens
