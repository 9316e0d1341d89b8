"""How good a model is: `perplexity.py` on held-out documents, `samples.py`; `open_model.py` (a folder to a model)."""
