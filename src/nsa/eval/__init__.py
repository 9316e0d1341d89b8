"""How good a model is: `loss.py` (what training lowers too), `perplexity.py` on held-out documents, `samples.py`."""
