"""How good a model still is: perplexity, divergence from the dense model, summaries (docs/evaluation.md)."""
